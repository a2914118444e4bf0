"""How far the outline of a prediction lies from the true one, in pixels.

The outline of a mask are its pixels that have one of their four neighbours outside of it or of the
picture; what MONAI measures is the same. Reinke et al., "Understanding metric-related pitfalls in
image analysis validation", Nature Methods 2024, says what each figure hides.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree


class Distances(NamedTuple):
    """From each pixel of one outline to the nearest of the other, in pixels: float64 [N], [M]."""

    predicted: np.ndarray
    true: np.ndarray


def distances(predicted: np.ndarray, true: np.ndarray) -> Distances | None:
    """The distances between the outlines of two masks, or None if both are empty.

    If one alone is empty there is nothing to measure to: every distance is the picture's diagonal.

    Args:
        predicted, true: bool, or 0 and 1, [H, W].

    Raises:
        ValueError: the shapes differ.
    """
    if np.shape(predicted) != np.shape(true) or np.ndim(true) != 2:
        raise ValueError(
            f"masks have shapes {np.shape(predicted)} and {np.shape(true)}: both must be [H, W]"
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
    """The larger of the two 95th percentiles; 0 where both masks are empty.

    Huttenlocher, Klanderman, Rucklidge: "Comparing Images Using the Hausdorff Distance", PAMI 1993,
    has the maximum instead, which one stray pixel decides.
    """
    return 0.0 if d is None else float(max(np.percentile(part, 95) for part in d if len(part)))


def assd(d: Distances | None) -> float:
    """The mean of all distances of both outlines (average symmetric surface distance), or 0."""
    return 0.0 if d is None else float(np.concatenate(d).mean())


def surface_dice(d: Distances | None, tolerance: float) -> float:
    """The share of both outlines at most so many pixels from the other; 1 if both are empty.

    Nikolov et al.: "Clinically Applicable Segmentation of Head and Neck Anatomy", JMIR 2021.
    """
    return 1.0 if d is None else float((np.concatenate(d) <= tolerance).mean())
