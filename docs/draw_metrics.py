"""Draw the pictures of docs/metrics.md into docs/pictures: `python docs/draw_metrics.py [FOLDER]`.

The masks are drawn here, and every number in a picture is computed by flax_unet. Each PNG also has
its numbers as JSON, in its text `numbers`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flax_unet import draw, evaluate, metrics, pictures

SIZE, SCALE = 96, 4
#: The true mask and the prediction of a panel, bool [H, W], and what is written above.
Case = tuple[str, np.ndarray, np.ndarray]
NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "hd95": "HD95",
    "assd": "ASSD",
    "surface_dice": "surface Dice",
}
DISTANCES = "hd95", "assd"


def disc(radius: float, *, y: float = 47.5, x: float = 47.5, waves: float = 0.0) -> np.ndarray:
    """A disc, or one with a wavy outline: bool [SIZE, SIZE]."""
    dy, dx = np.mgrid[:SIZE, :SIZE] - np.array([y, x])[:, None, None]
    return np.hypot(dy, dx) < radius + waves * np.cos(12 * np.arctan2(dy, dx))


def overlap() -> list[Case]:
    return [
        ("4 pixels beside it", disc(30), disc(30, x=51.5)),
        ("4 pixels, a small one", disc(6), disc(6, x=51.5)),
        ("too large", disc(30), disc(37)),
        ("too small", disc(30), disc(24.3)),
    ]


def outlines() -> list[Case]:
    true = disc(30)
    return [
        ("smaller all around", true, disc(28)),
        ("a wavy outline", true, disc(30, waves=3)),
        ("a false spot", true, true | disc(7.5, y=9, x=9)),
        ("a missed spot", true | disc(7.5, y=9, x=9), true),
    ]


def pooled() -> list[Case]:
    none = np.zeros((SIZE, SIZE), bool)
    return [
        ("a large one, found", disc(38), disc(38, x=49.5)),
        ("a small one, missed", disc(7), none),
        ("nothing, none found", none, none),
        ("nothing, a spot found", none, disc(3)),
    ]


def own_size() -> list[Case]:
    """What a perfect prediction at 24x24 is worth at the mask's own size, 96x96."""
    y, x = np.mgrid[:SIZE, :SIZE]
    thick = disc(14, y=30, x=32)
    thin = np.abs(x - 60 - 12 * np.sin(y / 15)) < 1.5
    masks = (("thick", thick), ("thin: 3 pixels", thin), ("tiny: 4 pixels", disc(2)))
    return [(name, mask, _through(mask, SIZE // 4)) for name, mask in masks]


def _through(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask that is resized to a network's size, and back as probabilities are."""
    resized = pictures.resize_mask(mask[..., None].astype(np.uint8), (size, size))
    return pictures.resize_image(resized.astype(np.float32), mask.shape)[..., 0] > 0.5


#: Of each picture the panels, the metrics below them, and whether the summary is below all.
SHEETS = {
    "metrics-overlap": (overlap, ("dice", "iou", "precision", "recall"), False),
    "metrics-outlines": (outlines, ("dice", "hd95", "assd", "surface_dice"), False),
    "metrics-pooled": (pooled, ("dice",), True),
    "metrics-own-size": (own_size, ("dice", "recall"), False),
}


def numbers(cases: list[Case], keys: tuple[str, ...]) -> dict[str, Any]:
    """The metrics of each panel, and the means per image and pooled of all."""
    scores = [evaluate.score_picture(predicted, true) for _, true, predicted in cases]
    rows = [{key: each[key] for key in keys} for each in scores]
    total = evaluate.mean_scores(scores)
    return {
        **dict(zip([name for name, *_ in cases], rows, strict=True)),
        "mean per image": {"dice": total["per_image"]["dice"]["mean"]},
        "pooled": {"dice": total["pooled"]["dice"]},
    }


def as_text(key: str, value: float) -> str:
    return f"{NAMES[key]} {value:.1f} %" if key in DISTANCES else f"{NAMES[key]} {value:.3f}"


def sheet(cases: list[Case], keys: tuple[str, ...], summary: bool) -> Image.Image:
    """The panels in a row, with the numbers below."""
    found, font = numbers(cases, keys), ImageFont.load_default(30)
    gap, top, line, side = 24, 56, 40, SIZE * SCALE
    lines = len(keys) + 1.25 * summary
    size = len(cases) * (side + gap) + gap, int(top + side + line * lines + 28)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for i, (name, true, predicted) in enumerate(cases):
        true, predicted = (_larger(x, SCALE // 2) for x in (true, predicted))
        wall = np.full((*true.shape, 3), 225, np.uint8)
        x = gap + i * (side + gap)
        panel = _larger(draw.overlay(wall, predicted.astype(np.float32), true), 2)
        picture.paste(Image.fromarray(panel), (x, top))
        pen.text((x, 12), name, "black", font)
        for j, key in enumerate(keys):
            pen.text((x, top + side + 12 + j * line), as_text(key, found[name][key]), "black", font)
    if summary:
        text = ", ".join(
            f"{name} {found[name]['dice']:.3f}" for name in ("mean per image", "pooled")
        )
        y = top + side + 12 + (len(keys) + 0.25) * line
        pen.text((gap, y), f"Dice of these pictures: {text}", "black", font)
    return picture


def _larger(image: np.ndarray, times: int) -> np.ndarray:
    return image.repeat(times, 0).repeat(times, 1)


def over_confident() -> metrics.Reliability:
    """Of a model whose logits are twice as large as they should be, on 200,000 pixels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1.5, 1.5, 200_000)
    labels = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
    return metrics.reliability(1 / (1 + np.exp(-2 * logits)), labels)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, keys, summary) in SHEETS.items():
        cases, text = make(), PngInfo()
        text.add_text("numbers", json.dumps(numbers(cases, keys)))
        picture = sheet(cases, keys, summary)
        # The panels have few colours.
        picture.quantize(128, Image.Quantize.MEDIANCUT).save(
            folder / f"{name}.png", pnginfo=text, optimize=True
        )
    draw.save_reliability(folder / "metrics-reliability.png", over_confident())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pictures"))
