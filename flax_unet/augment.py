"""Random augmentation on the device: jitted and batched, each image together with its mask.

An augmentation is a function `(key, image, mask) -> (image, mask)` of a batch. Each image has its
own key, so the result does not depend on the rest of the batch.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_unet import jpeg
from flax_unet.jpeg import LUMA
from flax_unet.pictures import as_float

Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def chain(*augments: Augment) -> Augment:
    """Apply the augmentations in order, each with its own key."""

    def chained(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i, augment in enumerate(augments):
            image, mask = augment(jax.random.fold_in(key, i), image, mask)
        return image, mask

    return chained


def random_flips(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flip each image and its mask left to right and top to bottom, each with probability 1/2.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], of any dtype.
        mask: [B, H, W, K], of any dtype.
    """

    def flip(flips: jax.Array, x: jax.Array) -> jax.Array:
        x = jnp.where(flips[0], x[::-1], x)
        return jnp.where(flips[1], x[:, ::-1], x)

    flips = jax.vmap(lambda key: jax.random.bernoulli(key, shape=(2,)))(_keys(key, image))
    return jax.vmap(flip)(flips, image), jax.vmap(flip)(flips, mask)


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
    upright: bool = False,
    outside: int = 0,
    size: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Flip, rotate, scale, shear, shift and bend each image and its mask in one resampling.

    Each of the two flips has probability 1/2; rotation, shear and shift are uniform. Pixels from
    outside the image are black in the image and `outside` in the mask.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: uint8 [B, H, W, K] of any values: 0 and 1, or class indices and `classes.IGNORE`.
        rotation: maximum in degrees, in either direction.
        scale: maximum factor; its inverse is the minimum. Uniform in the logarithm.
        shear: maximum in degrees, in either direction.
        shift: maximum as a fraction of height and width, in either direction.
        elastic: standard deviation, as a fraction of height and width, of the displacements of a
            5x5 grid of knots, interpolated cubically in between. After Simard, Steinkraus, Platt:
            "Best Practices for Convolutional Neural Networks", ICDAR 2003, who displace each pixel.
        upright: whether no image is turned upside down by a flip.
        outside: value of the mask outside the image.
        size: height and width of the result, around the centre of the image; by default the same.
            Shift and elastic deformation are fractions of these.

    Returns:
        The image, float32 in [0, 1], and the mask, uint8: at each pixel the value that has most of
        the weight in a bilinear interpolation.
    """

    def bend(key: jax.Array, height: int, width: int) -> jax.Array:
        knots = jax.random.normal(key, (5, 5, 2)) * elastic * jnp.array([[[height, width]]])
        return jax.image.resize(knots, (height, width, 2), "cubic")

    def per_image(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        channels = image.shape[-1]
        height, width = size or image.shape[:2]
        u = jax.random.uniform(key, (7,), minval=-1.0)
        matrix = affine(
            rotation=rotation * u[0],
            scale=scale ** u[1] * jnp.where(u[2:4] < jnp.array([-upright, 0]), -1.0, 1.0),
            shear=shear * u[4],
            shift=shift * u[5:] * jnp.array([height, width]),
        )
        # In one array, because gathering takes most of the time; outside of it are zeros.
        labels = mask.astype(jnp.float32) - outside
        both = jnp.concatenate([as_float(image), labels], axis=-1)
        displacement = bend(jax.random.fold_in(key, 1), height, width) if elastic else None
        pixels, dy, dx = sample(both, matrix, displacement, (height, width))
        image = interpolate([x[..., :channels] for x in pixels], dy, dx)
        labels = vote([x[..., channels:] for x in pixels], dy, dx)
        return image, (labels + outside).astype(jnp.uint8)

    return jax.vmap(per_image)(_keys(key, image), image, mask)


def affine(
    *,
    rotation: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    shear: ArrayLike = 0.0,
    shift: ArrayLike = 0.0,
) -> jax.Array:
    """The matrix with which `warp` scales an image, then shears, rotates and shifts it.

    Args:
        rotation: degrees, counter-clockwise.
        scale: a factor, or one for rows and one for columns; negative factors flip.
        shear: degrees by which a vertical line leans; positive moves its lower end to the right.
        shift: pixels, or pixels down and pixels to the right.

    Returns:
        Float32 [2, 3].
    """
    angle, slope = jnp.deg2rad(rotation), jnp.tan(jnp.deg2rad(shear))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Elementwise, because accelerators round the operands of a matrix product.
    inverse = jnp.array([[cos, sin], [-sin - slope * cos, cos - slope * sin]])
    inverse = inverse / jnp.broadcast_to(jnp.asarray(scale), (2,))[:, None]
    offset = -(inverse * jnp.broadcast_to(jnp.asarray(shift), (2,))[None]).sum(1)
    return jnp.concatenate([inverse, offset[:, None]], axis=1)


def warp(image: jax.Array, matrix: jax.Array, displacement: jax.Array | None = None) -> jax.Array:
    """Resample an image at affinely mapped positions, bilinearly, with zeros around the image.

    For the arguments see `sample`.

    Returns:
        Float32 [H, W, C].
    """
    return interpolate(*sample(image, matrix, displacement))


def interpolate(pixels: list[jax.Array], dy: jax.Array, dx: jax.Array) -> jax.Array:
    """Bilinear interpolation of what `sample` returns: [H, W, C]."""
    above = pixels[0] * (1 - dx) + pixels[1] * dx
    below = pixels[2] * (1 - dx) + pixels[3] * dx
    return above * (1 - dy) + below * dy


def vote(pixels: list[jax.Array], dy: jax.Array, dx: jax.Array) -> jax.Array:
    """The value with the largest bilinear weight in what `sample` returns: [H, W, C].

    Of two values with the same weight it is the larger one. For 0 and 1 that is `interpolate` at
    least 0.5.
    """
    weights = (1 - dx) * (1 - dy), dx * (1 - dy), (1 - dx) * dy, dx * dy
    best, most = pixels[0], -1.0
    for value in pixels:
        weight = sum(jnp.where(x == value, w, 0.0) for x, w in zip(pixels, weights, strict=True))
        wins = (weight > most) | ((weight == most) & (value > best))
        best, most = jnp.where(wins, value, best), jnp.where(wins, weight, most)
    return best


def sample(
    image: jax.Array,
    matrix: jax.Array,
    displacement: jax.Array | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The four neighbours of affinely mapped positions.

    Args:
        image: float32 [H, W, C].
        matrix: [2, 3]; the output pixel at (row, column) is sampled at matrix @ (row, column, 1).
            Both positions are relative to the centres of output and image.
        displacement: [H, W, 2], rows and columns added to each sampling position.
        size: height and width of the output, by default H and W; it replaces these in what follows
            and in `displacement`.

    Returns:
        The pixels above left, above right, below left and below right of each position, [H, W, C],
        0 outside the image; and the position's distance from the first in rows and columns,
        [H, W, 1] in [0, 1).
    """
    height, width, _ = image.shape
    centre = (height - 1) / 2, (width - 1) / 2
    rows, columns = size or (height, width)
    row = jnp.arange(rows)[:, None] - (rows - 1) / 2
    column = jnp.arange(columns)[None] - (columns - 1) / 2

    def position(axis: int, size: int) -> tuple[jax.Array, jax.Array]:
        """Index in `padded` of the pixel before the position, and the fraction beyond it."""
        a, b, c = matrix[axis]
        x = a * row + b * column + c + centre[axis]
        if displacement is not None:
            x = x + displacement[..., axis]
        x = jnp.clip(x, -1, size) + 1
        before = jnp.floor(x)
        return before.astype(jnp.int32), (x - before)[..., None]

    (y, dy), (x, dx) = position(0, height), position(1, width)
    padded = jnp.pad(image, ((1, 2), (1, 2), (0, 0)))

    def pixel(y: jax.Array, x: jax.Array) -> jax.Array:
        return padded.at[y, x].get(mode="promise_in_bounds")

    pixels = [pixel(y, x), pixel(y, x + 1), pixel(y + 1, x), pixel(y + 1, x + 1)]
    return pixels, dy, dx


def random_colour(
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
    *,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 10.0,
    tint: float = 0.0,
    gamma: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Change the colours of each image, uniformly at random.

    Saturation, hue and tint do not apply to an image of other than 3 channels.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: returned unchanged.
        brightness, contrast, saturation: maximum difference of the factor from 1.
        hue: maximum in degrees, in either direction.
        tint: maximum difference of each colour's own factor from 1, as of another white balance.
        gamma: maximum exponent; its inverse is the minimum. Uniform in the logarithm.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def per_image(key: jax.Array, image: jax.Array) -> jax.Array:
        # From a key of their own, so that `u` is what it was before there were tint and gamma.
        v = jax.random.uniform(jax.random.fold_in(key, 1), (4,), minval=-1.0)
        if gamma != 1:
            # x ** g, which XLA computes four times as slowly on a CPU.
            image = jnp.exp(gamma ** v[3] * jnp.log(image))
        if tint and image.shape[-1] == 3:
            image = jnp.clip(image * (1 + tint * v[None, None, :3]), 0, 1)
        u = jax.random.uniform(key, (4,), minval=-1.0)
        if image.shape[-1] != 3:
            mean = (1 + brightness * u[0]) * image.mean()
            scaled = (1 + contrast * u[1]) * (1 + brightness * u[0]) * image
            return jnp.clip(scaled - contrast * u[1] * mean, 0, 1)
        return recolour(
            image,
            brightness=1 + brightness * u[0],
            contrast=1 + contrast * u[1],
            saturation=1 + saturation * u[2],
            hue=hue * u[3],
        )

    return jax.vmap(per_image)(_keys(key, image), as_float(image)), mask


def recolour(
    image: jax.Array,
    *,
    brightness: ArrayLike = 1.0,
    contrast: ArrayLike = 1.0,
    saturation: ArrayLike = 1.0,
    hue: ArrayLike = 0.0,
) -> jax.Array:
    """Change brightness, contrast, saturation and hue, in this order, with one colour matrix.

    The first three blend the image with black, its mean grey and its greyscale version, as Pillow's
    `ImageEnhance` does. Hue rotates the colours about the grey axis (Rodrigues' formula).

    Args:
        image: float32 [H, W, 3] in [0, 1].
        brightness, contrast, saturation: factors; 1 changes nothing, 0 leaves only black or grey.
        hue: degrees; 120 turns red into green, green into blue and blue into red.

    Returns:
        Float32 [H, W, 3], clipped to [0, 1].
    """
    luma = jnp.array(LUMA)
    cos, sin = jnp.cos(jnp.deg2rad(hue)), jnp.sin(jnp.deg2rad(hue)) / 3**0.5
    main, right, left = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    rotation = jnp.array([[main, right, left], [left, main, right], [right, left, main]])
    # rotation @ (saturation * identity + (1 - saturation) * grey), where rotation @ grey is grey
    matrix = saturation * rotation + (1 - saturation) * jnp.broadcast_to(luma[None], (3, 3))
    mean_grey = brightness * (image.mean((0, 1)) * luma).sum()
    # Elementwise, because accelerators round the operands of a matrix product.
    mixed = (image[..., None, :] * (brightness * contrast * matrix)[None, None]).sum(-1)
    return jnp.clip(mixed + (1 - contrast) * mean_grey, 0, 1)


def random_light(
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
    *,
    shade: float = 0.5,
    haze: float = 0.3,
) -> tuple[jax.Array, jax.Array]:
    """Shade each image unevenly, and lay an uneven haze over it, each with probability 1/2.

    Both vary smoothly: by a 4x4 grid of knots, uniform in [0, 1), interpolated cubically.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: returned unchanged.
        shade: maximum fraction of the light that a pixel loses, uniform from 0.
        haze: maximum fraction of white in a pixel, uniform from 0.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def field(u: jax.Array, height: int, width: int) -> jax.Array:
        smooth = jax.image.resize(u[1:].reshape(4, 4, 1), (height, width, 1), "cubic")
        return jnp.clip(smooth, 0, 1) * jnp.maximum(2 * u[0] - 1, 0)

    def per_image(key: jax.Array, image: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (2, 17))  # at once: each call takes a second to compile
        image = image * (1 - shade * field(u[0], *image.shape[:2]))
        return image + haze * field(u[1], *image.shape[:2]) * (1 - image)

    return jax.vmap(per_image)(_keys(key, image), as_float(image)), mask


def random_blur(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, sigma: float = 1.5, share: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Blur each image with probability 1/2.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: returned unchanged.
        sigma: maximum in pixels, uniform from 0; see `blur`.
        share: maximum as a fraction of the height; it is added to `sigma`.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """
    most = sigma + share * image.shape[1]

    def per_image(key: jax.Array, image: jax.Array) -> jax.Array:
        return blur(image, most * _zero_or_uniform(key), radius=math.ceil(2 * most))

    return jax.vmap(per_image)(_keys(key, image), as_float(image)), mask


def blur(image: jax.Array, sigma: ArrayLike, *, radius: int) -> jax.Array:
    """Convolve an image with a Gaussian, repeating the border pixels.

    Args:
        image: float32 [H, W, C].
        sigma: standard deviation in pixels; 0 changes nothing.
        radius: pixels on either side at which the Gaussian is cut off.

    Returns:
        Float32 [H, W, C].
    """
    distance = jnp.arange(-radius, radius + 1)
    # 1e-6 avoids a division by 0 and leaves only the centre tap.
    weight = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-6)) ** 2)
    weight = weight / weight.sum()
    for axis in (0, 1):
        size, pad = image.shape[axis], [(0, 0)] * 3
        pad[axis] = (radius, radius)
        padded = jnp.pad(image, pad, mode="edge")
        # A sum of shifted slices: with few taps, faster on a CPU than a depthwise convolution.
        taps = [
            weight[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i in range(2 * radius + 1)
        ]
        image = jnp.stack(taps).sum(0)
    return image


def random_noise(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, deviation: float = 0.05
) -> tuple[jax.Array, jax.Array]:
    """Add Gaussian noise to each image with probability 1/2.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: returned unchanged.
        deviation: maximum standard deviation of the noise, uniform from 0.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def per_image(key: jax.Array, image: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, 1), image.shape)
        return jnp.clip(image + deviation * _zero_or_uniform(key) * noise, 0, 1)

    return jax.vmap(per_image)(_keys(key, image), as_float(image)), mask


def random_jpeg(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, quality: float = 20, share: float = 0.0125
) -> tuple[jax.Array, jax.Array]:
    """Compress each image as JPEG with probability 1/2; the grid of blocks starts anywhere.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: returned unchanged.
        quality: minimum, up to 50. The steps of quantization are uniform from 0 to those of it.
        share: side of a block as a fraction of the height: the nearest of 2, 4 and 8 pixels, see
            `jpeg.code`. The default is that of a picture of 640 rows.

    Returns:
        The image, float32 in [0, 1], and the mask.

    Raises:
        ValueError: the quality is not above 0 and up to 50.
    """
    if not 0 < quality <= 50:
        raise ValueError(f"quality is {quality}: give a number above 0, and up to 50")
    block = min((2, 4, 8), key=lambda pixels: abs(pixels - share * image.shape[1]))
    side = 2 * block  # of a block of colours

    def per_image(key: jax.Array, image: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (3,))
        factor = 50 / quality * jnp.maximum(2 * u[0] - 1, 0)
        start, (height, width, channels) = (u[1:] * side).astype(jnp.int32), image.shape
        padded = jnp.pad(image, ((side, side), (side, side), (0, 0)), mode="edge")
        larger = height + side, width + side, channels
        coded = jpeg.code(jax.lax.dynamic_slice(padded, (*start, 0), larger), factor, block=block)
        coded = jax.lax.dynamic_slice(coded, (*(side - start), 0), image.shape)
        return jnp.where(factor > 0, coded, image)

    return jax.vmap(per_image)(_keys(key, image), as_float(image)), mask


def random_cutout(
    key: jax.Array, image: jax.Array, mask: jax.Array, *, side: float = 0.3
) -> tuple[jax.Array, jax.Array]:
    """Fill a rectangle of each image with the image's mean colour, with probability 1/2.

    DeVries, Taylor: "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], uint8 or float in [0, 1].
        mask: returned unchanged.
        side: maximum sides of the rectangle as a fraction of height and width.

    Returns:
        The image, float32 in [0, 1], and the mask.
    """

    def per_image(key: jax.Array, image: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, (4,))
        size = side * u[:2] * (_zero_or_uniform(jax.random.fold_in(key, 1)) > 0)
        inside = [
            abs(jnp.arange(n) + 0.5 - n * u[2 + axis]) < n * size[axis] / 2
            for axis, n in enumerate(image.shape[:2])
        ]
        hidden = inside[0][:, None, None] & inside[1][None, :, None]
        return jnp.where(hidden, image.mean((0, 1), keepdims=True), image)

    return jax.vmap(per_image)(_keys(key, image), as_float(image)), mask


def _zero_or_uniform(key: jax.Array) -> jax.Array:
    """0 with probability 1/2, otherwise uniform in [0, 1)."""
    return jnp.maximum(jax.random.uniform(key, minval=-1.0), 0)


def _keys(key: jax.Array, image: jax.Array) -> jax.Array:
    """One key per image, derived from its index in the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(image)))
