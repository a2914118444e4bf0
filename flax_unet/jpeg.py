"""JPEG compression of images on the device, for augmentation.

After ITU-T Recommendation T.81 (1992) and JFIF 1.02, without its lossless part: colours at half the
size, blocks of 8x8 pixels as sums of cosines, and their coefficients in steps.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Weights of red, green and blue in grey: ITU-R BT.601, as in Pillow's mode "L".
LUMA = (0.299, 0.587, 0.114)

# Steps of luminance and of chrominance: tables K.1 and K.2 of the Recommendation.
_LUMINANCE = """
16 11 10 16  24  40  51  61
12 12 14 19  26  58  60  55
14 13 16 24  40  57  69  56
14 17 22 29  51  87  80  62
18 22 37 56  68 109 103  77
24 35 55 64  81 104 113  92
49 64 78 87 103 121 120 101
72 92 95 98 112 100 103  99
"""
_CHROMINANCE = """
17 18 24 47 99 99 99 99
18 21 26 66 99 99 99 99
24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
"""


def code(image: jax.Array, factor: ArrayLike, *, block: int = 8) -> jax.Array:
    """Code an image and decode it; one of other than 3 channels has no colours.

    Args:
        image: float32 [H, W, C] in [0, 1].
        factor: of the standard's quantization steps; 50 / quality for a quality up to 50.
        block: side of a block in pixels: 8, or 2 or 4 for an image that was coded at 4 or 2 times
            this size.

    Returns:
        Float32 [H, W, C] in [0, 1].
    """
    height, width, channels = image.shape
    pad = [(0, -n % (2 * block)) for n in (height, width)]
    image = 255 * jnp.pad(image, (*pad, (0, 0)), mode="edge")
    if channels == 3:
        weights = jnp.array(LUMA)[None, None]
        scale = 2 - 2 * weights[..., ::2]  # of the differences of red and blue to grey
        luma = (image * weights).sum(-1, keepdims=True)
        chroma = _code_channels((image[..., ::2] - luma) / scale, _CHROMINANCE, factor, 2 * block)
        luma = _code_channels(luma - 128, _LUMINANCE, factor, block) + 128
        red, blue = jnp.split(luma + scale * chroma, 2, axis=-1)
        green = (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
        image = jnp.concatenate([red, green, blue], axis=-1)
    else:
        image = _code_channels(image - 128, _LUMINANCE, factor, block) + 128
    return jnp.clip(image[:height, :width] / 255, 0, 1)


def _code_channels(x: jax.Array, table: str, factor: ArrayLike, side: int) -> jax.Array:
    """Round the coefficients of [H, W, C], in blocks of `side` pixels resampled to 8x8."""
    k = np.arange(8)[:, None]
    cosines = np.where(k, 2, 1) ** 0.5 / 8**0.5 * np.cos(np.pi * k * (2 * k.T + 1) / 16)
    # A smaller block is enlarged by repeating its pixels, a larger one shrunk by averaging them.
    resample = np.repeat(np.eye(8), max(1, side // 8), axis=1)
    resample = resample.reshape(8, side, -1).sum(-1)
    analysis = jnp.asarray(cosines @ (resample / resample.sum(1, keepdims=True)), jnp.float32)
    synthesis = jnp.asarray(cosines @ (resample / resample.sum(0)), jnp.float32)
    steps = np.array(table.split(), int).reshape(8, 8)
    steps = jnp.clip(jnp.floor(steps * factor + 0.5), 1, 255)[None, :, None, :, None]
    height, width, channels = x.shape
    blocks = x.reshape(height // side, side, width // side, side, channels)
    change = partial(jnp.einsum, precision="highest")  # accelerators would round the operands
    coded = change("ka,hawbc,lb->hkwlc", analysis, blocks, analysis)
    coded = jnp.round(coded / steps) * steps
    return change("ka,hkwlc,lb->hawbc", synthesis, coded, synthesis).reshape(x.shape)
