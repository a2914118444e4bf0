"""Segment pictures: `flax-unet predict --workdir runs/ --out OUT INPUT...`.

Writes NAME-mask.png and NAME-overlay.png for each picture, at its own size. A mask has 0 and 255,
or the indices of the classes with a palette; of overlapping classes there is one mask for each,
NAME-mask-CLASS.png.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from flax_unet import data, draw, images, pictures, predict, runs
from flax_unet.classes import decide
from flax_unet.formats import BINARY
from flax_unet.pictures import DataError
from flax_unet_cli import program
from flax_unet_cli.sources import RangeFlags


@dataclass(frozen=True)
class Options:
    """Flags of predict."""

    workdir: Annotated[Path, tyro.conf.arg(aliases=["--model"])]
    """Workdir of the run whose model is used, or folder of an exported model."""
    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, and folders of pictures."""
    out: Path = Path("predictions")
    """Folder for the results."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""
    threshold: float = 0.5
    """Probability above which a pixel is in the mask (of one class)."""
    ranges: RangeFlags = RangeFlags()
    flips: bool = False
    """Average the prediction over the 4 flips of each image, at 4 times the work; over the 2 flips
    left to right for a model trained with --upright."""


def plan(
    inputs: tuple[Path, ...], out: Path, masks: Sequence[str] = ("mask",)
) -> dict[Path, list[Path]]:
    """{picture: files of its masks and of its overlay} for the files and folders given.

    Args:
        inputs: files and folders.
        out: folder of the results.
        masks: what the names of the masks end with.

    Raises:
        DataError: there are none, or a result would overwrite a picture or another result.
    """
    files = [f for path in inputs for f in (data.list_pictures(path) if path.is_dir() else [path])]
    if not files:
        raise DataError("no pictures: give files, or folders with pictures")
    results = {f: [out / f"{f.stem}-{end}.png" for end in (*masks, "overlay")] for f in files}
    owners = {file.absolute(): file for file in results}
    for file, planned in results.items():
        for result in planned:
            if (other := owners.setdefault(result.absolute(), file)) != file:
                raise DataError(
                    f"{result}, a result of {file}, would overwrite {other} or a result of it: "
                    "rename one, or use another --out"
                )
    return results


def run(options: Options) -> int:
    """Segment every picture; return 1 if some could not be read."""
    if not 0 <= options.threshold < 1:
        raise ValueError(f"threshold is {options.threshold}: it must be in [0, 1)")
    results = plan(options.inputs, options.out)
    trained = runs.load_model(options.workdir, options.checkpoint)
    upright = trained.settings.upright
    model = predict.Mirrored(trained.model, upright) if options.flips else trained.model
    overlapping, mask_format = trained.model.overlapping, trained.mask_format or BINARY
    if overlapping:
        masks = [f"mask-{name}" for name in mask_format.learned]
        results = plan(options.inputs, options.out, masks)
    image_format = options.ranges.apply(trained.image_format)
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for file, (*mask_files, overlay_file) in tqdm(results.items(), unit=" pictures", leave=False):
        try:
            content = pictures.open_content(file, str(file))
            image = images.read(content, image_format, str(file))
        except DataError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            failures += 1
            continue
        proba = predict.predict_resized(model, trained.variables, image, trained.settings.size)
        mask = decide(proba, threshold=options.threshold, overlapping=overlapping)
        if trained.model.num_classes == 1:
            overlay = draw.overlay(image, (proba * mask)[..., 0])
        else:
            overlay = draw.class_overlay(image, draw.flat(mask), draw.palette(256))
            overlay = np.concatenate([overlay, draw.legend(mask_format.names, overlay.shape[1])])
        for i, mask_file in enumerate(mask_files):
            if overlapping or trained.model.num_classes == 1:
                result = Image.fromarray(mask[..., i] * np.uint8(255))
            else:
                result = Image.fromarray(mask[..., 0], "P")
                result.putpalette(draw.palette(256).tobytes())
            result.save(mask_file)
        Image.fromarray(overlay).save(overlay_file)
    print(f"{len(results) - failures} of {len(results)} pictures segmented into {options.out}")
    return min(failures, 1)


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
