"""Picture files to arrays: decoding, RGB images, resizing. Masks are read by `formats`.

Throughout the library a *picture* is a file or what Pillow makes of it, an *image* is an array.
"""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps

#: Pictures with more pixels are refused before they are decoded.
MAX_PIXELS = 100_000_000


class DataError(ValueError):
    """A picture or a data set is unusable, or its flags are; the message says which."""


def as_float(image: jax.Array) -> jax.Array:
    """An image as networks take it: uint8 is divided by 255, float is already in [0, 1]."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    raise ValueError(f"image has type {image.dtype}: use uint8 in 0..255 or float in [0, 1]")


def open_picture(data: bytes | Path, name: str) -> Image.Image:
    """Decode a picture and apply its EXIF orientation, kept in `info["orientation"]`.

    Args:
        data: its encoded bytes, or its file.
        name: what error messages call it.

    Raises:
        DataError: it cannot be decoded, has more than `MAX_PIXELS` pixels, several pages or frames,
            or colours of 16 bits, which Pillow cuts to 8.
    """
    try:
        picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width} x {picture.height}"
            raise DataError(f"{size} pixels, more than {MAX_PIXELS:,}: make it smaller")
        if picture.tile and ";16" in str(picture.tile[0].args) and not picture.mode.startswith("I"):
            raise DataError("16-bit colours, of which 8 bits would be lost: convert it to 8 bits")
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # a JPEG with previews
            raise DataError(f"{frames} pages or frames: save each one as a separate file")
        picture.load()
        picture.info["orientation"] = picture.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(picture, in_place=True)  # in place, because a copy has no format
        return picture
    except Exception as error:  # Pillow's decoders raise a dozen kinds on a broken file
        reason = "unknown format" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise DataError(f"{name}: not a readable picture ({reason})") from error


def to_rgb(picture: Image.Image, name: str = "picture") -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB; transparency is dropped.

    Integer grey of more than 8 bits is divided by 257, float grey in [0, 1] multiplied by 255.

    Raises:
        DataError: floats outside [0, 1], or integers that do not fill 16 bits: 12-bit data in a
            16-bit file would become almost black.
    """
    if picture.mode.startswith("F"):
        values = np.asarray(picture, np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError(f"{name}: its float grey values must be in [0, 1]: rescale them")
        picture = Image.fromarray((values * 255).round().astype(np.uint8))
    elif picture.mode.startswith("I"):
        values = np.asarray(picture, np.float64)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535 or 0 < high < 32768:
            raise DataError(
                f"{name}: its integer grey values are {low:.0f} to {high:.0f} of an unknown range: "
                "rescale them to 8 bits, or to the full range of 16 bits"
            )
        picture = Image.fromarray((values / 257).round().astype(np.uint8))
    return picture.convert("RGB")


def resize_image(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize an RGB picture, antialiased, to (height, width): uint8 [H, W, 3]."""
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask of class indices, uint8 [H, W], to (height, width): uint8 [H, W, 1].

    A pixel has the class that covers most of its area; a single class at least half of it.
    """

    def area(of: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(of * np.uint8(255))
        return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BOX))

    if mask.max(initial=0) <= 1:
        return (area(mask) > 127).astype(np.uint8)[..., None]
    present = np.flatnonzero(np.bincount(mask.ravel()))
    best = np.argmax([area(mask == value) for value in present], axis=0)
    return present.astype(np.uint8)[best][..., None]


def resize_proba(proba: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize probabilities float32 [H', W', C] bilinearly to (height, width): [H, W, C]."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(proba, -1, 0)
    ]
    return np.stack(channels, axis=-1)
