"""Distances between the outlines of a predicted and a true mask, in pixels.

The outline of a mask is the set of its pixels with a 4-neighbour outside the mask or outside the
image, as in MONAI. Reinke et al.: "Understanding metric-related pitfalls in image analysis
validation", Nature Methods 2024, describes what each metric hides.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree


class Distances(NamedTuple):
    """From each pixel of an outline to the nearest of the other, in pixels: float64 [N], [M]."""

    predicted: np.ndarray
    true: np.ndarray


def distances(predicted: np.ndarray, true: np.ndarray) -> Distances | None:
    """Distances between the outlines of two masks, or None if both masks are empty.

    If only one mask is empty, every distance is the diagonal of the image.

    Args:
        predicted, true: bool, or 0 and 1, [H, W].

    Raises:
        ValueError: the shapes differ.
    """
    if np.shape(predicted) != np.shape(true) or np.ndim(true) != 2:
        raise ValueError(
            f"masks {np.shape(predicted)} and {np.shape(true)} must have the same shape [H, W]"
        )
    outlines = [_outline(np.asarray(mask, bool)) for mask in (predicted, true)]
    if not any(map(len, outlines)):
        return None
    if not all(map(len, outlines)):
        diagonal = float(np.hypot(*np.shape(true)))
        return Distances(*(np.full(len(points), diagonal) for points in outlines))
    ours, theirs = outlines
    return Distances(KDTree(theirs).query(ours)[0], KDTree(ours).query(theirs)[0])


def _outline(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask & ~np.asarray(ndimage.binary_erosion(mask), bool))


def hd95(d: Distances | None) -> float:
    """The larger of the 95th percentiles of both directions, in pixels; 0 if both masks are empty.

    Huttenlocher, Klanderman, Rucklidge: "Comparing Images Using the Hausdorff Distance", PAMI 1993,
    uses the maximum, which a single stray pixel can determine.

    >>> predicted, true = np.zeros((2, 20, 20), bool)
    >>> predicted[5:10, 5:10] = true[5:10, 8:13] = True  # a square, and the same 3 pixels right
    >>> hd95(distances(predicted, true))
    3.0
    """
    return 0.0 if d is None else float(max(np.percentile(x, 95) for x in d if len(x)))


def assd(d: Distances | None) -> float:
    """Average symmetric surface distance: the mean over both outlines; 0 if both are empty."""
    return 0.0 if d is None else float(np.concatenate(d).mean())


def surface_dice(d: Distances | None, tolerance: float) -> float:
    """Fraction of both outlines within `tolerance` pixels of the other; 1 if both are empty.

    Nikolov et al.: "Clinically Applicable Segmentation of Head and Neck Anatomy", JMIR 2021.
    """
    return 1.0 if d is None else float((np.concatenate(d) <= tolerance).mean())
