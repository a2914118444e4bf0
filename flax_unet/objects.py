"""Connected objects of a mask: how large, where, and how certain each one is."""

from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

#: Pixels that are summed up at a time, so that the sums take little memory beside the labels.
CHUNK = 2**20


class Object(NamedTuple):
    """A connected object of a mask."""

    area: int
    """Pixels."""
    box: tuple[int, int, int, int]
    """x, y, width and height in pixels, as in COCO: x and y of its left and upper edge, from 0."""
    centroid: tuple[float, float]
    """Mean x and mean y of its pixels; the pixel in the upper left corner is at 0, 0."""
    mean_probability: float
    """Mean of the probabilities of its pixels."""


def find(mask: np.ndarray, proba: np.ndarray) -> list[Object]:
    """The connected objects of a mask, the largest first.

    Pixels that touch at a side or a corner are of one object (8 neighbours). Objects of equal area
    are in the order in which their first pixels are read, row by row.

    >>> mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    >>> [(each.area, each.box) for each in find(mask, np.full((4, 4), 0.75))]
    [(3, (0, 0, 3, 2)), (1, (0, 3, 1, 1))]

    Args:
        mask: bool [H, W].
        proba: [H, W], the probability that a pixel is of the class of the mask.

    Raises:
        ValueError: the shapes differ, or are of another rank.
    """
    return largest(mask, proba, None)[1]


def largest(mask: np.ndarray, proba: np.ndarray, most: int | None) -> tuple[int, list[Object]]:
    """The number of connected objects, and at most so many of them, as `find` has them.

    Noisy masks have millions of objects: memory is that of the mask, not of the objects' boxes.
    """
    if mask.ndim != 2 or mask.shape != proba.shape:
        raise ValueError(f"mask {mask.shape} and proba {proba.shape} must both be [H, W]")
    labels = np.empty(mask.shape, np.int32)
    n: Any = ndimage.label(mask, np.ones((3, 3)), output=labels)
    if not n:
        return 0, []
    area, sums = np.zeros(n, np.int64), np.zeros((3, n))
    rows = max(1, CHUNK // mask.shape[1])
    for top in range(0, len(mask), rows):
        y, x = np.nonzero(labels[top : top + rows])
        if len(y):
            label = labels[top + y, x] - 1
            area += np.bincount(label, minlength=n)
            for total, values in zip(sums, (x, top + y, proba[top + y, x]), strict=True):
                total += np.bincount(label, values, minlength=n)
    chosen = np.argsort(-area, kind="stable")[:most]
    rank = np.zeros(n + 1, np.int32)  # from 1; 0 for what is left out
    rank[chosen + 1] = np.arange(1, len(chosen) + 1)
    for top in range(0, len(mask), rows):
        labels[top : top + rows] = rank[labels[top : top + rows]]
    mean_x, mean_y, mean_proba = (sums[:, chosen] / area[chosen]).tolist()
    found = zip(area[chosen].tolist(), ndimage.find_objects(labels), strict=True)
    return n, [
        Object(
            pixels,
            (x.start, y.start, x.stop - x.start, y.stop - y.start),
            (mean_x[i], mean_y[i]),
            mean_proba[i],
        )
        for i, (pixels, (y, x)) in enumerate(found)
    ]
