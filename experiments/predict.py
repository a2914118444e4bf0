"""Segment pictures: `python experiments/predict.py --workdir runs/ --out OUT INPUT...`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from recipes import restore_run
from tqdm import tqdm

from flax_unet import data, draw, predict


@dataclass(frozen=True)
class Options:
    """Write NAME-mask.png (0 and 255) and NAME-overlay.png for each picture, at its own size."""

    workdir: Path
    """Folder of the run whose model is used."""
    out: Path
    """Folder for the results."""
    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, and folders of them."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""
    threshold: float = 0.5
    """Probability above which a pixel is in the mask."""


def list_pictures(inputs: tuple[Path, ...]) -> list[Path]:
    """The files named, and the pictures in the folders named.

    Raises:
        DataError: there are none, or two results would have one name.
    """
    files: list[Path] = []
    for path in inputs:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files += [f for f in inside if f.suffix.lower() in data.SUFFIXES] if inside else [path]
    if not files:
        raise data.DataError("no pictures: give files, or folders that hold some")
    stems: dict[str, Path] = {}
    for file in files:
        if (other := stems.setdefault(file.stem, file)) != file:
            raise data.DataError(f"{other} and {file} would both be {file.stem}-mask.png")
    return files


def run(options: Options) -> int:
    """Segment every picture; return how many could not be read."""
    files = list_pictures(options.inputs)
    config, model, variables, _ = restore_run(options.workdir, options.checkpoint)
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for file in tqdm(files, unit="picture", leave=False, disable=len(files) == 1):
        try:
            picture = data.to_rgb(data.open_picture(file, str(file)))
        except data.DataError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            failures += 1
            continue
        proba = predict.predict_picture(model, variables, picture, config.image_size)[..., 0]
        mask = proba > options.threshold
        Image.fromarray(mask).save(options.out / f"{file.stem}-mask.png")
        overlay = draw.overlay(np.asarray(picture), proba * mask)
        Image.fromarray(overlay).save(options.out / f"{file.stem}-overlay.png")
    print(f"{len(files) - failures} of {len(files)} pictures segmented into {options.out}")
    return failures


def main(args: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=args)
    try:
        return min(run(options), 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
