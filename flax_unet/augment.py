"""Random changes of the training pictures, on the device: jitted, batched, image and mask as one.

An augmentation is a function `(key, image, mask) -> (image, mask)` of a batch. Each image has a key
of its own, so it is changed alike whatever the batch around it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_unet.data import as_float

Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# The share of each primary in grey: ITU-R BT.601, which Pillow's "L" follows.
LUMA = (0.299, 0.587, 0.114)


def chain(*augments: Augment) -> Augment:
    """The augmentations one after the other, each with randomness of its own."""

    def chained(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i, augment in enumerate(augments):
            image, mask = augment(jax.random.fold_in(key, i), image, mask)
        return image, mask

    return chained


def random_flips(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirror each image with its mask, left to right and top to bottom, with probability 1/2 each.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], of any type.
        mask: [B, H, W, K], of any type.
    """

    def flip(key: jax.Array, x: jax.Array) -> jax.Array:
        upside_down, mirrored = jax.random.bernoulli(key, shape=(2,))
        x = jnp.where(upside_down, x[::-1], x)
        return jnp.where(mirrored, x[:, ::-1], x)

    keys = _keys(key, image)
    return jax.vmap(flip)(keys, image), jax.vmap(flip)(keys, mask)


def random_affine(
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
    *,
    rotation: float = 180.0,
    scale: float = 1.25,
    shear: float = 10.0,
    shift: float = 0.1,
    elastic: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Mirror, turn, scale, shear, shift and bend each image with its mask: one resampling.

    Either mirroring has probability 1/2, the rest is uniform. What comes from outside of the
    picture is black, and no foreground.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: [B, H, W, K] of 0 and 1.
        rotation: degrees, at most, either way.
        scale: at most this factor, and at least its inverse; uniform in the logarithm.
        shear: degrees, at most, either way.
        shift: share of the height and of the width, at most, either way.
        elastic: share of the height and of the width, the standard deviation of the way by which
            each knot of a 5x5 grid is moved; the rest follows smoothly (Simard, Steinkraus, Platt:
            "Best Practices for Convolutional Neural Networks", ICDAR 2003, whose field is finer).

    Returns:
        The image, float32 in [0, 1], and the mask, uint8: 1 where half of what is there was.
    """

    def bend(key: jax.Array, height: int, width: int) -> jax.Array:
        knots = jax.random.normal(key, (5, 5, 2)) * elastic * jnp.array([[[height, width]]])
        return jax.image.resize(knots, (height, width, 2), "cubic")

    def one(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        height, width, channels = image.shape
        u = jax.random.uniform(key, (7,), minval=-1.0)
        matrix = affine(
            rotation=rotation * u[0],
            scale=scale ** u[1] * jnp.where(u[2:4] < 0, -1.0, 1.0),
            shear=shear * u[4],
            shift=shift * u[5:] * jnp.array([height, width]),
        )
        both = jnp.concatenate([as_float(image), mask.astype(jnp.float32)], axis=-1)
        way = bend(jax.random.fold_in(key, 1), height, width) if elastic else None
        both = warp(both, matrix, way)
        return both[..., :channels], (both[..., channels:] >= 0.5).astype(jnp.uint8)

    return jax.vmap(one)(_keys(key, image), image, mask)


def affine(
    *,
    rotation: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    shear: ArrayLike = 0.0,
    shift: ArrayLike = 0.0,
) -> jax.Array:
    """The matrix for `warp` that scales a picture, shears, turns and shifts it, in this order.

    Args:
        rotation: degrees, counter-clockwise.
        scale: the factor, or that of the rows and that of the columns; negative to mirror.
        shear: degrees by which a vertical line leans, to the right below.
        shift: pixels downwards and to the right.

    Returns:
        Float32 [2, 3].
    """
    angle, slope = jnp.deg2rad(rotation), jnp.tan(jnp.deg2rad(shear))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Written out, for accelerators round the factors of a matrix product.
    inverse = jnp.array([[cos, sin], [-sin - slope * cos, cos - slope * sin]])
    inverse = inverse / jnp.broadcast_to(jnp.asarray(scale), (2,))[:, None]
    offset = -(inverse * jnp.broadcast_to(jnp.asarray(shift), (2,))[None]).sum(1)
    return jnp.concatenate([inverse, offset[:, None]], axis=1)


def warp(image: jax.Array, matrix: jax.Array, way: jax.Array | None = None) -> jax.Array:
    """Resample a picture by an affine map, bilinearly, with zeros around it.

    Args:
        image: float32 [H, W, C].
        matrix: [2, 3]: the pixel at (row, column) is taken from matrix @ (row, column, 1), both
            counted from the picture's centre.
        way: [H, W, 2], rows and columns to be added to that place.

    Returns:
        Float32 [H, W, C].
    """
    height, width, _ = image.shape
    middle = (height - 1) / 2, (width - 1) / 2
    row = jnp.arange(height)[:, None] - middle[0]
    column = jnp.arange(width)[None] - middle[1]

    def position(axis: int, size: int) -> tuple[jax.Array, jax.Array]:
        """The pixel before the point, counted in the padded picture, and the way on to the next."""
        a, b, c = matrix[axis]
        at = a * row + b * column + c + middle[axis]
        at = jnp.clip(at if way is None else at + way[..., axis], -1, size) + 1
        before = jnp.floor(at)
        return before.astype(jnp.int32), (at - before)[..., None]

    (y, dy), (x, dx) = position(0, height), position(1, width)
    padded = jnp.pad(image, ((1, 2), (1, 2), (0, 0)))

    def pixel(y: jax.Array, x: jax.Array) -> jax.Array:
        return padded.at[y, x].get(mode="promise_in_bounds")

    above = pixel(y, x) * (1 - dx) + pixel(y, x + 1) * dx
    below = pixel(y + 1, x) * (1 - dx) + pixel(y + 1, x + 1) * dx
    return above * (1 - dy) + below * dy


def random_colour(
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
    *,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 10.0,
) -> tuple[jax.Array, jax.Array]:
    """Change the colours of each image, uniformly; its mask stays.

    Args:
        key: a PRNG key.
        image: [B, H, W, 3], uint8 or float in [0, 1].
        mask: anything.
        brightness, contrast, saturation: the factors are 1 plus or minus this, at most.
        hue: degrees, at most, either way.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (4,), minval=-1.0)
        return recolour(
            image,
            brightness=1 + brightness * u[0],
            contrast=1 + contrast * u[1],
            saturation=1 + saturation * u[2],
            hue=hue * u[3],
        )

    return jax.vmap(one)(_keys(key, image), as_float(image)), mask


def recolour(
    image: jax.Array,
    *,
    brightness: ArrayLike = 1.0,
    contrast: ArrayLike = 1.0,
    saturation: ArrayLike = 1.0,
    hue: ArrayLike = 0.0,
) -> jax.Array:
    """Change brightness, contrast, saturation and hue, in this order, by one matrix.

    The first three mix the image with black, with its mean grey and with its own grey, as Pillow's
    `ImageEnhance` does; hue turns the colours about the grey axis (Rodrigues' formula).

    Args:
        image: float32 [H, W, 3] in [0, 1].
        brightness, contrast, saturation: factors; 1 changes nothing, 0 leaves black or grey.
        hue: degrees; 120 makes red green, green blue and blue red.

    Returns:
        Float32 [H, W, 3], clipped to [0, 1].
    """
    luma = jnp.array(LUMA)
    cos, sin = jnp.cos(jnp.deg2rad(hue)), jnp.sin(jnp.deg2rad(hue)) / 3**0.5
    same, before, after = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    turn = jnp.array([[same, before, after], [after, same, before], [before, after, same]])
    # turn @ (saturation * identity + (1 - saturation) * grey), and turn leaves grey as it is
    matrix = saturation * turn + (1 - saturation) * jnp.broadcast_to(luma[None], (3, 3))
    mean_grey = brightness * (image.mean((0, 1)) * luma).sum()
    # Written out, for accelerators round the factors of a matrix product.
    mixed = (image[..., None, :] * (brightness * contrast * matrix)[None, None]).sum(-1)
    return jnp.clip(mixed + (1 - contrast) * mean_grey, 0, 1)


def random_blur(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, sigma: float = 1.5
) -> tuple[jax.Array, jax.Array]:
    """Blur every second image, on average; its mask stays.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: anything.
        sigma: pixels, at most, uniform from 0: see `blur`.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        return blur(image, sigma * _half(key), radius=math.ceil(2 * sigma))

    return jax.vmap(one)(_keys(key, image), as_float(image)), mask


def blur(image: jax.Array, sigma: ArrayLike, *, radius: int) -> jax.Array:
    """Convolve with a Gaussian, the borders repeated.

    Args:
        image: float32 [H, W, C].
        sigma: pixels; 0 changes nothing.
        radius: pixels to either side after which the Gaussian is cut off.

    Returns:
        Float32 [H, W, C].
    """
    distance = jnp.arange(-radius, radius + 1)
    # By a sigma of 0 nothing can be divided; of this one only the middle is left.
    weight = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-6)) ** 2)
    weight = weight / weight.sum()
    for axis in (0, 1):
        size, pad = image.shape[axis], [(0, 0)] * 3
        pad[axis] = (radius, radius)
        wide = jnp.pad(image, pad, mode="edge")
        # Shifted sums: few taps, and quicker than a depthwise convolution on a CPU.
        taps = [
            weight[i] * jax.lax.slice_in_dim(wide, i, i + size, axis=axis)
            for i in range(2 * radius + 1)
        ]
        image = jnp.stack(taps).sum(0)
    return image


def random_noise(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, deviation: float = 0.05
) -> tuple[jax.Array, jax.Array]:
    """Add Gaussian noise to every second image, on average; its mask stays.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: anything.
        deviation: the noise's standard deviation, at most, uniform from 0.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, 1), image.shape)
        return jnp.clip(image + deviation * _half(key) * noise, 0, 1)

    return jax.vmap(one)(_keys(key, image), as_float(image)), mask


def random_cutout(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, side: float = 0.3
) -> tuple[jax.Array, jax.Array]:
    """Paint a rectangle of every second image, on average, in its mean colour; its mask stays.

    DeVries, Taylor: "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: anything.
        side: of the rectangle, share of the height and of the width, at most.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (4,))
        size = side * u[:2] * (_half(jax.random.fold_in(key, 1)) > 0)
        inside = [
            abs(jnp.arange(n) + 0.5 - n * u[2 + axis]) < n * size[axis] / 2
            for axis, n in enumerate(image.shape[:2])
        ]
        hidden = inside[0][:, None, None] & inside[1][None, :, None]
        return jnp.where(hidden, image.mean((0, 1), keepdims=True), image)

    return jax.vmap(one)(_keys(key, image), as_float(image)), mask


def _half(key: jax.Array) -> jax.Array:
    """0 with probability 1/2, else uniform in [0, 1)."""
    return jnp.maximum(jax.random.uniform(key, minval=-1.0), 0)


def _keys(key: jax.Array, image: jax.Array) -> jax.Array:
    """A key for each image of a batch, which depends on its place alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(image)))
