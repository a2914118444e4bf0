"""Windows that cover a picture: where they start, and with what weights their results are blended.

The axes are independent: the weight of a pixel in a window is the product of those along both axes.
"""

from typing import Literal

import numpy as np

Blend = Literal["gaussian", "linear"]


def starts(size: int, window: int, step: int, stride: int = 1) -> list[int]:
    """The starts of windows that cover an axis, evenly spaced as in nnU-Net.

    >>> starts(100, 32, 16, 4), starts(20, 32, 16)
    ([0, 12, 28, 40, 56, 68], [0])

    Args:
        size: pixels of the axis; the last window may extend beyond them.
        window: pixels of a window, a multiple of `stride`.
        step: largest distance of two starts, a multiple of `stride`.
        stride: each start is a multiple of it.
    """
    last = -(-max(0, size - window) // stride) * stride
    steps = -(-last // step)
    return [round(last * i / max(1, steps) / stride) * stride for i in range(steps + 1)]


def weights(size: int, window: int, starts: list[int], blend: Blend = "gaussian") -> np.ndarray:
    """The weight of each pixel of each window along an axis; at each pixel they add up to 1.

    Args:
        size, window, starts: see the function `starts`.
        blend: "gaussian", of which the standard deviation is an eighth of the window, as in
            nnU-Net and MONAI; or "linear", a triangle.

    Returns:
        Float32 [number of windows, window]; 0 beyond the axis.
    """
    distance = np.abs(np.arange(window) - (window - 1) / 2) / window  # of the centre, below 1/2
    profile = np.exp(-0.5 * (8 * distance) ** 2) if blend == "gaussian" else 0.5 - distance
    total = np.zeros(starts[-1] + window)
    for start in starts:
        total[start : start + window] += profile
    total[size:] = np.inf
    return np.stack([profile / total[s : s + window] for s in starts]).astype(np.float32)


def cut(image: np.ndarray, top: int, left: int, window: tuple[int, int]) -> np.ndarray:
    """A window of an image [H, W, C]; beyond its bottom and right the edge is repeated."""
    part = image[top : top + window[0], left : left + window[1]]
    bottom, right = window[0] - part.shape[0], window[1] - part.shape[1]
    if not (bottom or right):
        return part
    return np.pad(part, ((0, bottom), (0, right), (0, 0)), mode="edge")
