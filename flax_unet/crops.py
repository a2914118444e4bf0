"""Training on crops of pictures at their own resolution, whatever their sizes.

An epoch has enough crops to cover the area of all pictures: for each picture, its area divided by
that of a crop, rounded up. The place of crop i in epoch e is random and depends on (seed, e, i)
alone, so a resumed training sees the same crops. Two thirds are uniform over their picture. A third
is centred at a random pixel of a random class in the picture, then moved into the picture, as in:
Isensee et al.: "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods, 2021.

What is cut is a larger *frame* around each crop, from which `augment.random_affine` takes the crop:
so turned and shrunk crops, too, are filled with the picture. Pixels from outside of the picture are
0 in the image, and do not count in the mask.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_unet import data, summary
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.parallel import map_all
from flax_unet.pictures import name_of, open_content, size_of

#: Fraction of the crops that are centred at a pixel of a class: nnU-Net's.
FOREGROUND = 1 / 3
#: Pixels of a class in a picture among which is chosen.
PLACES = 10_000

Size = tuple[int, int]


@dataclass(frozen=True)
class Crops:
    """Sizes, seed and pictures of the crops of an epoch.

    Attributes:
        size: height and width of a crop.
        frame: height and width of the frame that is cut around it, see `frame_of`.
        seed: of the random places.
        picture: int [n], index of the picture of each crop.
    """

    size: Size
    frame: Size
    seed: int
    picture: np.ndarray

    def __len__(self) -> int:
        return len(self.picture)


def crops_of(areas: Sequence[int], size: Size, frame: Size, seed: int) -> Crops:
    """The crops of an epoch of pictures with so many pixels; see `Crops`."""
    numbers = [-(-area // math.prod(size)) for area in areas]
    return Crops(size, frame, seed, np.repeat(np.arange(len(areas)), numbers))


def frame_of(size: Size, affine: Mapping[str, Any] | None) -> Size:
    """How much must be cut for a crop that `augment.random_affine` turns and shrinks.

    Args:
        size: height and width of the crop.
        affine: its settings; None if there is none. Shear and elastic deformation are left out:
            at the corners of a few crops they reach beyond the frame.
    """
    if affine is None:
        return size
    angle = math.radians(min(affine.get("rotation", 180.0), 90.0))

    def side(along: int, across: int) -> int:
        turn = min(angle, math.atan2(across, along))  # the diagonal reaches farthest
        needed = affine.get("scale", 1.25) * (along * math.cos(turn) + across * math.sin(turn))
        return along + 2 * math.ceil((needed - along) / 2)

    return side(*size), side(*size[::-1])


def places_of(mask: np.ndarray) -> list[np.ndarray]:
    """For each class in a mask but the background, flat indices of at most `PLACES` of its pixels.

    Args:
        mask: uint8 [H, W, 1] of class indices, or [H, W, K] of 0 and 1 for overlapping classes.
    """
    found = []
    for channel in np.moveaxis(mask, -1, 0):
        for index in np.flatnonzero(np.bincount(channel.ravel(), minlength=IGNORE)[:IGNORE]):
            if index:
                pixels = np.flatnonzero(channel == index)
                found.append(pixels[:: -(-len(pixels) // PLACES)])
    return found


def place(crops: Crops, i: int, epoch: int, shape: Size, places: Sequence[np.ndarray]) -> Size:
    """Top and left of crop i in its picture; negative in one that is smaller than the crop.

    Args:
        crops: of the epoch.
        i: index of the crop.
        epoch: from 0.
        shape: height and width of the picture.
        places: see `places_of`.
    """
    rng = np.random.default_rng((crops.seed, epoch, i))
    if places and rng.random() < FOREGROUND:
        pixels = places[int(rng.integers(len(places)))]
        centre = divmod(int(pixels[int(rng.integers(len(pixels)))]), shape[1])
        corner = [c - side // 2 for c, side in zip(centre, crops.size, strict=True)]
    else:
        room = (n - side for n, side in zip(shape, crops.size, strict=True))
        corner = [int(rng.integers(max(0, r) + 1)) for r in room]

    def inside(start: int, n: int, side: int) -> int:
        return min(max(start, 0), n - side) if n >= side else (n - side) // 2

    top, left = map(inside, corner, shape, crops.size)
    return top, left


class Resident(NamedTuple):
    """Pictures of any sizes on the device, one after the other, row by row.

    Attributes:
        image: [P, C], uint8 or float32, with a frame's width of padding at both ends.
        mask: uint8 [P, K], likewise.
        offset: int [N], where each picture begins.
        shape: N heights and widths.
        places: for each picture, see `places_of`.
        arrays: names, facts and formats; without pixels.
    """

    image: jax.Array
    mask: jax.Array
    offset: np.ndarray
    shape: list[Size]
    places: list[list[np.ndarray]]
    arrays: data.Arrays


def load(
    source: Sequence[dict[str, Any]],
    mask_format: MaskFormat,
    image_format: ImageFormat,
    padding: int,
    *,
    pictures: dict[bytes, str] | None = None,
) -> Resident:
    """Decode all pictures of a source and copy them to the first device.

    Args:
        source, mask_format, image_format, pictures: as `data.load` takes them.
        padding: width of the frames that will be cut.

    Raises:
        DataError: an entry is unusable, or there are 2^31 pixels and more.
    """

    def decode(i: int) -> tuple[np.ndarray, np.ndarray, str, summary.Facts, list[np.ndarray]]:
        example = source[i]
        image, mask = data.decode_pair(example, mask_format, image_format)
        return image, mask, example["name"], summary.facts(mask, mask), places_of(mask)

    images, masks, names, facts, places = zip(*map_all(decode, range(len(source))), strict=True)
    sizes = [image.shape[0] * image.shape[1] for image in images]
    if (total := sum(sizes) + 2 * padding) >= 2**31:
        raise data.DataError(f"the pictures have {total:,} pixels, too many for a device: --stream")

    def packed(arrays: Sequence[np.ndarray]) -> jax.Array:
        ends = np.zeros((padding, arrays[0].shape[-1]), arrays[0].dtype)
        flat = (array.reshape(-1, array.shape[-1]) for array in arrays)
        return jax.device_put(np.concatenate([ends, *flat, ends]))

    content = data.fingerprint(source, pictures)
    nothing = np.zeros((0, 1), np.uint8)
    arrays = data.Arrays(nothing, nothing, list(names), content, mask_format, facts, image_format)
    offset = padding + np.cumsum([0, *sizes[:-1]])
    shape = [image.shape[:2] for image in images]
    return Resident(packed(images), packed(masks), offset, shape, list(places), arrays)


def bytes_per_pixel(mask_format: MaskFormat, image_format: ImageFormat) -> int:
    """Of image and mask in memory."""
    masks = mask_format.channels if mask_format.overlapping else 1
    return image_format.channels * (1 if image_format.raw else 4) + masks


def batches(
    resident: Resident, crops: Crops, batch_size: int, order: np.ndarray, *, epoch: int
) -> Iterator[dict[str, Any]]:
    """Batches of crops, cut on the device.

    Args:
        resident: from `load`.
        crops: from `crops_of`.
        batch_size: crops per batch.
        order: their indices, in order.
        epoch: from 0.

    Yields:
        `image` [B, *frame, C], `mask` uint8 [B, *frame, K], and `weight` float32 [B].
    """
    for start in range(0, len(order), batch_size):
        rows, weight = data.pad(order[start : start + batch_size], batch_size)
        corners = []
        for i in rows:
            n = crops.picture[i]
            shape = resident.shape[n]
            top, left = place(crops, int(i), epoch, shape, resident.places[n])
            corners.append((resident.offset[n], *shape, *_corner(crops, top, left)))
        cut = np.array(corners, np.int32)
        image, mask = _cut(resident.image, resident.mask, cut, crops.frame)
        yield {"image": image, "mask": mask, "weight": weight}


def _corner(crops: Crops, top: int, left: int) -> Size:
    """Top and left of the frame around a crop."""
    margins = [(f - s) // 2 for f, s in zip(crops.frame, crops.size, strict=True)]
    return top - margins[0], left - margins[1]


@partial(jax.jit, static_argnums=3)
def _cut(
    image: jax.Array, mask: jax.Array, corners: jax.Array, frame: Size
) -> tuple[jax.Array, jax.Array]:
    """Frames of pictures stored row by row; `corners` are (offset, height, width, top, left)."""

    def one(corner: jax.Array) -> tuple[jax.Array, jax.Array]:
        offset, height, width, top, left = corner
        rows, columns = top + jnp.arange(frame[0]), left + jnp.arange(frame[1])
        starts = offset + jnp.clip(rows, 0, height - 1) * width + jnp.clip(left, -frame[1], width)
        in_rows, in_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        inside = in_rows[:, None, None] & in_columns[None, :, None]

        def read(flat: jax.Array) -> jax.Array:
            size = frame[1], flat.shape[1]
            return jax.vmap(lambda start: jax.lax.dynamic_slice(flat, (start, 0), size))(starts)

        outside = jnp.array(IGNORE, mask.dtype)
        image_part = jnp.where(inside, read(image), jnp.zeros((), image.dtype))
        return image_part, jnp.where(inside, read(mask), outside)

    return jax.vmap(one)(corners)


def stream(
    source: Sequence[dict[str, Any]],
    crops: Crops,
    batch_size: int,
    order: np.ndarray,
    *,
    epoch: int,
    mask_format: MaskFormat,
    image_format: ImageFormat,
    mesh: Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """The batches of `batches`, from pictures that are decoded for each crop on all cores.

    Needs grain, the extra `stream`. For the arguments see `batches`, `data.load` and
    `data.decoded_batches`.
    """

    def frame(i: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = data.decode_pair(source[crops.picture[i]], mask_format, image_format)
        top, left = place(crops, i, epoch, image.shape[:2], places_of(mask))
        corner = _corner(crops, top, left)
        return _frame(image, corner, crops.frame, 0), _frame(mask, corner, crops.frame, IGNORE)

    yield from data.decoded_batches(frame, order, batch_size, mesh)


def _frame(array: np.ndarray, corner: Size, frame: Size, outside: int) -> np.ndarray:
    """A frame of an array [H, W, C], with a value outside of it."""
    result = np.full((*frame, array.shape[-1]), outside, array.dtype)
    (top, bottom), (left, right) = (
        (max(0, start), min(n, start + side))
        for start, n, side in zip(corner, array.shape[:2], frame, strict=True)
    )
    if top < bottom and left < right:
        rows = slice(top - corner[0], bottom - corner[0])
        columns = slice(left - corner[1], right - corner[1])
        result[rows, columns] = array[top:bottom, left:right]
    return result


def areas(source: Sequence[dict[str, Any]]) -> list[int]:
    """The number of pixels of each picture of a source, from its header."""

    def area(i: int) -> int:
        example = source[i]
        name = name_of(example)
        return math.prod(size_of(open_content(example["image"], name, decode=False)))

    return map_all(area, range(len(source)))


def whole(
    source: Sequence[dict[str, Any]],
    size: Size,
    mask_format: MaskFormat,
    image_format: ImageFormat,
    *,
    pictures: dict[bytes, str] | None = None,
) -> data.Arrays:
    """All pictures of a source as tiles of a size, in which each pixel counts once.

    The last tile of a row or column is moved back into the picture. What it repeats does not count,
    nor do the zeros around a picture that is smaller than a tile.

    Args:
        source, mask_format, image_format, pictures: as `data.load` takes them.
        size: height and width of the tiles.
    """

    def decode(i: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str], summary.Facts]:
        example = source[i]  # read once, and not for each tile
        image, mask = data.decode_pair(example, mask_format, image_format)
        images, masks, names = [], [], []
        for top, rows in _parts(image.shape[0], size[0]):
            for left, columns in _parts(image.shape[1], size[1]):
                images.append(_frame(image, (top, left), size, 0))
                tile = _frame(mask, (top, left), size, IGNORE)
                tile[:rows], tile[:, :columns] = IGNORE, IGNORE
                masks.append(tile)
                names.append(f"{example['name']} at {top}, {left}")
        return images, masks, names, summary.facts(mask, mask)

    *tiles, facts = zip(*map_all(decode, range(len(source))), strict=True)
    images, masks, names = ([x for each in part for x in each] for part in tiles)
    content = data.fingerprint(source, pictures)
    both = np.stack(images), np.stack(masks)
    return data.Arrays(*both, names, content, mask_format, facts, image_format, decoded=True)


def _parts(size: int, side: int) -> list[tuple[int, int]]:
    """Starts of tiles along an axis, and how many of their first pixels are in the one before."""
    starts = [min(start, max(0, size - side)) for start in range(0, size, side)]
    return [(a, max(0, b + side - a)) for b, a in pairwise([-side, *starts])]
