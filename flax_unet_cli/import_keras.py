"""Bring a network from Keras: `flax-unet import-keras FILE --out models/NAME`.

The file is the tutorial's network as Keras saved it: .keras, .weights.h5 or .h5. predict, evaluate
and train --init take the folder that is written.

example:
  flax-unet import-keras unet.keras --out models/mine
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from flax_unet import keras_file, pack, runs
from flax_unet.model import ARTICLE
from flax_unet_cli import program


@dataclass(frozen=True)
class Options:
    """Write model.json and weights.npz: the network with the weights in the file."""

    file: tyro.conf.Positional[Path]
    """File of Keras."""
    out: Path
    """Folder to create."""
    image_size: int | tuple[int, int] = 256
    """Height and width of the images that it was trained on, one number for squares."""
    features: tuple[int, ...] = ARTICLE.features
    """Channels per level, if they are not the tutorial's; the last is the bottleneck."""
    divisor: float | None = None
    """What the network in Keras divides pixel values from 0 to 255 by, by default 256 as in the
    tutorial; 255 if it took images in [0, 1]. Needed if the file shows that no layer divides."""


def run(options: Options) -> None:
    runs.check_no_run(options.out)
    runs.check_writable(options.out)
    settings = runs.Settings(
        recipe="article",
        dataset="folder",  # which pictures it was trained on is not known
        features=options.features,
        image_size=options.image_size,
    )
    recipe = runs.recipe_of(settings)
    variables = keras_file.read_weights(options.file, recipe.model, divisor=options.divisor)
    about = runs.to_json(settings, runs.Places(Path()), recipe, fingerprints={})
    about["masks"] = {}  # not known either
    about["places"]["workdir"] = None
    about |= {"step": 0, "checkpoint": "best", "keras": options.file.name}
    packed = pack.Packed(recipe.model, variables, options.image_size, about)
    pack.save(options.out, packed, kernels=np.float32)
    megabytes = (options.out / "weights.npz").stat().st_size / 1e6
    print(f"written: {options.out}, {megabytes:.1f} MB")


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
