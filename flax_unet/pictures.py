"""Picture files: decoding and resizing. `images` and `formats` say what the values mean.

Throughout the library a *picture* is a file or what Pillow makes of it, an *image* is an array.
"""

import io
import stat
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, ImageSequence

#: Pictures with more pixels are refused before they are decoded.
MAX_PIXELS = 89_000_000
#: Larger files are refused before they are read.
MAX_BYTES = 1_000_000_000
#: What Pillow may try. It knows 30 more formats, and starts other programs for some of them.
FORMATS = "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"


class DataError(ValueError):
    """A picture or a data set is unusable, or its flags are; the message says which."""


def as_float(image: jax.Array) -> jax.Array:
    """An image as networks take it: uint8 is divided by 255, float is already in [0, 1]."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    raise ValueError(f"image has type {image.dtype}: use uint8 in 0..255 or float in [0, 1]")


#: What a picture file holds: one picture, an array [H, W, C], or the pages of a TIFF file.
Content = Image.Image | np.ndarray | list[Image.Image]


def open_picture(data: bytes | Path, name: str) -> Image.Image:
    """Decode a picture and apply its EXIF orientation, kept in `info["orientation"]`.

    Args:
        data: its encoded bytes, or its file: one of `FORMATS`, or `.npy` [H, W].
        name: what error messages call it.

    Raises:
        DataError: it cannot be decoded, has more than `MAX_PIXELS` pixels, several pages or frames,
            or colours of 16 bits, which Pillow cuts to 8.
    """
    content = open_content(data, name)
    if isinstance(content, list):
        raise DataError(f"{name}: {len(content)} pages: save each one as a separate file")
    if isinstance(content, np.ndarray) and content.shape[2] > 1:
        raise DataError(f"{name}: its shape is {content.shape}: it must be [H, W]")
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content[..., 0].astype(np.float32))
        content.info["orientation"] = 1
    return content


def open_content(data: bytes | Path, name: str, *, decode: bool = True) -> Content:
    """What a file holds, which may also be an array `.npy` [H, W, C], or several pages of a TIFF.

    Args:
        data, name: see `open_picture`.
        decode: whether Pillow decodes a single picture already, and applies its orientation.

    Raises:
        DataError: as `open_picture`, but for arrays and pages.
    """
    try:
        file = io.BytesIO(data if isinstance(data, bytes) else _read_file(data))
        if file.read(6) == b"\x93NUMPY":
            return _from_array(_read_array(file))
        file.seek(0)
        picture = Image.open(file, formats=FORMATS)
        frames = getattr(picture, "n_frames", 1)
        several = frames > 1 and picture.format != "MPO"  # a JPEG with previews
        _check_size(picture.width, picture.height, frames if several else 1)
        if picture.tile and ";16" in str(picture.tile[0].args) and not picture.mode.startswith("I"):
            raise DataError(
                "16-bit colours, of which 8 bits would be lost: save it as .npy, or with 8 bits"
            )
        if several and picture.format != "TIFF":
            raise DataError(f"{frames} frames: save each one as a separate file")
        if several:
            pages = []
            for page in ImageSequence.Iterator(picture):
                _check_size(page.width, page.height, frames)  # pages may differ in size
                pages.append(page.copy())
            return pages
        if decode:
            picture.load()
            picture.info["orientation"] = picture.getexif().get(ExifTags.Base.Orientation, 1)
            ImageOps.exif_transpose(picture, in_place=True)  # in place: a copy has no format
        return picture
    except Exception as error:  # Pillow's decoders raise a dozen kinds on a broken file
        reason: Any = error
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = f"unknown format: use {', '.join(FORMATS)} or .npy"
        elif isinstance(error, OSError) and error.strerror:  # without the name a second time
            reason = error.strerror
        raise DataError(f"{name}: not a readable picture ({reason})") from error


def name_of(example: dict[str, Any]) -> str:
    """What errors call the picture of an entry of a source: its path, if it is known."""
    return example.get("files", (f"image {example['name']}",))[0]


def has_alpha(picture: Image.Image) -> bool:
    """Whether pixels may be transparent."""
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info


def size_of(content: Content) -> tuple[int, int]:
    """Width and height."""
    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0]
    return (content[0] if isinstance(content, list) else content).size


def _read_file(file: Path) -> bytes:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, for ever
        raise DataError("not a file")
    if status.st_size > MAX_BYTES:
        raise DataError(f"{status.st_size:,} bytes, more than {MAX_BYTES:,}: make it smaller")
    return file.read_bytes()


def _check_size(width: int, height: int, pages: int) -> None:
    if width * height * pages > MAX_PIXELS:
        size = f"{width} x {height}" + f" x {pages}" * (pages > 1)
        raise DataError(f"{size} pixels, more than {MAX_PIXELS:,}: make it smaller")


def _read_array(file: IO[bytes]) -> np.ndarray:
    """The array in a `.npy` file, whose size is checked before memory is allocated."""
    file.seek(0)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"its shape is {shape}: it must be [H, W] or [H, W, C]")
    if dtype.kind not in "buif":
        raise DataError(f"its type is {dtype}: use integers or floats")
    _check_size(shape[1], shape[0], *shape[2:] or (1,))
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _from_array(array: np.ndarray) -> Image.Image | np.ndarray:
    """Convert an array of one channel to a picture, if Pillow has a mode for its values."""
    if array.ndim == 3 and array.shape[2] > 1:
        return array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array
    array = array.reshape(array.shape[:2])
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        return array[..., None]
    if array.dtype.kind == "f":
        picture = Image.fromarray(array.astype(np.float32))
    elif array.dtype in (np.bool_, np.uint8, np.uint16):
        picture = Image.fromarray(array)
    elif array.min() < -(2**31) or array.max() >= 2**31:
        raise DataError(f"its values reach {array.max()}: use at most 32 bits")
    else:
        picture = Image.fromarray(array.astype(np.int32))
    picture.info["orientation"] = 1
    return picture


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image [H, W, C], uint8 or float32, antialiased, to (height, width)."""

    def resize(channels: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(channels)
        return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))

    if image.dtype == np.uint8 and image.shape[2] == 3:  # all at once
        return resize(image)
    result = np.empty((*size, image.shape[2]), image.dtype)
    for channel in range(image.shape[2]):
        result[..., channel] = resize(image[..., channel])
    return result


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask, uint8 [H, W, C] of class indices or of 0 and 1, to (height, width).

    A pixel has the class that covers most of its area; a single class more than half of it. Of
    exactly half, rounding decides: areas have 8 bits.
    """
    return np.stack([_resize_index(x, size) for x in np.moveaxis(mask, -1, 0)], axis=-1)


def _resize_index(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    def area(of: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(of * np.uint8(255))
        return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BOX))

    if mask.max(initial=0) <= 1:
        return (area(mask) > 127).astype(np.uint8)
    present = np.flatnonzero(np.bincount(mask.ravel()))
    best = np.argmax([area(mask == value) for value in present], axis=0)
    return present.astype(np.uint8)[best]
