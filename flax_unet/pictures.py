"""Picture files to arrays: decoding, RGB images, masks, resizing.

Throughout the library a *picture* is a file or what Pillow makes of it, an *image* is an array.
"""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from PIL import Image, ImageOps

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
    """Decode a picture and apply its EXIF orientation.

    Args:
        data: its encoded bytes, or its file.
        name: what error messages call it.

    Raises:
        DataError: it cannot be decoded, has more than `MAX_PIXELS` pixels, or has colours of 16
            bits, which Pillow cuts to 8.
    """
    try:
        picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width} x {picture.height}"
            raise DataError(f"{size} pixels, more than {MAX_PIXELS:,}: make it smaller")
        if picture.tile and ";16" in str(picture.tile[0].args) and not picture.mode.startswith("I"):
            raise DataError("16-bit colours, of which 8 bits would be lost: convert it to 8 bits")
        picture.load()
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


def to_mask(picture: Image.Image, name: str = "mask") -> Image.Image:
    """A mask of {0, 1}, or of values near {0, 255} or {0, 65535}, as a picture of 0 and 255.

    "Near" means within an eighth of the range, because JPEG blurs edges. The values of a palette
    picture are its indices, unless all its colours are black and white.

    Raises:
        DataError: it has other values, listed in the message; it is transparent in places; or it is
            a JPEG of {0, 1}, which may be labels or the noise of an empty mask.
    """
    if picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema()[0] != 255:
        raise DataError(f"{name}: a mask must be opaque, and this one has transparent pixels")
    is_jpeg = picture.format in ("JPEG", "MPO")
    if picture.mode == "P":
        colours = picture.convert("RGB").getcolors() or []  # None: more than 256
        black_and_white = {(0, 0, 0), (255, 255, 255)}
        if colours and {colour for _, colour in colours} <= black_and_white:
            picture = picture.convert("L")
    elif not picture.mode.startswith(("I", "F")):
        picture = picture.convert("L")
    values = np.asarray(picture)
    # For 8-bit pictures Pillow's histogram is much faster than np.unique.
    counts = picture.histogram() if picture.mode in ("L", "P") else None
    present = np.unique(values) if counts is None else np.flatnonzero(counts)
    if np.isin(present, (0, 1)).all():
        threshold = 1
        if is_jpeg and present.max() == 1:
            raise DataError(
                f"{name}: a JPEG of 0 and 1 may hold labels, or the noise of an empty mask: save "
                "masks as PNG"
            )
    else:
        full = 255 if present.max() <= 255 else 65535
        threshold = full - full // 8
        unexpected = present[~(present >= threshold) & ~((present >= 0) & (present <= full // 8))]
        if unexpected.size or present.max() < threshold:
            values_shown = (unexpected if unexpected.size else present)[:8]
            raise DataError(
                f"{name}: a mask must have the values 0 and 1, or values near 0 and {full}, and "
                f"this one has {', '.join(map(str, values_shown))}: write {full} where the object "
                "is and 0 elsewhere"
            )
    return Image.fromarray(np.where(values >= threshold, np.uint8(255), np.uint8(0)))


def resize_image(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize an RGB picture, antialiased, to (height, width): uint8 [H, W, 3]."""
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask of 0 and 255 to (height, width): uint8 [H, W, 1] of 0 and 1.

    A pixel is foreground if at least half of its area is.
    """
    fraction = np.asarray(mask.resize((size[1], size[0]), Image.Resampling.BOX))
    return (fraction > 127).astype(np.uint8)[..., None]


def resize_proba(proba: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize probabilities float32 [H', W', C] bilinearly to (height, width): [H, W, C]."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(proba, -1, 0)
    ]
    return np.stack(channels, axis=-1)
