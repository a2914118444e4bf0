"""Pictures: predictions (Pillow), learning curves and reliability diagrams (matplotlib)."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from flax_unet.metrics import Reliability

TRUE, PREDICTED = (0, 220, 90), (255, 40, 160)  # green, magenta: safe for the colour-blind


def outline(mask: np.ndarray) -> np.ndarray:
    """The border of a mask [H, W], two pixels wide, open at the image's edge: bool [H, W]."""
    mask = np.asarray(mask, bool)
    return mask & ~np.asarray(ndimage.binary_erosion(mask, iterations=2, border_value=1), bool)


def overlay(image: np.ndarray, proba: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Blend a prediction into the image in magenta, and draw the true outline in green.

    Args:
        image: uint8 [H, W, 3].
        proba: [H, W] in [0, 1]; the opacity is half of it.
        mask: the true mask [H, W], if known.

    Returns:
        uint8 [H, W, 3].
    """
    alpha = 0.5 * np.asarray(proba, np.float32)[..., None]
    blended = image * (1 - alpha) + np.array(PREDICTED, np.float32) * alpha
    if mask is not None:
        blended[outline(mask)] = TRUE
    return blended.round().astype(np.uint8)


def panels(image: np.ndarray, proba: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The tutorial's three panels side by side: image, probabilities, overlay.

    For the arguments see `overlay`.

    Returns:
        uint8 [H, 3 W, 3].
    """
    grey = (255 * np.asarray(proba, np.float32)).round().astype(np.uint8)
    grey = np.stack([grey] * 3, axis=-1)
    return np.concatenate([image, grey, overlay(image, proba, mask)], axis=1)


def save_sheet(path: str | os.PathLike, rows: Sequence[np.ndarray]) -> None:
    """Save images of equal shape, uint8 [H, W, 3], in one column as a PNG."""
    Image.fromarray(np.concatenate(rows)).save(path)


def save_curves(path: str | os.PathLike, history: Sequence[dict[str, Any]]) -> None:
    """Save the learning curves of training and validation, loss and Dice per image, as a PNG.

    Args:
        path: the file.
        history: the records of `metrics.jsonl`, one per epoch.
    """
    from matplotlib.figure import Figure  # slow to import, and rarely needed

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [record["epoch"] for record in history]
    titles = {"loss": "loss", "dice_per_image": "Dice, mean over images"}
    loss, dice = figure.subplots(1, 2)
    dice.set_ylim(0, 1)
    for axes, (key, title) in zip((loss, dice), titles.items(), strict=True):
        axes.plot(epochs, [record[key] for record in history], label="training")
        axes.plot(epochs, [record[f"val_{key}"] for record in history], label="validation")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def save_reliability(path: str | os.PathLike, reliability: Reliability) -> None:
    """Save a reliability diagram as a PNG.

    The upper plot shows each bin's fraction of foreground over its mean probability: equal, if the
    model is calibrated. The lower plot shows the number of pixels per bin. Empty bins are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 5), layout="constrained")
    fraction, number = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = reliability.pixels > 0
    count, probability_sum, positives = (x[filled] for x in reliability)
    fraction.plot([0, 1], [0, 1], color="0.7", label="calibrated")
    fraction.plot(probability_sum / count, positives / count, marker="o", label="this model")
    fraction.set(ylabel="fraction of foreground", xlim=(0, 1), ylim=(0, 1))
    fraction.legend()
    width = 1 / len(filled)
    number.bar((np.flatnonzero(filled) + 0.5) * width, count, 0.9 * width)
    number.set(xlabel="probability", ylabel="pixels", yscale="log")
    for axes in (fraction, number):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
