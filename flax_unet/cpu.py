"""What XLA must be told, or given in another form, to be fast on a CPU.

Measured on two cores of an AMD EPYC; on other backends nothing here changes anything.
"""

from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp


@cache
def compiler_options() -> dict[str, str]:
    """What XLA should be told on this backend.

    On jax 0.10 the CPU backend hands convolutions to YNN, which takes 1.5 to 4 times as long as
    Eigen for all but the narrowest layers: leave YNN the matrix products and the sums, which it
    does 3 to 12 times as quickly as XLA itself. And it removes the barriers that keep what `remat`
    computes again from being merged with what was computed first, and what `depthwise` reads many
    times from being computed as often.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    of_ynn = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
    ynn = {"xla_cpu_experimental_ynn_fusion_type": ",".join(of_ynn)}
    try:
        jax.jit(lambda: 0, compiler_options=ynn).lower().compile()
    except Exception:  # an older or newer XLA that knows no such flag: its type differs by version
        return options
    return options | ynn


def convolve(
    image: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, which `flax.linen.Conv` calls, by the quickest way.

    Eigen gathers the windows of a picture of three channels number by number. With two pixels of a
    row taken as one of six channels its runs are longer, and it computes two results at a time.
    """
    few, even = image.shape[-1] < 8, image.shape[-2] % 2 == 0
    plain = kernel.shape[:2] == (3, 3) and padding == "SAME" and set(strides) == {1}
    if jax.default_backend() == "cpu" and few and even and plain:
        return _convolve_pairs(image, kernel)
    return jax.lax.conv_general_dilated(image, kernel, strides, padding, **options)


def _convolve_pairs(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 'same' convolution of [B, H, W, C], W even, with [3, 3, C, F]: [B, H, W, F].

    Of the pairs (pixel 2j - 1, pixel 2j), two neighbours hold the windows of pixels 2j and 2j + 1.
    """
    b, h, w, c = image.shape
    pairs = jnp.pad(image, ((0, 0), (0, 0), (1, 1), (0, 0))).reshape(b, h, w // 2 + 1, 2 * c)
    first, second = (jnp.pad(kernel, ((0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in (0, 1))
    both = jnp.stack([first, second], axis=-2).reshape(3, 2, 2 * c, -1)
    dimensions = ("NHWC", "HWIO", "NHWC")
    padding = ((1, 1), (0, 0))
    result = jax.lax.conv_general_dilated(pairs, both, (1, 1), padding, None, None, dimensions)
    return result.reshape(b, h, w, -1)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def sums(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """The sums of float32 arrays of one shape over axes, in one pass.

    XLA makes one for each array, which takes 3 times as long for the nine products of `depthwise`'s
    gradient: YNN does not take them.
    """
    nothing = [jnp.zeros((), jnp.float32)] * len(arrays)
    return list(jax.lax.reduce(arrays, nothing, partial(jax.tree.map, jnp.add), axes))


@sums.defjvp
def _(axes: tuple[int, ...], arrays: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    return sums(arrays[0], axes), [x.sum(axes) for x in tangents[0]]


def depthwise(image: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The 'same' convolution of each channel alone: [B, H, W, C], [K, K, 1, C] to [B, H/s, W/s, C].

    H and W are multiples of the stride. XLA's grouped convolution takes 10 to 40 times as long on a
    CPU as the sum of the shifted products.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=image.shape[-1],
        )
    return _sum_of_shifts(image, kernel, stride)


def _shifts(image: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each tap of a 'same' convolution sees, size x size arrays [B, H/s, W/s, C]."""
    _, h, w, _ = image.shape
    pads = (size - stride) // 2, size - stride - (size - stride) // 2
    wide = jnp.pad(image, ((0, 0), pads, pads, (0, 0)))
    taps = [(u, v) for u in range(size) for v in range(size)]
    return [wide[:, u : u + h : stride, v : v + w : stride] for u, v in taps]


def _plain_sum(image: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    taps = kernel.reshape(-1, 1, 1, kernel.shape[-1])
    shifts = _shifts(image, len(kernel), stride)
    return reduce(jnp.add, [x * tap[None] for x, tap in zip(shifts, taps, strict=True)])


_sum_of_shifts = jax.custom_vjp(_plain_sum, nondiff_argnums=(2,))


def _forward(image: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, Any]:
    return _plain_sum(image, kernel, stride), (image, kernel)


def _backward(stride: int, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without barriers XLA computes what these are made of anew for each of the taps, and so it does
    # for the sums of the norm that reads the result: a training step takes 2.3 times as long.
    image, kernel, gradient = jax.lax.optimization_barrier((*kept, gradient))
    _, pull = jax.vjp(lambda image: _plain_sum(image, kernel, stride), image)
    (of_image,) = jax.lax.optimization_barrier(pull(gradient))
    products = [gradient.astype(jnp.float32) * x for x in _shifts(image, len(kernel), stride)]
    taps = jnp.stack(sums(products, (0, 1, 2)))
    return of_image, taps.reshape(kernel.shape).astype(kernel.dtype)


_sum_of_shifts.defvjp(_forward, _backward)
