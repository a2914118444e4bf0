"""Pictures drawn for the tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encode(array, suffix="png", **options):
    stream = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(stream, suffix, **options)
    return stream.getvalue()


def rgb(seed=0, size=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def discs(root: Path, n: int, side: int) -> Path:
    """Write n square pictures of a disc on noise, images/00.png, 01.png... and masks/."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:side, :side]
    for part in ("images", "masks"):
        (root / part).mkdir()
    for i in range(n):
        r, (cy, cx) = rng.uniform(side / 8, side * 9 / 32), rng.uniform(side / 4, side * 3 / 4, 2)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        image = rng.normal(90, 25, (side, side, 3)) + 80 * disc[..., None]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{i:02d}.png")
        Image.fromarray(disc.astype(np.uint8) * 255).save(root / f"masks/{i:02d}.png")
    return root
