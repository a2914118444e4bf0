"""Segment pictures: `python experiments/predict.py --workdir runs/ --out OUT INPUT...`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from recipes import absolute, keep_compiled, restore_run
from tqdm import tqdm

from flax_unet import data, draw, predict


@dataclass(frozen=True)
class Options:
    """Write NAME-mask.png (0 and 255) and NAME-overlay.png for each picture, at its own size."""

    workdir: Annotated[Path, tyro.conf.arg(aliases=["--model"])]
    """Folder of the run whose model is used, or of an exported model."""
    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, and folders of them."""
    out: Path = Path("predictions")
    """Folder for the results."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""
    threshold: float = 0.5
    """Probability above which a pixel is in the mask."""
    flips: bool = False
    """Predict the mean over each picture and its mirror images: four times the work."""


def plan(inputs: tuple[Path, ...], out: Path) -> dict[Path, tuple[Path, Path]]:
    """{picture: (its mask's file, its overlay's)} of the files and folders named.

    Raises:
        DataError: there are none, or a result would be written over a picture or another result.
    """
    files = [f for path in inputs for f in (data.list_pictures(path) if path.is_dir() else [path])]
    if not files:
        raise data.DataError("no pictures: give files, or folders that hold some")
    results = {f: (out / f"{f.stem}-mask.png", out / f"{f.stem}-overlay.png") for f in files}
    taken = {file.absolute(): file for file in results}
    for file, pair in results.items():
        for result in pair:
            if (other := taken.setdefault(result.absolute(), file)) != file:
                raise data.DataError(
                    f"{result}, of {file}, is taken by {other}: rename one, or use another --out"
                )
    return results


def run(options: Options) -> int:
    """Segment every picture; return how many could not be read."""
    if not 0 <= options.threshold < 1:
        raise ValueError(f"threshold is {options.threshold}: it must be in [0, 1)")
    results = plan(options.inputs, options.out)
    config, model, variables, *_ = restore_run(options.workdir, options.checkpoint)
    model = predict.Mirrored(model) if options.flips else model
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for file, (mask_file, overlay_file) in tqdm(results.items(), unit="picture", leave=False):
        try:
            picture = data.to_rgb(data.open_picture(file, str(file)), str(file))
        except data.DataError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            failures += 1
            continue
        proba = predict.predict_picture(model, variables, picture, config.image_size)[..., 0]
        mask = proba > options.threshold
        Image.fromarray(mask * np.uint8(255)).save(mask_file)
        Image.fromarray(draw.overlay(np.asarray(picture), proba * mask)).save(overlay_file)
    print(f"{len(results) - failures} of {len(results)} pictures segmented into {options.out}")
    return failures


def main(args: list[str] | None = None) -> int:
    options = absolute(tyro.cli(Options, description=__doc__, args=args))
    keep_compiled()
    try:
        return min(run(options), 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
