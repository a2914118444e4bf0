"""Pictures: predictions (Pillow); curves, confusion and reliability (matplotlib)."""

import os
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from flax_unet.metrics import Reliability

#: Images of equal size side by side, uint8 [H, W, 3].
Panels = tuple[np.ndarray, ...]

TRUE, PREDICTED = (0, 220, 90), (255, 40, 160)  # green, magenta: safe for the colour-blind


def outline(mask: np.ndarray, width: int = 2) -> np.ndarray:
    """The border of a mask [H, W], `width` pixels wide, open at the image's edge: bool [H, W]."""
    mask = np.asarray(mask, bool)
    inside = ndimage.binary_erosion(mask, iterations=width, border_value=1)
    return mask & ~np.asarray(inside, bool)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An image [H, W, C], uint8 or float in [0, 1], as uint8 [H, W, 3].

    One or two channels are shown as the grey of the first, more as the colours of the first three.
    """
    image = np.asarray(image)
    image = image[..., :3] if image.shape[-1] > 2 else image[..., :1].repeat(3, axis=-1)
    return image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)


def overlay(image: np.ndarray, proba: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Blend a prediction into the image in magenta, and draw the true outline in green.

    Args:
        image: see `as_rgb`.
        proba: [H, W] in [0, 1]; the opacity is half of it.
        mask: the true mask [H, W], if known.

    Returns:
        uint8 [H, W, 3].
    """
    alpha = 0.5 * np.asarray(proba, np.float32)[..., None]
    blended = as_rgb(image) * (1 - alpha) + np.array(PREDICTED, np.float32) * alpha
    if mask is not None:
        blended[outline(mask)] = TRUE
    return blended.round().astype(np.uint8)


#: Sides of a panel in pixels: the shorter at least, the longer at most.
SIDES = 256, 512


def panels(
    image: np.ndarray,
    prediction: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    threshold: float = 0.5,
) -> Panels:
    """Three panels, enlarged or reduced so that their sides are within `SIDES`.

    Of one class: the image, the probabilities, and the image with outlines: the true one in
    `TRUE`, wide, and on it the predicted one in `PREDICTED`. Of several classes: the image, the
    true classes over it, and the predicted ones.

    Args:
        image: see `as_rgb`.
        prediction: float probabilities of one class [H, W, 1]; or uint8 [H, W, 1] of class indices,
            or [H, W, K] of overlapping classes.
        mask: uint8 [H, W, 1 or K]; one class may go without.
        threshold: probability above which a pixel is of the one class.

    Returns:
        Three arrays, uint8 [height, width, 3].
    """
    image = _scaled(as_rgb(image))
    if prediction.dtype == np.uint8 and mask is not None:
        each = (_scaled(flat(x)) for x in (mask, prediction))
        return image, *(class_overlay(image, index, palette(256)[:255]) for index in each)
    proba, outlined = _scaled(prediction[..., 0].astype(np.float32)), image.copy()
    if mask is not None:
        outlined[outline(_scaled(mask[..., 0] == 1), 4)] = TRUE
    outlined[outline(proba > threshold)] = PREDICTED
    grey = (255 * proba.clip(0, 1)).round().astype(np.uint8)
    return image, np.stack([grey] * 3, axis=-1), outlined


def _scaled(array: np.ndarray) -> np.ndarray:
    """An array [H, W] or [H, W, 3] within `SIDES`: labels and bools keep their values."""
    height, width = array.shape[:2]
    low, high = SIDES
    scale = min(max(1, low / min(height, width)), high / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    smooth = array.ndim == 3 or array.dtype == np.float32
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    picture = Image.fromarray(array.astype(np.uint8) if array.dtype == bool else array)
    return np.asarray(picture.resize(size, how)).astype(array.dtype)


def palette(k: int) -> np.ndarray:
    """Colours of k classes, uint8 [k, 3], the first one black.

    Hues advance by the golden ratio, so that any two neighbours differ, with three brightnesses.
    """
    hues = (0.6 + np.arange(k - 1) * 0.618034) % 1
    values = np.choose(np.arange(k - 1) % 3, [1.0, 0.75, 0.9])
    hsv = np.stack([hues, np.full(k - 1, 0.75), values], -1)[None]
    picture = Image.fromarray((hsv * 255).astype(np.uint8), "HSV")
    return np.concatenate([np.zeros((1, 3), np.uint8), np.asarray(picture.convert("RGB"))[0]])


def flat(mask: np.ndarray) -> np.ndarray:
    """A mask as class indices [H, W]; overlapping classes [H, W, K] are 1 to K, the last on top.

    Args:
        mask: uint8 [H, W, 1] of class indices, or [H, W, K] of 0 and 1.
    """
    if mask.shape[-1] == 1:
        return mask[..., 0]
    return ((mask == 1) * np.arange(1, mask.shape[-1] + 1)).max(-1).astype(np.uint8)


def class_overlay(image: np.ndarray, index: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend the colours of classes into an image; class 0 and what does not count stay as they are.

    Args:
        image: see `as_rgb`.
        index: uint8 [H, W].
        colours: from `palette`.

    Returns:
        uint8 [H, W, 3].
    """
    painted = (index > 0) & (index < len(colours))
    image, colour = as_rgb(image), colours[np.where(painted, index, 0)]
    return np.where(painted[..., None], (image.astype(int) + colour) // 2, image).astype(np.uint8)


def legend(
    names: Sequence[str], width: int, colours: Sequence[Sequence[int]] | None = None
) -> np.ndarray:
    """Names beside their colours, by default those of classes: uint8 [H, width, 3]."""
    shades: Any = palette(256).tolist() if colours is None else colours
    font, rows = ImageFont.load_default(12), []
    x = y = 0
    for i, name in enumerate(names):
        step = int(font.getlength(name)) + 26
        if x and x + step > width:
            x, y = 0, y + 18
        rows.append((x, y, i, name))
        x += step
    picture = Image.new("RGB", (width, y + 20), "white")
    draw = ImageDraw.Draw(picture)
    for x, y, i, name in rows:
        draw.rectangle((x + 4, y + 4, x + 16, y + 16), tuple(shades[i]), "grey")
        draw.text((x + 20, y + 3), name, "black", font)
    return np.asarray(picture)


def save_confusion(path: str | os.PathLike, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Save a confusion matrix as a PNG: of each true class, the fraction predicted as each class.

    Args:
        path: the file.
        matrix: pixels by true (row) and predicted class (column), [K, K].
        names: of the K classes.
    """
    from matplotlib.figure import Figure

    k = len(names)
    figure = Figure(figsize=(2 + 0.5 * k, 1.8 + 0.5 * k), layout="constrained")
    axes = figure.subplots()
    fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(k), yticks=range(k))
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    for (i, j), value in np.ndenumerate(fraction):
        colour = "white" if value > 0.5 else "black"
        axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_title("percent of each true class", fontsize=10)
    figure.savefig(path, dpi=120)


def save_sheet(
    path: str | os.PathLike, rows: dict[str, Panels], classes: Sequence[str] = ()
) -> None:
    """Save rows of `panels` as a PNG, with titles over the columns and a key below.

    Args:
        path: the file.
        rows: by its caption, the panels of each row, which may differ in size.
        classes: names of several classes in the order of `palette`; none of one class.
    """
    titles, key = ("picture", "probabilities", "outlines"), ("true outline", "predicted outline")
    if classes:
        titles, key = ("picture", "true classes", "predicted classes"), classes
    gap, line = 8, 22
    widths = [max(row[i].shape[1] for row in rows.values()) for i in range(len(titles))]
    left = np.cumsum([gap, *(width + gap for width in widths)])
    below = legend(key, int(left[-1]), None if classes else (TRUE, PREDICTED))
    heights = [row[0].shape[0] for row in rows.values()]
    height = line + sum(line + height + gap for height in heights) + len(below)
    sheet = Image.new("RGB", (int(left[-1]), height), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(14), line
    for title, x, width in zip(titles, left, widths, strict=False):
        draw.text((x + width / 2, 4), title, "dimgrey", font, anchor="ma")
    for (caption, row), height in zip(rows.items(), heights, strict=True):
        draw.text((gap, y + 2), caption, "black", font)
        for panel, x, width in zip(row, left, widths, strict=False):
            place = int(x) + (width - panel.shape[1]) // 2, y + line
            sheet.paste(Image.fromarray(panel), place)
        y += line + height + gap
    sheet.paste(Image.fromarray(below), (0, y))
    sheet.save(path)


def save_curves(path: str | os.PathLike | IO[bytes], history: Sequence[dict[str, Any]]) -> None:
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
        axes.xaxis.get_major_locator().set_params(integer=True)
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


def outlines(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Draw the border of each class but 0 into an image, in its colour; see `outline`.

    Args:
        image: see `as_rgb`.
        mask: uint8 [H, W, 1] of class indices, or [H, W, K] of 0 and 1: classes 1 to K, of which
            the last is drawn on top.
        colours: uint8 [more than the largest index, 3].

    Returns:
        uint8 [H, W, 3].
    """
    result = as_rgb(image).copy()
    if mask.shape[-1] == 1:
        present = np.flatnonzero(np.bincount(mask.ravel()))
        classes = {i: mask[..., 0] == i for i in present if i > 0}
    else:
        classes = {i: mask[..., i - 1] == 1 for i in range(1, mask.shape[-1] + 1)}
    for i, of_class in classes.items():
        result[outline(of_class)] = colours[i]
    return result
