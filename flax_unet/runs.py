"""A run's folder (workdir): config.json, metrics.jsonl, checkpoints; and the model in it."""

import contextlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import IO, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flax_unet
from flax_unet import (
    checkpoint,
    formats,
    images,
    onnx_file,
    pack,
    predict,
    processes,
    recipes,
    train,
    zoo,
)
from flax_unet.efficientnet import with_imagenet
from flax_unet.folders import MaskFiles
from flax_unet.formats import BINARY, MaskFormat
from flax_unet.images import RGB, ImageFormat
from flax_unet.model import UNet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: Sections of config.json that determine the result; a run with another value is another run.
DETERMINES = ("settings", "model", "training", "data", "masks", "images")
#: Pixels of the windows that `predict.Tiled` computes at a time, or one window if it has more.
PIXELS = 2**20
#: Of weights that were trained on Kvasir-SEG, or from such weights.
TERMS = (
    "trained on Kvasir-SEG: for research and education only, and not a medical device; other use "
    "needs the permission of its authors (https://datasets.simula.no/kvasir-seg/), publications "
    "cite doi 10.1007/978-3-030-37734-2_37"
)
#: What the folder of a cross-validation has when all folds are trained; it names them.
CROSS_VALIDATION = "cross-validation.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")


@dataclass(frozen=True)
class Settings:
    """What a run computes."""

    recipe: str = "unet"
    """unet, article, strong or pretrained; `flax-unet train --help` describes them."""
    encoder: Literal["lite0", "lite2"] | None = None
    """EfficientNet of --recipe pretrained; lite0 by default."""
    dataset: str = "kvasir_seg"
    """kvasir_seg, synthetic_polyps or synthetic_cells; tfds:NAME, any data set of TFDS; or folder,
    the pictures in --images and --masks."""
    protocol: str = "article"
    """Train, validation and test split of kvasir_seg: article, medico, effisegnet or sorted42."""
    fold: tuple[int, int] | None = None
    """I K: divide the training and validation pictures into K folds, keeping those of a --group
    together, and validate on fold I (from 0) what is trained on the others. `flax-unet
    cross-validate` does so for each fold."""
    init: Path | None = None
    """Workdir of a run with the same network, or an exported model, or the name of a shipped one
    (pretrained, strong), to start from its best parameters."""
    features: tuple[int, ...] | None = None
    """Channels per level; the last is the bottleneck. With an encoder, channels per level of
    the decoder. By default the recipe's."""
    image_size: int | tuple[int, int] = 256
    """Height and width of the resized images, one number for squares: multiples of 32; each level
    fewer in --features halves that."""
    crop: int | tuple[int, int] | None = None
    """Train on random crops of this height and width at the pictures' own resolution, in place of
    --image-size, for large pictures with fine structures. A third of the crops are centred at a
    pixel of a class; an epoch has as many as cover the area of all pictures. predict and evaluate
    then work in windows of this size."""
    batch_size: int = 8
    """Images per step."""
    epochs: int = 100
    """Passes over the training split; runs with a constant learning rate can be extended later."""
    learning_rate: float = 1e-3
    """Learning rate, or the peak of a schedule."""
    seed: int = 0
    """Seed of the initial parameters, the order of the images, dropout and augmentation."""
    class_weights: tuple[float, ...] | Literal["frequency"] | None = None
    """Weights of exclusive classes in the loss, in their order; frequency: the median frequency of
    the classes in the training masks divided by each class' own."""
    upright: bool = False
    """The pictures have a top, as those of streets: augmentation flips them left to right only, and
    rotates them by 10 degrees at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32."""

    def __post_init__(self):
        if self.init is not None:
            object.__setattr__(self, "init", zoo.named(self.init) or self.init)
        if self.crop is None:
            return
        crop, size = (
            side[0] if isinstance(side, tuple) and len({*side}) == 1 else side
            for side in (self.crop, self.image_size)
        )
        if size not in (Settings.image_size, crop):
            raise ValueError("give only one of --image-size and --crop")
        for name in ("crop", "image_size"):
            object.__setattr__(self, name, crop)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, or of the crops."""
        side = self.image_size
        return (side, side) if isinstance(side, int) else side


@dataclass(frozen=True)
class Places:
    """Where the pictures are, how they are found and loaded; their content is in `data`."""

    workdir: Path
    """Folder of the run: config.json, metrics.jsonl, checkpoints, pictures."""
    kvasir_zip: Path | None = None
    """The Kvasir-SEG archive; by default the environment variable KVASIR_SEG_ZIP."""
    images: Path | None = None
    """Folder of images (--dataset folder)."""
    masks: Path | None = None
    """Folder of masks (--dataset folder), paired with the images by name; it may be the same."""
    image_suffix: str = ""
    """End of the images' names that the masks' names lack, such as _training."""
    mask_suffix: str = ""
    """End of the masks' names that the images' names lack, such as _mask."""
    mask_files: MaskFiles = "one"
    """one file for a picture; or one for each class, in subfolders NAME of --classes or with _NAME
    at the end; or one for each instance, in a subfolder with the picture's name."""
    split_file: Path | None = None
    """JSON or CSV file with the split of each name (--dataset folder). By default the folders
    train, val and test say it, or 80, 10 and 10 % are chosen by a hash of the names."""
    group: str | None = None
    """Regular expression; pictures in whose names it finds the same text (a patient, a video) are
    in the same split."""
    split_by: Literal["share", "name"] = "share"
    """share: exactly 80, 10 and 10 %; name: about that, and adding pictures moves no other one."""
    data_dir: Path | None = None
    """Where TFDS stores prepared data sets; by default ~/tensorflow_datasets."""
    image_key: str | None = None
    """Feature of --dataset tfds:NAME that holds the image; image by default."""
    mask_key: str | None = None
    """Feature of --dataset tfds:NAME that holds the mask; mask by default."""
    tfds_splits: tuple[str, str, str] | None = None
    """Splits of --dataset tfds:NAME, or slices of them such as train[:90%], for training,
    validation and test; by default train, validation and test."""
    stream: bool = False
    """Decode the training pictures in every epoch instead of keeping them on the device."""


def recipe_of(
    settings: Settings, mask_format: MaskFormat = BINARY, image_format: ImageFormat = RGB
) -> recipes.Recipe:
    """The recipe that the settings name, with their network for these pictures and masks.

    Raises:
        ValueError: a setting is out of range, or the settings do not fit together.
    """
    if settings.recipe not in recipes.RECIPES:
        names = ", ".join(recipes.RECIPES)
        raise ValueError(f"there is no recipe {settings.recipe!r}: choose one of {names}")
    for name in ("image_size", "batch_size", "epochs", "learning_rate"):
        if not np.min(getattr(settings, name)) > 0:
            raise ValueError(f"{name} is {getattr(settings, name)}: it must be positive")
    i, k = settings.fold or (0, 2)
    if k < 2 or not 0 <= i < k:
        raise ValueError(f"fold is {i} {k}: give I K, a fold from 0 to K - 1, of 2 folds or more")
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"seed is {settings.seed}: it must be in [0, 2^63)")
    return configure(recipes.RECIPES[settings.recipe], settings, mask_format, image_format)


def configure(
    recipe: recipes.Recipe,
    settings: Settings,
    mask_format: MaskFormat = BINARY,
    image_format: ImageFormat = RGB,
) -> recipes.Recipe:
    """A recipe (built-in or your own) with the settings applied to its network.

    Raises:
        ValueError: the settings do not fit the recipe's network.
    """
    pack.describe(recipe.model)  # refuses a network that config.json could not hold
    recipe = recipes.configure(
        recipe,
        features=settings.features,
        encoder=settings.encoder,
        dtype=settings.dtype,
        num_classes=mask_format.channels,
        overlapping=mask_format.overlapping,
        upright=settings.upright,
        crop=None if settings.crop is None else settings.size,
    )
    check_size(settings, recipe.model)
    image = jnp.zeros((1, *settings.size, image_format.channels))
    jax.eval_shape(recipe.model.init, jax.random.key(0), image)
    return recipe


def check_size(settings: Settings, model: UNet) -> None:
    """Raise ValueError if the network does not take images of the settings' size."""
    name, stride = "image_size" if settings.crop is None else "crop", model.stride
    if any(side < 1 or side % stride for side in settings.size):
        raise ValueError(f"{name} {settings.image_size} is not a multiple of {stride}")
    if set(settings.size) == {stride} and model.norm in ("instance", 1):
        raise ValueError(
            f"{name} {settings.image_size} leaves one pixel in the bottleneck, and instance norm "
            f"turns a single pixel into 0: use at least {2 * stride}, or fewer features"
        )


def build(settings: Settings, recipe: recipes.Recipe, n_images: int) -> recipes.Training:
    """Build a recipe for a number of training images."""
    steps = settings.epochs * -(-n_images // settings.batch_size)
    return recipes.build(recipe, learning_rate=settings.learning_rate, steps=steps)


def abstract_state(training: recipes.Training, channels: int = 3) -> train.TrainState:
    """Shapes and types of a run's state, with images of so many channels."""
    return jax.eval_shape(partial(_create, training, channels), jax.random.key(0))


def create_state(
    settings: Settings,
    recipe: recipes.Recipe,
    training: recipes.Training,
    key: jax.Array,
    channels: int = 3,
) -> train.TrainState:
    """The state of a new run.

    Raises:
        ValueError, OSError: `init` holds no run, or a run of another network, or several.
        ModuleNotFoundError: the encoder's weights are not installed.
    """
    state, encoder = _create(training, channels, key), recipe.model.encoder
    if settings.init is not None:
        trained = load_model(settings.init)
        network = trained.network("--init")
        try:
            state = train.start_from(state, training.tx, trained.variables)
        except ValueError as error:
            features = " ".join(map(str, network.features))
            needed = f"--recipe {trained.settings.recipe} --features {features}"
            if network.encoder is not None:
                needed += f" --encoder {network.encoder.variant}"
            if trained.image_format.channels != channels:
                needed += f" --channels {trained.image_format.channels}"
            raise ValueError(f"--init {settings.init} needs {needed}: {error}") from error
    elif recipe.imagenet:
        assert encoder is not None
        variables = with_imagenet(state.variables, encoder.variant)
        state = train.start_from(state, training.tx, variables)
    # Committed to its device like a restored state, or the step would be compiled again after a
    # restart.
    return jax.device_put(state, jax.local_devices()[0])


def _create(training: recipes.Training, channels: int, key: jax.Array) -> train.TrainState:
    shape = (1, training.model.stride, training.model.stride, channels)
    return train.create_train_state(training.model, training.tx, key, shape)


def to_json(
    settings: Settings,
    places: Places,
    recipe: recipes.Recipe,
    fingerprints: dict[str, str],
    mask_format: MaskFormat = BINARY,
    image_format: ImageFormat = RGB,
) -> dict[str, Any]:
    """The content of config.json: `DETERMINES`, and places, device and versions."""
    versions = {"python": platform.python_version(), "flax-unet": flax_unet.__version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout, not installed
            versions[name] = metadata.version(name)
    device, model = jax.devices()[0], recipe.model
    resolved = {
        "features": model.features,
        "encoder": None if model.encoder is None else model.encoder.variant,
    }
    content = {
        "settings": asdict(settings) | resolved,
        "model": pack.describe(model),
        "training": recipes.describe(recipe),
        "data": fingerprints,
        "masks": formats.to_json(mask_format),
        "images": images.to_json(image_format),
        "places": asdict(places),
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "versions": versions,
    }
    return _jsonable(content)


def _jsonable(content: dict[str, Any]) -> dict[str, Any]:
    """The content as it is read back: lists for tuples, text for paths."""
    return json.loads(json.dumps(content, default=str))


def read_config(workdir: Path) -> dict[str, Any]:
    """The config.json of a run, in the current format.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: there is no run in this workdir")
    try:
        content = upgrade(json.loads(file.read_text()))
        sections = *DETERMINES, "places", "versions"
        whole = all(isinstance(content[name], dict | NoneType) for name in sections)
        if whole and "device" in content:
            return content
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    remedy = "choose another --workdir"
    if checkpoint.exists(workdir / "checkpoints"):
        remedy = "if it is yours, remove it and run the training again: it is written again"
    raise ValueError(f"{file} is damaged or not of a run: {remedy}")


def recorded_config(workdir: Path) -> dict[str, Any]:
    """The config.json of a run; if that is missing or empty, what the checkpoint has of it.

    Raises:
        FileNotFoundError, ValueError: as `read_config`.
        CheckpointError: no checkpoint can be read.
    """
    file = workdir / "config.json"
    if file.is_file() and file.read_bytes().strip():
        return read_config(workdir)
    saved = checkpoint.read_progress(workdir / "checkpoints").get("config")
    if saved is None:  # before version 0.3.0
        return read_config(workdir)
    # One place, so that Python shows it once in a program.
    warnings.warn(f"{file} is missing or empty: written again from the checkpoint", stacklevel=1)
    return upgrade(saved)


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Convert a config.json of an older version to the current format."""
    content = _from_0_1_0(content) if "config" in content else dict(content)
    defaults = {
        "settings": _jsonable(asdict(Settings())),
        "model": _jsonable(pack.describe(UNet())),
        "training": {"class_weight": None},
        "places": _jsonable(asdict(Places(Path()))) | {"split_by": "name"},
        "masks": {},  # not recorded before version 0.3.0
        "images": images.to_json(RGB),
    }
    for section in defaults.keys() & content.keys() | {"masks", "images"}:
        content[section] = defaults[section] | content.get(section, {})
    return content


def _from_0_1_0(content: dict[str, Any]) -> dict[str, Any]:
    """Convert a config.json of version 0.1.0 to the format of version 0.2.0."""
    content = dict(content)
    settings, places, old = content.pop("config"), content.pop("free"), content["training"]
    pretrained = settings["recipe"] == "pretrained"
    optimizer = {"name": "Adam"}
    if values := old.get("optimizer"):
        optimizer = {
            "name": "AdamW",
            "warmup": values["rise"],
            "clip": values["clip"],
            "weight_decay": values["decay"],
            "average_decay": values["average"],
            "encoder_rate": old.get("encoder_rate", 1.0),
        }
    augments = ("random_affine", "random_colour", "random_blur", "random_noise")
    model = pack.describe(pack.build(content["model"])) if "model" in content else {}
    return content | {
        "settings": settings
        | {"epochs": places["epochs"], "encoder": settings.get("encoder") if pretrained else None},
        "model": _jsonable(model),
        "training": {
            "loss": old["loss"],
            "augment": dict(zip(augments, old.get("augment") or (), strict=False)),
            "optimizer": optimizer,
            "imagenet": pretrained,
        },
        "places": {name: value for name, value in places.items() if name != "epochs"},
    }


def from_json(content: dict[str, Any], workdir: Path) -> tuple[Settings, Places]:
    """The settings and places in a config.json.

    Raises:
        KeyError, TypeError, ValueError: it is of another version.
    """
    settings, places = dict(content["settings"]), dict(content["places"])
    settings["features"] = tuple(settings["features"])
    settings["init"] = settings["init"] and Path(settings["init"])
    for name in ("image_size", "crop", "class_weights", "fold"):
        if isinstance(settings[name], list):
            settings[name] = tuple(settings[name])
    for name in ("kvasir_zip", "images", "masks", "split_file", "data_dir"):
        places[name] = places[name] and Path(places[name])
    places["workdir"] = workdir
    return Settings(**settings), Places(**places)


def check_workdir(
    workdir: Path, new: dict[str, Any], save_every: int = 1
) -> tuple[dict[str, Any], str]:
    """Compare the run about to start with what the workdir holds; nothing is written.

    Args:
        workdir: an empty or missing folder, or the folder of the same run.
        new: from `to_json`.
        save_every: epochs from one checkpoint to the next.

    Returns:
        The config.json to write, and the differences in versions, device and places, as text.

    Raises:
        ValueError: the workdir holds a run that computes something else (the message lists the
            differences), or files of something else.
    """
    if not checkpoint.exists(workdir / "checkpoints"):
        _check_unused(workdir, save_every)
        return new, ""
    old, changes = recorded_config(workdir), {}
    for section in DETERMINES:
        if old[section]:
            changes |= _differences(old[section], new[section])
    for split in changes.keys() & new["data"].keys():
        changes[f"pictures of the {split} split"] = changes.pop(split)
    if not getattr(recipes, new["training"]["optimizer"]["name"]).fixed_length:
        changes.pop("epochs", None)
    if changes.keys() == {"epochs"}:
        raise ValueError(
            f"{workdir} holds a run with other settings ({_as_text(changes)}), whose learning rate "
            "falls over all epochs: to train on, use --init with it and another --workdir"
        )
    if changes:
        raise ValueError(
            f"{workdir} holds a run with other settings ({_as_text(changes)}): choose another "
            "--workdir, or use the same settings to resume it"
        )
    for section in ("versions", "places"):
        changes |= _differences(old[section], new[section])
    changes |= _differences({"device": old["device"]}, {"device": new["device"]})
    kept = {key: old[key] for key in ("versions", "device", "terms") if key in old}
    return new | kept, _as_text(changes)


def check_writable(folder: Path) -> None:
    """Find out, without writing, that a folder cannot be written to or made.

    Raises:
        OSError: it cannot; the message says why.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} is read-only: choose another folder than {folder}")


def check_no_run(folder: Path) -> None:
    """Raise ValueError if a folder for a model is the workdir of a run or of a cross-validation."""
    if (folder / "config.json").exists() or (folder / CROSS_VALIDATION).exists():
        raise ValueError(f"{folder} is the workdir of a run: choose another folder")


def _check_unused(workdir: Path, save_every: int) -> None:
    if (workdir / "model.json").exists():
        raise ValueError(f"{workdir} holds an exported model: choose another --workdir")
    if (workdir / CROSS_VALIDATION).exists():
        raise ValueError(f"{workdir} holds a cross-validation: choose another --workdir")
    file, allowed = workdir / "metrics.jsonl", 0
    if (workdir / "config.json").exists():
        read_config(workdir)
        # A run may be killed before its second checkpoint, while the first is being saved.
        allowed = 2 * save_every
    if file.exists() and len(file.read_bytes().splitlines()) > allowed:
        raise ValueError(f"{file} has no checkpoint to resume from: choose another --workdir")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} where they differ."""
    pairs = {key: (old.get(key), new.get(key)) for key in old | new}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _as_text(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Lock a workdir for the duration of the block.

    The folder itself is locked, not a file in it, which somebody could remove. It is a lock of the
    operating system: between machines that share the folder it holds only if their file system
    passes `flock` on, which NFS and Lustre do or not as they are mounted. Windows has none.

    Of several processes the first one locks it, for all of them.

    Yields:
        A function that raises FileNotFoundError if the folder was moved or removed meanwhile.

    Raises:
        ValueError: another process trains in it.
    """
    with contextlib.ExitStack() as stack:
        with processes.together():
            if fcntl is not None and processes.index() == 0:
                stack.callback(os.close, folder := os.open(workdir, os.O_RDONLY))
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(
                        f"another process is training in {workdir}: wait, or choose another "
                        "--workdir"
                    ) from error
                except OSError as error:
                    warnings.warn(
                        f"{workdir} cannot be locked ({error}): train only once in it at a time",
                        stacklevel=3,
                    )
        if processes.index() > 0:
            yield lambda: None
            return
        before = workdir.stat()

        def check() -> None:
            if not (workdir.is_dir() and os.path.samestat(before, workdir.stat())):
                raise FileNotFoundError(
                    f"{workdir} was moved or removed during the training: put it back, and run the "
                    "same command again to resume"
                )

        yield check


def read_history(
    workdir: Path, epochs: int, saved: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Read the first `epochs` lines of metrics.jsonl and remove later ones.

    A run that was killed before it saved a checkpoint leaves later lines.

    Args:
        workdir: of the run.
        epochs: how many are done.
        saved: these lines as the checkpoint has them, since version 0.3.0. A file that differs is
            written again, with a warning.

    Raises:
        ValueError: a line is damaged, missing or of another epoch, and there is no `saved`.
    """
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().decode(errors="replace").splitlines() if file.exists() else []
    history = [parse_line(line) for line in lines[:epochs]]
    wrong = [
        f"line {i} is not that of epoch {i}"
        for i, line in enumerate(history, 1)
        if line.get("epoch") != i or (saved is not None and line != saved[i - 1])
    ]
    if len(history) < epochs:
        wrong.append(f"it has {len(history)} lines, and {epochs} epochs are done")
    if wrong and saved is None:
        raise ValueError(
            f"{file} is damaged ({wrong[0]}): restore it from a copy, or start from this run's "
            f"parameters with --init {workdir} and another --workdir"
        )
    if wrong:
        warnings.warn(f"{file}: {wrong[0]}; written again from the checkpoint", stacklevel=2)
    history = history if saved is None else saved
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in history))
    return history


def parse_line(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} if it is none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace a file in one move, so that a killed run leaves the old one or the new one.

    What is moved is on the disk already, so that a power loss does not leave an empty file.
    """
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        sync(stream)
    part.replace(file)


def sync(stream: IO) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def terms_of(settings: Settings) -> str:
    """The terms of the weights of a new run, for its config.json: of its pictures and of `init`.

    Raises:
        As `load_model`.
    """
    inherited = "" if settings.init is None else load_model(settings.init).terms
    return inherited or _terms_of_data(settings)


def _terms_of_data(settings: Settings) -> str:
    return TERMS if settings.dataset == "kvasir_seg" else ""


class Trained(NamedTuple):
    """A trained model and its origin."""

    settings: Settings  # of an ensemble those of its first member, and so on
    places: Places
    model: UNet | predict.Ensemble
    variables: Any  # what `model.apply` takes: a dict, of an ensemble a tuple of them
    loss_fn: train.Loss
    step: int
    fingerprints: dict[str, str]  # of the splits
    mask_format: MaskFormat | None  # of the masks it was trained on; None if it is not recorded
    image_format: ImageFormat
    checkpoint: str  # best or latest
    config: dict[str, Any]  # config.json

    @property
    def terms(self) -> str:
        """Under which terms the weights may be used, if they are not yours alone; or "".

        Those of the pictures of this run and of the one that it started from, see `terms_of`.
        """
        return self.config.get("terms") or _terms_of_data(self.settings)

    def network(self, what: str) -> UNet:
        """The network, for `what`, which takes no ensemble.

        Raises:
            ValueError: this is an ensemble.
        """
        if isinstance(self.model, predict.Ensemble):
            raise ValueError(
                f"{what} takes one network, and this is an ensemble of {len(self.model.models)}: "
                f"use one of them, such as {self.places.workdir}"
            )
        return self.model

    def predictor(
        self,
        *,
        flips: bool = False,
        window: int | tuple[int, int] | None = None,
        backend: Literal["jax", "onnx"] = "jax",
        **tiled: Any,
    ) -> tuple[Any, tuple[int, int] | None]:
        """The model as it predicts, and the size to which it wants images resized, if it does.

        Args:
            flips: whether to average over flips, see `predict.Mirrored`.
            window: of `predict.Tiled`, which takes images at their own size; by default the crops'
                size if the model was trained on some, else images are resized as in training.
            backend: what computes the network; onnx is ONNX Runtime, on the CPU.
            tiled: more arguments of `predict.Tiled`.

        Raises:
            ValueError: the window does not fit the model, or onnx is asked for of an ensemble.
            ModuleNotFoundError: ONNX Runtime is not installed.
        """
        model: Any = self.model
        if backend == "onnx":
            network, channels = self.network("the backend onnx"), self.image_format.channels
            content = onnx_file.to_onnx(network, self.variables, channels=channels)
            model = onnx_file.OnnxModel(content.SerializeToString())
        model = predict.Mirrored(model, self.settings.upright) if flips else model
        window = self.settings.crop if window is None else window
        if window is None:
            return model, self.settings.size
        height, width = (window, window) if isinstance(window, int) else window
        tiled.setdefault("batch_size", min(4, max(1, PIXELS // max(1, height * width))))
        return predict.Tiled(model, window, **tiled), None


def load_model(folder: str | os.PathLike, which: checkpoint.Which = "best") -> Trained:
    """The model of a run, or an exported model. Neither recipe nor optimizer is needed.

    Args:
        folder: the workdir of a run, the folder of an exported model, or the name of a model that
            comes with the package: `pretrained` or `strong`, see `zoo`. Of the folder of a
            finished cross-validation the model is the `ensemble` of its folds.
        which: checkpoint of a run, `best` by validation Dice or `latest`.

    Raises:
        FileNotFoundError: the folder holds neither a run nor a model, or does not exist.
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: the config.json or the model cannot be read, the folder holds several of these,
            or the name is also that of a folder here.
    """
    folder = zoo.folder(folder)
    if (folder / CROSS_VALIDATION).is_file():
        if (folder / "model.json").exists():
            raise ValueError(
                f"{folder} holds a cross-validation and an exported model: move one of them away"
            )
        return ensemble([load_model(fold, which) for fold in folds_in(folder)])
    packed = pack.load(folder) if (folder / "model.json").is_file() else None
    if packed is not None and (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run and an exported model: move one of them away")
    content = read_config(folder) if packed is None else packed.about
    try:
        content = upgrade(content)
        settings, places = from_json(content, folder)
        training, fingerprints = content["training"], content["data"]
        loss_fn = recipes.loss_of(training["loss"], training.get("class_weight"))
        masks = content.get("masks") and formats.from_json(content["masks"])
        model = pack.build(content["model"]) if packed is None else packed.model
        if packed is not None and packed.image_size != settings.image_size:
            raise ValueError(f"its image_size is {packed.image_size} and {settings.image_size}")
        image_format = images.from_json(content["images"])
        image = jnp.zeros((1, model.stride, model.stride, image_format.channels))
        abstract = jax.eval_shape(model.init, jax.random.key(0), image)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is of another version or program: {error}") from error
    if packed is None:
        with checkpoint.open_checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            variables, step = checkpoint.restore_variables(checkpoints, abstract, which)
    else:
        variables, step = jax.device_put(packed.variables), content.get("step", 0)
        which = content.get("checkpoint", which)
    return Trained(
        settings,
        places,
        model,
        variables,
        loss_fn,
        step,
        fingerprints,
        masks or None,
        image_format,
        which,
        content,
    )


def folds_in(folder: Path) -> list[Path]:
    """The workdirs of the folds of a finished cross-validation.

    Raises:
        ValueError: its cross-validation.json is damaged, or a fold was trained further since.
    """
    file = folder / CROSS_VALIDATION
    try:
        folds = json.loads(file.read_text())["folds"]
        steps = {folder / fold["workdir"]: fold["step"] for fold in folds}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: run the cross-validation again") from error
    if not steps:
        raise ValueError(f"{file} is damaged: it has no folds: run the cross-validation again")
    for fold, step in steps.items():  # `load_model` refuses a fold without checkpoints
        if checkpoint.exists(fold / "checkpoints"):
            latest = checkpoint.latest_step(fold / "checkpoints")
            if latest not in (None, step):
                raise ValueError(
                    f"{fold} is at step {latest}, and the table in {file} is of step {step}: run "
                    "the cross-validation again until it ends"
                )
    return [*steps]


def ensemble(members: Sequence[Trained]) -> Trained:
    """Several models that were trained on the same kind of pictures as one, see `predict.Ensemble`.

    All else is that of the first one, `step` the largest, and `terms` those of any.

    Raises:
        ValueError: there are none; or they take other images, or predict other classes.
    """
    models = predict.Ensemble(tuple(trained.model for trained in members))
    first = members[0]
    for trained in members[1:]:
        for what in ("image_format", "mask_format"):
            if getattr(trained, what) != getattr(first, what):
                raise ValueError(
                    f"{trained.places.workdir} and {first.places.workdir} have other "
                    f"{what.replace('_format', 's')} ({getattr(trained, what)}, "
                    f"{getattr(first, what)}): train all with the same --value-range and --classes"
                )
        ours, theirs = trained.settings, first.settings
        for what in ("image_size", "crop", "upright"):
            if getattr(ours, what) != getattr(theirs, what):
                raise ValueError(
                    f"{trained.places.workdir} and {first.places.workdir} have other {what}: "
                    f"{getattr(ours, what)} and {getattr(theirs, what)}"
                )
    workdirs = [str(trained.places.workdir) for trained in members]
    terms = next(filter(None, (trained.terms for trained in members)), "")
    return first._replace(
        model=models,
        variables=tuple(trained.variables for trained in members),
        step=max(trained.step for trained in members),
        config=first.config | {"ensemble": workdirs, "terms": terms},
    )
