"""Segment pictures: `flax-unet predict --workdir runs/ --out OUT INPUT...`.

Writes NAME-mask.png and NAME-overlay.png for each picture, at its own size. A mask has 0 and 255,
or the indices of the classes with a palette; of overlapping classes there is one mask for each,
NAME-mask-CLASS.png.
"""

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import PIL
import tyro
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from flax_unet import data, draw, images, pictures, predict, runs
from flax_unet.classes import decide
from flax_unet.formats import BINARY
from flax_unet.images import ImageFormat
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
    max_memory: float = 1.5
    """GB that the program may take. Pictures that need more are skipped."""


#: Written into each result, which a later run may overwrite; nothing else is.
MARK = "Software", "flax-unet predict"
#: Bytes of the program itself.
PROGRAM = 0.55e9
#: Rows of a picture that are drawn at a time.
ROWS = 256


def plan(
    inputs: tuple[Path, ...], out: Path, masks: Sequence[str] = ("mask",)
) -> dict[Path, list[Path]]:
    """{picture: files of its masks and of its overlay} for the files and folders given.

    Args:
        inputs: files and folders.
        out: folder of the results.
        masks: what the names of the masks end with.

    Raises:
        DataError: there are none, or a result would overwrite a picture, another result, or a file
            that an earlier run did not write.
    """
    files = [f for path in inputs for f in (data.list_pictures(path) if path.is_dir() else [path])]
    if not files:
        raise DataError("no pictures: give files, or folders with pictures")
    results = {f: [out / f"{f.stem}-{end}.png" for end in (*masks, "overlay")] for f in files}
    taken, owners = {file.resolve(): file for file in results}, {}
    for file, planned in results.items():
        for result in planned:
            place = result.resolve()
            other = taken.get(place, owners.setdefault(place, file))
            if place in taken or other != file:
                raise DataError(
                    f"{result}, a result of {file}, would overwrite {other} or a result of it: "
                    "rename one, or use another --out"
                )
            if not _is_ours(result):
                raise DataError(
                    f"{result} exists, and is no result of this program: move it, or use another "
                    "--out"
                )
    return results


def _is_ours(result: Path) -> bool:
    """Whether there is no such file, or one that this program wrote."""
    try:
        with Image.open(result, formats=["PNG"]) as picture:
            return picture.info.get(MARK[0]) == MARK[1]
    except FileNotFoundError:
        return True
    except (PIL.UnidentifiedImageError, ValueError):
        return False
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG  # which is said when it is written


def _save(picture: Image.Image, file: Path) -> None:
    """Write a result in one move: none is ever half written."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*MARK)
    part = file.with_name(f".predict-{os.getpid()}.part")
    try:
        picture.save(part, "PNG", pnginfo=mark)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def memory_of(size: tuple[int, int], image_format: ImageFormat, classes: int) -> float:
    """Bytes that the prediction of a picture takes at most, measured."""
    values = image_format.channels * (1 if image_format.raw else 12)
    return PROGRAM + size[0] * size[1] * (13 + values + 4 * classes)


def run(options: Options) -> int:
    """Segment every picture; return 1 if some could not be read."""
    if not 0 <= options.threshold < 1:
        raise ValueError(f"threshold is {options.threshold}: it must be in [0, 1)")
    runs.check_writable(options.out)
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
            content = pictures.open_content(file, str(file), decode=False)
            needed = memory_of(pictures.size_of(content), image_format, model.num_classes) / 1e9
            if needed > options.max_memory:
                raise DataError(
                    f"{file}: {' x '.join(map(str, pictures.size_of(content)))} pixels take "
                    f"{needed:.1f} GB: allow it with --max-memory {needed + 0.05:.1f}"
                )
            content = pictures.open_content(file, str(file))
            image = images.read(content, image_format, str(file))
            del content
            proba = predict.predict_resized(model, trained.variables, image, trained.settings.size)
            mask, overlay = decide_and_draw(image, proba, options.threshold, overlapping)
            del image, proba
            for i, mask_file in enumerate(mask_files):
                if overlapping or model.num_classes == 1:
                    result = Image.fromarray(mask[..., i] * np.uint8(255))
                else:
                    result = Image.fromarray(mask[..., 0], "P")
                    result.putpalette(draw.palette(256).tobytes())
                _save(result, mask_file)
            if model.num_classes > 1:
                legend = draw.legend(mask_format.names, overlay.shape[1])
                overlay = np.concatenate([overlay, legend])
            _save(Image.fromarray(overlay), overlay_file)
        except (DataError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
                raise
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            failures += 1
    print(f"{len(results) - failures} of {len(results)} pictures segmented into {options.out}")
    return min(failures, 1)


def decide_and_draw(
    image: np.ndarray, proba: np.ndarray, threshold: float, overlapping: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The mask that probabilities [H, W, K] predict, and an overlay [H, W, 3], strip by strip."""
    masks, overlays = [], []
    for top in range(0, len(image), ROWS):
        strip, p = image[top : top + ROWS], proba[top : top + ROWS]
        mask = decide(p, threshold=threshold, overlapping=overlapping)
        if proba.shape[-1] == 1:
            overlays.append(draw.overlay(strip, (p * mask)[..., 0]))
        else:
            overlays.append(draw.class_overlay(strip, draw.flat(mask), draw.palette(256)))
        masks.append(mask)
    return np.concatenate(masks), np.concatenate(overlays)


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
