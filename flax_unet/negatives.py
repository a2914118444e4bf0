"""Parts of pictures without an object: how often does a model claim one there?

    negatives = Negatives(source, mask_format, image_format)
    formats = negatives.mask_format, negatives.image_format
    batches = score(model, variables, negatives, size, *formats)
    summary(negatives, counts_of(batches))

Data sets of objects have one in each picture, so their scores do not say it. An object is a pixel
of any class but the first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from flax_unet import data, formats, metrics
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.metrics import Confusion
from flax_unet.parallel import map_all
from flax_unet.pictures import DataError

#: Least distance of a part from an object, as a fraction of the picture's diagonal.
MARGIN = 0.05
#: A longer part is cut: the longer side is at most so many times the shorter one.
LONGEST = 2
#: Shortest side of a part, as a fraction of the picture's shorter side.
SMALLEST = 0.25
#: Values below it, as a fraction of white, are the black beside an endoscope's round view.
DARK = 16 / 255
#: Parts consist of square cells, at most so many along the picture's longer side.
CELLS = 128
#: What counts as a claim: an area above these fractions of a part.
AREAS = 0, 0.001, 0.01, 0.05

#: Top, left, height and width.
Box = tuple[int, int, int, int]


class Negatives(Sequence[dict[str, Any]]):
    """A source of the largest part of each picture without an object; several threads may read it.

    `largest_part` says which part that is. Pictures without one are left out.

    Args:
        source: see `flax_unet.data`; all of its pictures are decoded here, and again when read.
        mask_format: what the values of its masks mean.
        image_format: channels and range of its images.

    Attributes:
        mask_format: what the values of the parts' masks mean: indices of the same classes.
        image_format: channels and range of the parts' images.
        without: how many pictures are left out.

    Raises:
        DataError: a picture is unusable, or all are left out.
    """

    def __init__(
        self, source: Sequence[dict[str, Any]], mask_format: MaskFormat, image_format: ImageFormat
    ):
        def look(i: int) -> Box | None:
            return largest_part(*data.decode_pair(source[i], mask_format, image_format))

        boxes = map_all(look, range(len(source)))
        self._parts = [(i, box) for i, box in enumerate(boxes) if box is not None]
        self._source, self._formats = source, (mask_format, image_format)
        self.without = len(boxes) - len(self._parts)
        if not self._parts:
            raise DataError(
                "no picture has a part without an object that is large enough and not black: "
                "leave out --negatives"
            )
        self.mask_format = formats.of_indices(mask_format)
        # Images that are no longer uint8 are in [0, 1] already.
        scaled = ImageFormat(image_format.channels, "floats", (0.0,), (1.0,))
        self.image_format = image_format if image_format.raw else scaled

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i: int) -> dict[str, Any]:  # type: ignore[override]
        k, (top, left, height, width) = self._parts[i]
        example = self._source[k]
        pair = data.decode_pair(example, *self._formats)
        image, mask = (x[top : top + height, left : left + width] for x in pair)
        separate = self.mask_format.separate
        return data.encode_pair(example["name"], image, mask, separate=separate)


def largest_part(image: np.ndarray, mask: np.ndarray) -> Box | None:
    """The largest upright rectangle of a picture without an object, in pixels.

    It has no pixel within `MARGIN` of the diagonal of an object, or of a pixel that does not count,
    and no black cell. Cells are squares of max(H, W) / `CELLS` pixels, rounded up.

    Args:
        image: uint8 [H, W, C], or float in [0, 1].
        mask: uint8 [H, W, 1] of class indices, or [H, W, K] of 0 and 1 for overlapping classes.

    Returns:
        None if it has a side below `SMALLEST` of the picture's shorter side.
    """
    height, width = mask.shape[:2]
    objects = (mask > 0).any(-1)  # those that do not count are 255
    distance = ndimage.distance_transform_edt(~objects) if objects.any() else np.inf
    near = np.broadcast_to(distance <= MARGIN * np.hypot(height, width), objects.shape)
    raw = image.dtype == np.uint8
    colours = image[..., :3] if raw and image.shape[-1] == 4 else image  # without alpha
    dark = colours.max(-1) < DARK * (255 if raw else 1)
    side = -(-max(height, width) // CELLS)
    rows, columns = height // side, width // side

    def cells(pixels: np.ndarray) -> np.ndarray:
        return pixels[: rows * side, : columns * side].reshape(rows, side, columns, side)

    free = ~np.logical_or(cells(near).any((1, 3)), cells(dark).all((1, 3)))
    top, left, tall, wide = (side * x for x in largest_rectangle(free))
    return (top, left, tall, wide) if min(tall, wide) >= SMALLEST * min(height, width) else None


def largest_rectangle(free: np.ndarray) -> Box:
    """The largest rectangle of free cells whose sides differ by a factor of `LONGEST` at most.

    Each row is the base of bars, as high as the free cells above. A stack has the bars that rise to
    the right; one that does not ends the rectangles of the higher ones. So each rectangle that
    cannot be enlarged is seen, in time proportional to the cells. One that is too long is cut at
    both ends.

    Args:
        free: bool [H, W].

    Returns:
        The first one of the largest, and of equal ones that which was cut most; four zeros if no
        cell is free.
    """
    best, bars = (0, 0, 0, 0), np.zeros(free.shape[1] + 1, int)  # the last one ends all
    for bottom, row in enumerate(free, 1):
        bars[:-1] = np.where(row, bars[:-1] + 1, 0)
        rising: list[tuple[int, int]] = []  # left end and height
        for right, bar in enumerate(bars.tolist()):
            left = right
            while rising and rising[-1][1] >= bar:
                left, height = rising.pop()
                best = max(best, (bottom - height, left, height, right - left), key=_areas)
            rising.append((left, bar))
    return _cut(best)


def _cut(box: Box) -> Box:
    top, left, height, width = box
    tall, wide = min(height, LONGEST * width), min(width, LONGEST * height)
    return top + (height - tall) // 2, left + (width - wide) // 2, tall, wide


def _areas(box: Box) -> tuple[int, int]:
    """The area after a cut, and before."""
    *_, tall, wide = _cut(box)
    return tall * wide, box[2] * box[3]


def summary(negatives: Negatives, counts: Confusion) -> dict[str, Any]:
    """How often there is a claim where no object is, and of which area.

    Args:
        negatives: the parts.
        counts: per part [N, C], from `evaluate.counts_of`.

    Returns:
        `crops` and `pictures_without`, how many pictures have a part and how many none. `claims`:
        for each of `AREAS` the fraction of parts in which a larger one is claimed, with its Wilson
        interval of 95 %; `claimed_area`: the mean fraction of a part that is claimed, with its
        bootstrap interval. Of overlapping classes it is the area of the largest one.
    """
    fp = np.asarray(counts.fp)
    one_by_one = negatives.mask_format.overlapping or fp.shape[-1] == 1
    claimed = fp.max(-1) if one_by_one else fp[:, 1:].sum(-1)
    area, n = claimed / np.asarray(sum(counts))[:, 0], len(fp)
    claims = {f"{least:g}": int((area > least).sum()) for least in AREAS}
    return {
        "crops": n,
        "pictures_without": negatives.without,
        "claims": {
            least: {"mean": k / n, "interval": metrics.wilson_interval(k, n)}
            for least, k in claims.items()
        },
        "claimed_area": {
            "mean": float(area.mean()),
            "interval": metrics.bootstrap_interval(area),
        },
    }
