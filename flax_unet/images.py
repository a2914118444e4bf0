"""Pictures to images: how many channels they have, and which values are 0 and 1.

`find` looks at all pictures of a source and returns an `ImageFormat`; `read` applies it to one
picture. A picture that contradicts the format is an error: nothing is guessed for one file alone.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from flax_unet.parallel import map_all
from flax_unet.pictures import (
    Content,
    DataError,
    has_alpha,
    name_of,
    open_content,
    resize_image,
)

Kind = Literal["8 bits", "integers", "floats"]
#: Percentiles of each picture between which the range of a data set is measured.
MEASURED = 0.1, 99.9


@dataclass(frozen=True)
class ImageFormat:
    """How pictures become images.

    Attributes:
        channels: of the images: 1 grey, 3 colours, 4 colours and alpha; or any number in arrays
            and TIFF pages.
        kind: of the values; None if any will do.
        low, high: the values that become 0 and 1, others are clipped; one for all channels, or one
            for each. 8 bits from 0 to 255 stay uint8.
        percentiles: if given, `low` and `high` are these percentiles of each picture's channel.
        convert: whether alpha is dropped, and colours become grey (ITU-R BT.601), if `channels`
            asks for it; otherwise such pictures are errors.
        pages: whether the channels are the pages of a TIFF file.
    """

    channels: int = 3
    kind: Kind | None = "8 bits"
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    percentiles: tuple[float, float] | None = None
    convert: bool = False
    pages: bool = False

    @property
    def raw(self) -> bool:
        """Whether values of 8 bits stay as they are."""
        whole = (self.low, self.high) == ((0.0,), (255.0,))
        return self.kind == "8 bits" and self.percentiles is None and whole

    def __post_init__(self):
        if len(self.low) not in (1, self.channels):
            raise DataError(
                f"there are {len(self.low)} ranges for {self.channels} channels: give LOW HIGH for "
                "all of them, or a pair for each"
            )

    def __str__(self) -> str:
        text = f"{self.channels} channel{'s' * (self.channels > 1)}"
        if self.percentiles is not None:
            return text + f", scaled by each picture's percentiles {_listed(self.percentiles)}"
        ranges = ", ".join(
            f"{low:g} to {high:g}" for low, high in zip(self.low, self.high, strict=True)
        )
        return text + f", {self.kind or 'any values'}, {ranges}"


#: Pictures of 8 bits in colour; others are converted if nothing is lost but alpha.
RGB = ImageFormat(convert=True)


def to_json(image_format: ImageFormat) -> dict[str, Any]:
    """A format as JSON."""
    return json.loads(json.dumps(asdict(image_format)))


def from_json(content: dict[str, Any]) -> ImageFormat:
    """The format that `to_json` wrote."""
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return ImageFormat(**values)


def read(
    picture: Content,
    image_format: ImageFormat = RGB,
    name: str = "picture",
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """A picture as an image [H, W, channels]: uint8, or float32 in [0, 1].

    Args:
        picture: from `pictures.open_content` or Pillow, or an array [H, W, channels].
        image_format: see above.
        name: what error messages call it.
        size: height and width to which the image is resized, if given.

    Raises:
        DataError: the picture has other channels or values than the format, or is not finite.
    """
    if size is None:
        return _read(picture, image_format, name)
    if isinstance(picture, Image.Image) and picture.mode == "RGB" and not has_alpha(picture):
        if image_format.channels == 3 and image_format.raw:
            # Most pictures: Pillow resizes them without two copies of all pixels.
            return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resize_image(_read(picture, image_format, name), size)


def _read(picture: Content, image_format: ImageFormat, name: str) -> np.ndarray:
    values = _channels(picture, image_format, name)
    kind = _kind(values)
    if image_format.kind not in (kind, None):
        raise DataError(
            f"{name}: its values are {kind} ({values.min():g} to {values.max():g}), and the images "
            f"should have {image_format}: say which values are black and white with --value-range "
            "LOW HIGH, or use --percentiles"
        )
    if image_format.raw:
        return values
    if not np.isfinite(values).all():
        raise DataError(f"{name}: it has values that are not finite: replace them")
    exact = values.astype(np.result_type(values, np.float32), copy=False)
    low, high = np.array(image_format.low), np.array(image_format.high)
    if image_format.percentiles is not None:
        low, high = np.percentile(exact, image_format.percentiles, axis=(0, 1))
    elif (exact > high + (high - low)).mean() > 0.5:
        warnings.warn(
            f"{name}: more than half of it becomes white, because its values are up to "
            f"{values.max():g} and the images should have {image_format}: say which values are "
            "black and white with --value-range LOW HIGH, or use --percentiles",
            stacklevel=2,
        )
    scaled = (exact - low.astype(exact.dtype)) / np.where(high > low, high - low, 1)
    return np.clip(scaled, 0, 1).astype(np.float32)


def _kind(values: np.ndarray) -> Kind:
    if values.dtype == np.uint8:
        return "8 bits"
    return "floats" if np.issubdtype(values.dtype, np.floating) else "integers"


def _channels(picture: Content, image_format: ImageFormat, name: str) -> np.ndarray:
    """The values of a picture, [H, W, channels]."""
    wanted = image_format.channels
    if isinstance(picture, list):
        if not image_format.pages:
            raise DataError(f"{name}: {len(picture)} pages: save each one as a separate file")
        values = _stack(picture, name)
    elif isinstance(picture, Image.Image):
        if has_alpha(picture):
            if _is_wide(picture):
                raise DataError(f"{name}: it has 16 bits and a transparent grey: save it without")
            if wanted == 4:
                return np.asarray(picture.convert("RGBA"))
            picture = _without_alpha(picture, image_format, name)
        if picture.mode == "1":
            picture = picture.convert("L")
        if picture.mode not in ("L", "RGB") and not _is_wide(picture):
            picture = picture.convert("RGB")
        values = np.asarray(picture)
        if values.ndim == 2:
            values = values[..., None]
        elif wanted == 1 and (values[..., :1] == values[..., 1:]).all():
            values = values[..., :1]
        elif wanted == 1 and image_format.convert:
            values = np.asarray(picture.convert("L"))[..., None]
    else:
        values = picture
    if wanted == 3 and values.shape[-1] == 1:
        return values.repeat(3, axis=-1)
    if values.shape[-1] != wanted:
        raise DataError(
            f"{name}: it has {values.shape[-1]} channels, and the images should have {wanted}: "
            "convert it or leave it out, or train with other --channels"
        )
    return values


def _stack(pages: list[Image.Image], name: str) -> np.ndarray:
    """The pages of a TIFF file as channels."""
    pages = [page.convert("L") if page.mode == "1" else page for page in pages]
    arrays = [np.asarray(page) for page in pages]
    if any(page.mode == "P" for page in pages) or any(
        array.shape != arrays[0].shape or array.ndim != 2 for array in arrays
    ):
        raise DataError(f"{name}: its pages have colours or several sizes: save them separately")
    return np.stack(arrays, axis=-1)


def _without_alpha(picture: Image.Image, image_format: ImageFormat, name: str) -> Image.Image:
    rgba = picture.convert("RGBA")
    if not image_format.convert and rgba.getchannel("A").getextrema()[0] != 255:
        raise DataError(
            f"{name}: it has transparent pixels: save it without, or train with --channels 3, "
            "which reads their colours (1 their grey), or --channels 4, which keeps the alpha"
        )
    # Pixel by pixel the stored colours: nothing is blended with a background.
    grey = picture.mode in ("L", "LA", "La")
    return rgba.convert("RGB").convert("L") if grey else rgba.convert("RGB")


def _is_wide(picture: Image.Image) -> bool:
    """Whether its grey values have more than 8 bits."""
    return picture.mode.startswith(("I", "F"))


# Finding out


class _Facts(NamedTuple):
    """What one picture says about the format."""

    name: str
    channels: int
    kind: Kind
    pages: bool = False
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)


def find(
    source: Sequence[dict[str, Any]],
    *,
    channels: int | None = None,
    value_range: Sequence[float] = (),
    percentiles: tuple[float, float] | None = None,
) -> ImageFormat:
    """The format of all pictures of a source, as far as it is not declared.

    All grey pictures have 1 channel; if some have colours, grey is repeated in 3. The range of
    values of more than 8 bits is measured per channel, from the lowest 0.1 percentile of a picture
    to the highest 99.9 percentile.

    Args:
        source: see `flax_unet.data`; the training split.
        channels: of the images.
        value_range: the values that become 0 and 1; for all channels, or a pair for each in turn.
        percentiles: of each picture, in [0, 100], that become 0 and 1.

    Raises:
        DataError: the declarations contradict each other or the pictures, or these one another; the
            message names the flags, or two pictures.
    """
    if channels is not None and channels < 1:
        raise DataError(f"--channels {channels}: it must be positive")
    if not len(source):
        raise DataError("there are no training pictures: check the folder or the split")
    ends = declared_range(value_range, percentiles)

    def look(i: int) -> _Facts:
        example = source[i]
        name = name_of(example)
        return _look(example["image"], name, channels, measure=ends is None)

    facts = map_all(look, range(len(source)))

    def different(field: str, remedy: str) -> DataError:
        a, b, *_ = {getattr(each, field): each for each in facts}.values()
        values = getattr(a, field), getattr(b, field)
        return DataError(f"{field}: {a.name} has {values[0]} and {b.name} {values[1]}: {remedy}")

    counts, kinds, pages = ({getattr(x, f) for x in facts} for f in ("channels", "kind", "pages"))
    if len(pages) > 1:
        raise different("pages", "save pages as separate files, or as .npy")
    if channels is None and len(counts) > 1 and counts != {1, 3}:
        raise different("channels", "choose with --channels, or leave some out")
    if len(kinds) > 1 and percentiles is None:
        raise different("kind", "convert some, or scale each picture with --percentiles")
    n, convert = channels or max(counts), channels is not None
    kind = kinds.pop() if percentiles is None else None
    if ends is None and kind == "8 bits":
        ends = (0.0,), (255.0,)
    low, high = ends or _measured(facts, n)
    return ImageFormat(n, kind, low, high, percentiles, convert, pages.pop())


def _measured(
    facts: Sequence[_Facts], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The range of each channel over all pictures."""
    for each in facts:
        if len(each.low) not in (1, channels):
            raise DataError(f"{each.name}: it has {each.channels} channels, and not {channels}")
    low = np.min([np.broadcast_to(each.low, channels) for each in facts], 0)
    high = np.max([np.broadcast_to(each.high, channels) for each in facts], 0)
    if not (low < high).all():
        i = int(np.argmin(low < high))
        raise DataError(
            f"channel {i} of all training pictures is {low[i]:g}: leave it out, or say which "
            "values are black and white with --value-range LOW HIGH"
        )
    return tuple(low.tolist()), tuple(high.tolist())


def declared_range(
    value_range: Sequence[float], percentiles: tuple[float, float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """`low` and `high` of a format from the flags, see `find`; None if neither is given.

    Raises:
        DataError: both are given, or one is out of range.
    """
    if value_range and percentiles is not None:
        raise DataError("give only one of --value-range and --percentiles")
    if percentiles is not None:
        if not 0 <= percentiles[0] < percentiles[1] <= 100:
            raise DataError(f"--percentiles {_listed(percentiles)}: use two such as 1 99")
        return (0.0,), (1.0,)
    if not value_range:
        return None
    low, high = tuple(value_range[::2]), tuple(value_range[1::2])
    if len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
        raise DataError(f"--value-range {_listed(value_range)}: give LOW HIGH, or a pair a channel")
    return low, high


def _look(data: bytes, name: str, channels: int | None, *, measure: bool) -> _Facts:
    picture = open_content(data, name, decode=False)
    if isinstance(picture, Image.Image) and not _is_wide(picture):  # its header is enough
        return _Facts(name, 1 if picture.mode in ("1", "L", "LA", "La") else 3, "8 bits")
    pages = isinstance(picture, list)
    if pages and channels is None:
        n = len(picture)
        raise DataError(
            f"{name}: it has {n} pages: --channels {n} reads them as channels, or save each one as "
            "a separate file"
        )
    values = _stack(picture, name) if isinstance(picture, list) else np.asarray(picture)
    values = values[..., None] if values.ndim == 2 else values
    facts = _Facts(name, values.shape[-1], _kind(values), pages)
    if not measure or facts.kind == "8 bits":
        return facts
    if not np.isfinite(values).all():
        raise DataError(f"{name}: it has values that are not finite: replace them")
    low, high = np.percentile(values, MEASURED, axis=(0, 1))
    return facts._replace(low=tuple(low.tolist()), high=tuple(high.tolist()))


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
