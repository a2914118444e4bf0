"""What a data set holds, and what resizing costs it, before anything is trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from flax_unet.classes import IGNORE


class Facts(NamedTuple):
    """What one mask holds, at its own size and after resizing."""

    height: int
    width: int
    pixels: dict[str, int]  # by class index, at its own size; without pixels that do not count
    resized: dict[str, int]  # at the network's size
    objects: int  # connected regions of any class but the first, at its own size
    lost: int  # of them, those without a pixel after resizing
    needed: int  # about the height and width that would keep those; 0 if none is lost


def facts(mask: np.ndarray, resized: np.ndarray) -> Facts:
    """Compare a mask with its resized version.

    Args:
        mask: class indices and `IGNORE`, uint8 [H, W, 1]; or 0 and 1, [H, W, K], of the classes
            1 to K.
        resized: the same at the network's size.
    """
    height, width, channels = mask.shape
    pixels, kept, objects, lost, needed = _count(mask), _count(resized), 0, 0, 0
    for index in (int(i) for i in pixels if i != "0"):
        channel, value = (0, index) if channels == 1 else (index - 1, 1)
        there = mask[..., channel] == value
        rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        there = there[box]
        regions, n = ndimage.label(there)  # type: ignore[misc]
        objects += n
        if resized is mask or (n == 1 and str(index) in kept):  # the rest is slow
            continue
        enlarged = Image.fromarray(resized[..., channel])
        enlarged = enlarged.resize((width, height), Image.Resampling.NEAREST)
        still = np.asarray(enlarged)[box] == value
        number = np.bincount(regions[still], minlength=n + 1)[1:]
        boxes = ndimage.find_objects(regions)
        for y, x in (boxes[i] for i in np.flatnonzero(number == 0)):
            a, b = y.stop - y.start, x.stop - x.start
            lost, needed = lost + 1, max(needed, -(-height // a), -(-width // b))
    return Facts(height, width, pixels, kept, objects, lost, needed)


def _count(mask: np.ndarray) -> dict[str, int]:
    if mask.shape[-1] > 1:
        none = (mask != 1).all(-1) & (mask != IGNORE).any(-1)
        number = [np.count_nonzero(none), *(mask == 1).sum((0, 1)).tolist()]
    elif mask.max(initial=0) <= 1:  # several times as fast as a histogram
        ones = int(np.count_nonzero(mask))
        number = mask.size - ones, ones
    else:
        number = Image.fromarray(mask[..., 0]).histogram()[:IGNORE]
    return {str(i): int(n) for i, n in enumerate(number) if n}


def summarise(splits: Mapping[str, Sequence[Facts]], names: Sequence[str]) -> dict[str, Any]:
    """The summary of some splits, as JSON.

    Args:
        splits: {split: `Facts` of each picture}.
        names: of the classes.

    Returns:
        By split: number of pictures, sizes, each class' fraction of the pixels and number of
        pictures, masks that are empty, that became empty or lost objects, and the size that would
        keep them.
    """
    return {split: _summary(each, names) for split, each in splits.items()}


def _summary(each: Sequence[Facts], names: Sequence[str]) -> dict[str, Any]:
    pixels, pictures = Counter(), Counter()
    for one in each:
        pixels.update(one.pixels)
        pictures.update(one.pixels.keys())
    total = max(1, sum(one.height * one.width for one in each))
    sizes = Counter(f"{one.width}x{one.height}" for one in each)
    return {
        "pictures": len(each),
        "sizes": dict(sizes.most_common()),
        "classes": {
            name: {"fraction": pixels[str(i)] / total, "pictures": pictures[str(i)]}
            for i, name in enumerate(names)
        },
        "empty": sum(not one.pixels.keys() - {"0"} for one in each),
        "emptied": sum(bool(one.pixels.keys() - {"0"} - one.resized.keys()) for one in each),
        "objects": sum(one.objects for one in each),
        "objects_lost": sum(one.lost for one in each),
        "size_that_keeps_them": max((one.needed for one in each), default=0),
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary as a table of a few lines."""
    splits = list(summary)
    lines = [f"{'':<26}" + "".join(f"{split:>22}" for split in splits)]

    def row(title: str, cell: Any) -> None:
        lines.append(f"{title[:25]:<26}" + "".join(f"{cell(summary[s]):>22}" for s in splits))

    row("pictures", lambda s: s["pictures"])
    row("sizes", lambda s: next(iter(s["sizes"])) + (" and others" * (len(s["sizes"]) > 1)))
    for name in summary[splits[0]]["classes"]:
        row(
            name,
            lambda s, name=name: (
                f"{100 * s['classes'][name]['fraction']:.2f} % in {s['classes'][name]['pictures']}"
            ),
        )
    row("empty masks", lambda s: s["empty"])
    for name, values in summary[splits[0]]["classes"].items():
        if not values["pictures"]:
            lines.append(
                f"warning: no mask of {splits[0]} has a pixel of class {name}: it cannot be "
                "learned, and lowers the mean over the classes"
            )
    for split in splits:
        if lost := summary[split]["objects_lost"]:
            of, size = summary[split]["objects"], summary[split]["size_that_keeps_them"]
            lines.append(
                f"warning: {split}: {lost} of {of} objects vanish in resizing, and "
                f"{summary[split]['emptied']} masks lose a class; about --image-size {size} would "
                "keep them, or --crop, which resizes nothing"
            )
    return "\n".join(lines)
