"""Damaged picture files: an image of the right shape and type, or a DataError."""

import io
import random
import warnings

import numpy as np
from PIL import Image

from flax_unet import formats, images
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.pictures import DataError, open_content, open_picture, size_of

from .damage import damaged
from .outcome import Outcome

FORMATS = (
    images.RGB,
    ImageFormat(),
    ImageFormat(channels=1, convert=True),
    ImageFormat(channels=4),
    ImageFormat(kind=None, percentiles=(1, 99), convert=True),
    ImageFormat(channels=1, kind=None, low=(-5.0,), high=(1000.0,), convert=True),
    ImageFormat(channels=2, kind="integers", low=(0.0,), high=(65535.0,), pages=True),
)
MASKS = (
    MaskFormat(),
    MaskFormat(values=((0, 0), (255, 1)), rest=0),
    MaskFormat(values=(), threshold=127.5),
    MaskFormat(values=(((255, 0, 0), 1),), rest=0),
)


def run(n: int, seed: int) -> Outcome:
    """Open and read n damaged pictures."""
    outcome, rng, sound = Outcome(), random.Random(seed), corpus()
    for _ in range(n):
        data = damaged(sound, rng)
        size = rng.choice((None, None, (5, 7)))
        with outcome.attempt(data, DataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large pictures
            if rng.random() < 0.7:
                check_image(data, rng.choice(FORMATS), size)
            else:
                check_mask(data, rng.choice(MASKS))
    return outcome


def check_image(data: bytes, image_format: ImageFormat, size: tuple[int, int] | None) -> None:
    """Only a DataError may leave this, beside a right end."""
    content = open_content(data, "picture")
    width, height = size_of(content)
    image = images.read(content, image_format, "picture", size)
    assert image.shape == (*(size or (height, width)), image_format.channels), image.shape
    assert image.dtype == (np.uint8 if image_format.raw else np.float32), image.dtype
    assert image.dtype == np.uint8 or (image.min() >= 0 and image.max() <= 1), "out of range"


def check_mask(data: bytes, mask_format: MaskFormat) -> None:
    picture = open_picture(data, "mask")
    assert picture.info["orientation"] is not None
    mask = formats.read(picture, mask_format, "mask")
    assert mask.shape == (picture.height, picture.width) and mask.dtype == np.uint8, mask.dtype
    assert mask.max() <= 1, "a class that does not exist"


def corpus() -> list[bytes]:
    """Small pictures of all kinds."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 9, 3), np.uint8)
    colours = Image.fromarray(rgb)
    grey, wide = colours.convert("L"), Image.fromarray(rng.integers(0, 65536, (6, 9), np.uint16))
    clear = Image.fromarray(rng.integers(0, 256, (6, 9, 4), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    found = [
        *(encoded(x, "PNG") for x in (colours, grey, wide, clear, colours.convert("P"))),
        *(encoded(x, "PNG") for x in (grey.convert("1"), clear.convert("LA"))),
        encoded(colours, "PNG", exif=turned),
        encoded(grey, "PNG", transparency=3),
        *(encoded(x, "JPEG") for x in (colours, grey, colours.convert("CMYK"))),
        encoded(colours, "JPEG", exif=turned, progressive=True),
        *(encoded(x, "TIFF") for x in (colours, grey, wide, Image.fromarray(rgb[..., 0] / 7))),
        *(encoded(colours, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate")),
        encoded(grey.convert("1"), "TIFF", compression="group4"),
        encoded(wide, "TIFF", save_all=True, append_images=[wide]),
        *(encoded(x, "BMP") for x in (colours, grey, grey.convert("1"))),
        *(encoded(x, "GIF") for x in (colours, grey)),
        encoded(grey, "GIF", save_all=True, append_images=[colours.convert("L")]),
        *(encoded(x, "WEBP", lossless=True) for x in (colours, clear)),
        encoded(colours, "WEBP", exif=turned),
        encoded(colours, "PPM"),
    ]
    for dtype in ("u1", "u2", "i4", "f4", "f8", "?"):
        values = rng.integers(0, 2 if dtype == "?" else 200, (6, 9)).astype(dtype)
        found += [saved(values), saved(values[..., None].repeat(4, -1))]
    return found


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    picture.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def saved(array: np.ndarray) -> bytes:
    """A .npy file."""
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()
