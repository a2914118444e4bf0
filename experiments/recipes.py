"""What a run is: its configuration, the recipe and data that follow from it, its config.json."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_unet import augment, checkpoint, data, losses, train
from flax_unet.model import UNet

#: Fields that say where things are or for how long to go on, not what is computed.
FREE = ("workdir", "kvasir_zip", "images", "masks", "data_dir", "epochs")


@dataclass(frozen=True)
class Config:
    """Train a U-Net, or go on with the run in the workdir."""

    workdir: Path
    """Folder of the run: config.json, metrics.jsonl, checkpoints, pictures."""
    recipe: Literal["unet", "article"] = "unet"
    """unet: the article's widths, group norm and flips; article: the article's network."""
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
    features: tuple[int, ...] = UNet.features
    """Channels of each level of the network, the last being the bottleneck's."""
    image_size: int = 256
    """Height and width to which pictures are resized, a multiple of the network's stride, 32."""
    batch_size: int = 8
    """Images a step."""
    epochs: int = 100
    """Passes over the training split; more may be asked for later."""
    learning_rate: float = 1e-3
    """Of Adam."""
    seed: int = 0
    """Of the initial parameters, the order of the images, dropout and augmentation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32."""


class Recipe(NamedTuple):
    """How to train."""

    model: UNet
    tx: optax.GradientTransformation
    loss_fn: train.Loss
    augment: train.Augment | None


def keras_adam(learning_rate: float) -> optax.GradientTransformation:
    """Adam with Keras' defaults.

    Keras adds its epsilon before the second moment is corrected, optax after (the "epsilon hat" of
    Kingma, Ba, ICLR 2015, section 2). In the first steps that is 30 times as much, and most
    gradients of a U-Net are smaller than it.
    """

    def epsilon(count: jax.Array) -> jax.Array:
        return 1e-7 / jnp.sqrt(1 - 0.999 ** (count + 1))

    return optax.inject_hyperparams(optax.adam)(learning_rate, b1=0.9, b2=0.999, eps=epsilon)


def make_recipe(config: Config) -> Recipe:
    """The recipe that a configuration names.

    Raises:
        ValueError: a number is out of its range.
    """
    for field in ("image_size", "batch_size", "epochs", "learning_rate"):
        if not getattr(config, field) > 0:
            raise ValueError(f"{field} is {getattr(config, field)}: it must be positive")
    rates = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3)  # the article's, from the outermost level inwards
    model = UNet(
        features=config.features,
        groups=None if config.recipe == "article" else 8,
        dropout=rates[: len(config.features)],
        dtype=jnp.dtype(config.dtype),
    )
    if config.image_size % model.stride:
        raise ValueError(f"image_size {config.image_size} is no multiple of {model.stride}")
    tx = keras_adam(config.learning_rate)
    if config.recipe == "article":
        return Recipe(model, tx, losses.bce, None)
    return Recipe(model, tx, losses.bce, augment.random_flips)


def abstract_state(config: Config) -> train.TrainState:
    """Shapes and types of the run's state."""
    model, tx, *_ = make_recipe(config)
    create = partial(
        train.create_train_state, model, tx, image_shape=(1, model.stride, model.stride, 3)
    )
    return jax.eval_shape(create, jax.random.key(0))


def open_sources(config: Config) -> dict[str, Sequence[dict[str, Any]]]:
    """The splits of the configured data set, each a source for `flax_unet.data`.

    Raises:
        ValueError: the data cannot be used, or a flag that it needs is missing.
    """
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


def load_split(config: Config, split: str) -> data.Arrays:
    """One split as arrays, from the cache if they were made before.

    Raises:
        ValueError: as `open_sources`, or there is no such split, or it is empty.
    """
    sources = open_sources(config)
    if split not in sources:
        name = f"{config.dataset}/{config.protocol}"
        raise data.DataError(f"{name} has no split {split!r}: choose one of {', '.join(sources)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "flax_unet"
    return data.load(sources[split], config.image_size, cache=cache)


def to_json(config: Config, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What config.json holds."""
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    fields["features"] = list(config.features)  # as JSON reads it again
    packages = (
        "flax-unet",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
        "pillow",
    )
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "not installed"
    device = jax.devices()[0]
    return {
        "config": {k: v for k, v in fields.items() if k not in FREE},
        "data": fingerprints,
        "free": {k: v for k, v in fields.items() if k in FREE},
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "versions": versions,
    }


def read_config(workdir: Path) -> Config:
    """The configuration of the run in a workdir.

    Raises:
        FileNotFoundError: there is no run.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise checkpoint.CheckpointError(f"{file} is missing: there is no run in this workdir")
    stored = json.loads(file.read_text())
    fields = stored["config"] | stored["free"]
    paths = ("workdir", "kvasir_zip", "images", "masks", "data_dir")
    fields["features"] = tuple(fields["features"])
    fields |= {k: Path(fields[k]) for k in paths if fields[k] is not None}
    return Config(**fields | {"workdir": workdir})


def write_atomically(file: Path, text: str) -> None:
    """Replace a file in one move, so that a killed run leaves the old one or the new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


def restore_run(
    workdir: Path, which: Literal["best", "latest"]
) -> tuple[Config, UNet, dict[str, Any], int]:
    """The configuration, the model, its variables and their step, of the run in a workdir.

    Raises:
        CheckpointError: there is no run, or it has no checkpoint yet.
    """
    config = read_config(workdir)
    with checkpoint.open_checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoint.restore(checkpoints, abstract_state(config), which)
    return config, make_recipe(config).model, state.variables, int(state.step)
