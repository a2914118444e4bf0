"""Nine shifts: pictures as another endoscope or hospital could have taken them, made by code.

    shifted = Shifted(source, "hue", mask_format, image_format)
    batches = score(model, variables, shifted, size, shifted.mask_format, image_format)

`SHIFTS` has functions `(rng, image, mask) -> (image, mask)` of an image, uint8 [H, W, 1] or
[H, W, 3], and its mask, uint8 [H, W, K]; they keep shapes and types. Some take a `strength` in
(0, 1], the fraction of their effect. Shifts measure what a model loses, see `summary`; a model that
was trained on them would have to be measured otherwise.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from flax_unet import data, formats, metrics
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.metrics import Confusion
from flax_unet.pictures import DataError

Rng = np.random.Generator
Array = np.ndarray
Pair = tuple[np.ndarray, np.ndarray]
#: Left, top, width and height, in pixels.
Box = tuple[float, float, float, float]


def hue(rng: Rng, image: Array, mask: Array, strength: float = 1.0) -> Pair:
    """Rotate the colours by 25 degrees about the grey axis, and make the light warmer or colder.

    Red is multiplied by 1.25 and blue divided by it, or the other way round; a coin decides, and
    another one in which direction to rotate. For the rotation see `augment.recolour`. An image
    without colours stays as it is.
    """
    angle, tint = np.deg2rad(25 * strength * _sign(rng)), 1.25 ** (strength * _sign(rng))
    if (image == image[..., :1]).all():
        return image, mask
    cos, sin = np.cos(angle), np.sin(angle) / 3**0.5
    main, right, left = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    rotation = np.array([[main, right, left], [left, main, right], [right, left, main]])
    return _as_uint8(image @ rotation.T * (tint, 1, 1 / tint)), mask


def gamma(rng: Rng, image: Array, mask: Array, strength: float = 1.0) -> Pair:
    """Raise the values, as fractions of 255, to the power 2 or 1 / 2; a coin decides."""
    table = _as_uint8(255 * (np.arange(256) / 255) ** 2.0 ** (strength * _sign(rng)))
    return table[image], mask


def blur(rng: Rng, image: Array, mask: Array, strength: float = 1.0) -> Pair:
    """Blur with a Gaussian whose standard deviation is 1.2 % of the shorter side.

    It is Pillow's, which approximates it by three box blurs.
    """
    gaussian = ImageFilter.GaussianBlur(0.012 * strength * min(image.shape[:2]))
    return np.asarray(_picture(image).filter(gaussian)).reshape(image.shape), mask


def vignette(rng: Rng, image: Array, mask: Array, strength: float = 1.0) -> Pair:
    """Multiply by 1 - 0.8 r^2, where r is the distance from the centre, and 1 in the corners."""
    y, x = (np.linspace(-1, 1, n) ** 2 / 2 for n in image.shape[:2])
    return _as_uint8(image * (1 - 0.8 * strength * (y[:, None, None] + x[:, None]))), mask


def jpeg(rng: Rng, image: Array, mask: Array, strength: float = 1.0) -> Pair:
    """Code as JPEG of quality 10 / strength, by Pillow."""
    _picture(image).save(stream := io.BytesIO(), "JPEG", quality=round(10 / strength))
    return np.asarray(Image.open(stream)).reshape(image.shape), mask


def crop(rng: Rng, image: Array, mask: Array) -> Pair:
    """Enlarge a part with 70 to 80 % of each side, at random, to the size of the image.

    It is the first of 10 parts that has half of the objects' pixels, of all classes but the first.
    If none has, it is the one in a corner that has most: a quarter at least, because the four of
    them cover the image.
    """
    height, width = image.shape[:2]

    def part(side: float, down: float, right: float) -> Box:
        return (1 - side) * right * width, (1 - side) * down * height, side * width, side * height

    side = rng.uniform(0.7, 0.8)
    parts = [part(side, *place) for place in rng.random((10, 2))]
    corners = [part(side, *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    good = (box for box in parts if _kept(mask, box) >= 0.5)
    return _show(image, mask, next(good, None) or max(corners, key=lambda box: _kept(mask, box)))


def zoom(rng: Rng, image: Array, mask: Array) -> Pair:
    """Enlarge by 4/3 about the centre, or shrink by it, on black; a coin decides.

    An image that would lose more than half of its objects' pixels is shrunk. The black border does
    not count, because it is the background of some data sets only.
    """
    height, width = image.shape[:2]
    near = width / 8, height / 8, width * 3 / 4, height * 3 / 4
    far = -width / 6, -height / 6, width * 4 / 3, height * 4 / 3
    return _show(image, mask, near if _sign(rng) > 0 and _kept(mask, near) >= 0.5 else far)


def smoke(rng: Rng, image: Array, mask: Array) -> Pair:
    """Cover with a light grey, 220, of an opacity up to 0.75: random at 4x4 knots, cubic between.

    Below a value of 32 it is less, and black stays black: no light is scattered beside the view.
    """
    knots, (height, width) = Image.fromarray(rng.random((4, 4), np.float32)), image.shape[:2]
    density = np.asarray(knots.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    opacity = 0.75 * density[..., None] * (image.max(-1, keepdims=True) / 32).clip(0, 1)
    return _as_uint8(image * (1 - opacity) + 220 * opacity), mask


def together(rng: Rng, image: Array, mask: Array) -> Pair:
    """Blur, vignette, hue, gamma and JPEG, in this order, each at half its strength."""
    for change in (blur, vignette, hue, gamma, jpeg):
        image, mask = change(rng, image, mask, 0.5)
    return image, mask


#: The shifts by their names.
SHIFTS: dict[str, Callable[[Rng, Array, Array], Pair]] = {
    change.__name__: change
    for change in (hue, gamma, blur, vignette, jpeg, crop, zoom, smoke, together)
}


class Shifted(Sequence[dict[str, Any]]):
    """A source with the same pictures, shifted; several threads may read it.

    What is random depends only on the name of the shift and on the bytes of the picture's file.

    Args:
        source: see `flax_unet.data`.
        name: of the shift, one of `SHIFTS`.
        mask_format: what the values of its masks mean.
        image_format: channels and range of its images: 1 or 3, of 8 bits.

    Attributes:
        mask_format: what the values of the shifted masks mean: indices of the same classes.

    Raises:
        DataError: the pictures have other channels or values. An entry raises it if it is unusable.
    """

    def __init__(
        self,
        source: Sequence[dict[str, Any]],
        name: str,
        mask_format: MaskFormat,
        image_format: ImageFormat,
    ):
        if not image_format.raw or image_format.channels not in (1, 3) or image_format.pages:
            raise DataError(
                f"the pictures have {image_format}, and shifts are defined for grey or colours of "
                "8 bits, 0 to 255: leave out --shifted"
            )
        if name not in SHIFTS:
            raise DataError(f"there is no shift {name!r}: choose one of {', '.join(SHIFTS)}")
        self._source, self._name, self._formats = source, name, (mask_format, image_format)
        self.mask_format = formats.of_indices(mask_format)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:  # type: ignore[override]
        example = self._source[i]
        digest = hashlib.sha256(self._name.encode() + example["image"]).digest()
        rng = np.random.default_rng(int.from_bytes(digest))
        pair = data.decode_pair(example, *self._formats)
        image, mask = SHIFTS[self._name](rng, *pair)
        separate = self.mask_format.separate
        return data.encode_pair(example["name"], image, mask, separate=separate)


def summary(plain: Confusion, shifted: Mapping[str, Confusion]) -> dict[str, dict[str, Any]]:
    """Dice and IoU per image of shifted pictures, their mean over shifts, and what they lose.

    Args:
        plain: counts per image [N, C] of the pictures as they are.
        shifted: those of the same pictures for each shift.

    Returns:
        For each shift, `mean` and `drop` (plain minus mean): the mean over images of both ratios,
        and its 95 % interval. That of `drop` is paired: of the differences per image.
    """

    def ratios(counts: Confusion) -> np.ndarray:
        return np.stack([metrics.dice(counts).mean(-1), metrics.iou(counts).mean(-1)], -1)

    values = {name: ratios(counts) for name, counts in shifted.items()}
    values["mean"] = np.mean([*values.values()], 0)
    values["drop"] = ratios(plain) - values["mean"]
    keys = "dice_per_image", "iou_per_image", "dice_per_image_interval", "iou_per_image_interval"
    return {
        name: dict(zip(keys, [*x.mean(0).tolist(), *metrics.bootstrap_interval(x)], strict=True))
        for name, x in values.items()
    }


def _sign(rng: Rng) -> int:
    return 1 if rng.random() < 0.5 else -1


def _as_uint8(image: Array) -> Array:
    return image.round().clip(0, 255).astype(np.uint8)


def _picture(image: Array) -> Image.Image:
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def _kept(mask: Array, box: Box) -> float:
    """The fraction of the objects' pixels that is in a box; 1 if there is no object."""
    left, top, width, height = box
    objects = ((mask > 0) & (mask != IGNORE)).any(-1)
    inside = objects[round(top) : round(top + height), round(left) : round(left + width)]
    return inside.sum() / objects.sum() if objects.any() else 1.0


def _show(image: Array, mask: Array, box: Box) -> Pair:
    """What is in a box, at the size of the image: bilinear, and the nearest pixel of the mask."""

    def resample(x: Array, how: Image.Resampling, outside: int) -> Array:
        height, width = x.shape[:2]
        affine = box[2] / width, 0, box[0], 0, box[3] / height, box[1]
        to = (width, height), Image.Transform.AFFINE, affine, how
        pictures = (Image.fromarray(channel) for channel in np.moveaxis(x, -1, 0))
        shown = [np.asarray(each.transform(*to, fillcolor=outside)) for each in pictures]
        return np.stack(shown, axis=-1)

    how = Image.Resampling
    return resample(image, how.BILINEAR, 0), resample(mask, how.NEAREST, IGNORE)
