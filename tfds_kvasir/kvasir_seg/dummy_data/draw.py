"""Write a kvasir-seg.zip for tests: the official layout with synthetic pictures.

`python tfds_kvasir/kvasir_seg/dummy_data/draw.py` wrote the zip in this folder.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("disc", "flat", "pair", "rim")


def draw_zip(path: Path, names: Sequence[str] = NAMES, size: tuple[int, int] = (24, 32)) -> None:
    """Write a zip with a noise picture per name and its mask of one or two discs, all (H, W)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            radius = min(size) / 5
            mask = np.zeros(size, bool)
            for row, column in ((0.3, 0.3), (0.7, 0.7))[: 1 + i % 2]:
                mask |= (y - row * size[0]) ** 2 + (x - column * size[1]) ** 2 < radius**2
            white = np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=-1)
            archive.writestr(f"Kvasir-SEG/images/{name}.jpg", jpeg(image))
            archive.writestr(f"Kvasir-SEG/masks/{name}.jpg", jpeg(white))


def jpeg(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as the bytes of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    draw_zip(Path(__file__).with_name("kvasir-seg.zip"))
