"""Pictures of predictions (Pillow) and learning curves (matplotlib)."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from flax_unet.metrics import Reliability

TRUE, PREDICTED = (0, 220, 90), (255, 40, 160)  # green and magenta: told apart by the colour-blind


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask [H, W] that touch its outside, two pixels wide: bool [H, W]."""
    mask = np.asarray(mask, bool)
    return mask & ~np.asarray(ndimage.binary_erosion(mask, iterations=2, border_value=1), bool)


def overlay(image: np.ndarray, proba: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The image with the prediction over it at alpha 0.5, and the true outline in green.

    Args:
        image: uint8 [H, W, 3].
        proba: probabilities [H, W] in [0, 1]; where they are 0 the image shows as it is.
        mask: the true mask [H, W], if it is known.

    Returns:
        uint8 [H, W, 3].
    """
    alpha = 0.5 * np.asarray(proba, np.float32)[..., None]
    mixed = image * (1 - alpha) + np.array(PREDICTED, np.float32) * alpha
    if mask is not None:
        mixed[outline(mask)] = TRUE
    return mixed.round().astype(np.uint8)


def panels(image: np.ndarray, proba: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The tutorial's three panels side by side: image, probabilities, overlay.

    Args and units as for `overlay`.

    Returns:
        uint8 [H, 3 W, 3].
    """
    grey = (255 * np.asarray(proba, np.float32)).round().astype(np.uint8)
    grey = np.stack([grey] * 3, axis=-1)
    return np.concatenate([image, grey, overlay(image, proba, mask)], axis=1)


def save_sheet(path: str | os.PathLike, rows: Sequence[np.ndarray]) -> None:
    """Write pictures [H, W, 3] of one size under each other as a PNG."""
    Image.fromarray(np.concatenate(rows)).save(path)


def save_curves(path: str | os.PathLike, history: Sequence[dict[str, Any]]) -> None:
    """Write the learning curves as a PNG: loss, and Dice per image, of training and validation.

    Args:
        path: the file.
        history: the lines of `metrics.jsonl`, one an epoch.
    """
    from matplotlib.figure import Figure  # slow to import, and only wanted here

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [line["epoch"] for line in history]
    titles = {"loss": "loss", "dice_per_image": "Dice, mean over images"}
    loss, dice = figure.subplots(1, 2)
    dice.set_ylim(0, 1)
    for axes, (key, title) in zip((loss, dice), titles.items(), strict=True):
        axes.plot(epochs, [line[key] for line in history], label="training")
        axes.plot(epochs, [line[f"val_{key}"] for line in history], label="validation")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def save_reliability(path: str | os.PathLike, reliability: Reliability) -> None:
    """Write, as a PNG, how often what is claimed with some probability is there.

    Above, the share of foreground among the pixels of each part of [0, 1] over their mean
    probability, which are equal in a calibrated model; below, the pixels' number.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 5), layout="constrained")
    share, number = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    some = reliability.n > 0
    n, claimed, found = (x[some] for x in reliability)
    share.plot([0, 1], [0, 1], color="0.7", label="calibrated")
    share.plot(claimed / n, found / n, marker="o", label="this model")
    share.set(ylabel="share of foreground", xlim=(0, 1), ylim=(0, 1))
    share.legend()
    width = 1 / len(some)
    number.bar((np.arange(len(some))[some] + 0.5) * width, n, 0.9 * width)
    number.set(xlabel="probability", ylabel="pixels", yscale="log")
    for axes in (share, number):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
