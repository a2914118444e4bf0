"""XLA on a CPU: compiler options, and equivalent formulations that it compiles to faster code.

Measured on two cores of an AMD EPYC. A formulation is selected per target platform, when a program
is lowered: other platforms get XLA's own convolutions.
"""

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@cache
def compiler_options() -> dict[str, str]:
    """Compiler options for the default backend.

    On jax 0.10 XLA's CPU backend passes convolutions to YNN, its kernel library for CPUs, which is
    1.5 to 4 times slower than Eigen except for the narrowest layers. So YNN gets only matrix
    products and reductions, which it computes 3 to 12 times faster than XLA does. The backend also
    removes optimization barriers. They must stay: without them XLA merges what `remat` recomputes
    with the first computation, and recomputes the operands of `depthwise`'s gradient for every tap.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    fusions = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
    ynn = {"xla_cpu_experimental_ynn_fusion_type": ",".join(fusions)}
    try:
        jax.jit(lambda: 0, compiler_options=ynn).lower().compile()
    except Exception:  # this XLA does not know the flag; the exception's type differs by version
        return options
    return options | ynn


class jit:  # used as `jax.jit` is, whose methods it has
    """`jax.jit` with `compiler_options`; called by another compiled function, it has that one's."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._outermost = jax.jit(function, compiler_options=compiler_options(), **options)
        self._inner = jax.jit(function, **options)

    def __call__(self, *args: Any) -> Any:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
        return (self._inner if traced else self._outermost)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outermost, name)


def convolve(
    image: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`.

    With few channels, Eigen's im2col copies one number at a time. On a CPU, two neighbouring pixels
    of a row are therefore taken as one of twice the channels, which also yields two outputs per
    window.
    """

    def general(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(image, kernel, strides, padding, **options)

    same_3x3 = kernel.shape[:2] == (3, 3) and padding == "SAME" and set(strides) == {1}
    if same_3x3 and image.shape[-1] < 8 and image.shape[-2] % 2 == 0:
        return jax.lax.platform_dependent(image, kernel, cpu=_convolve_pairs, default=general)
    return general(image, kernel)


def _convolve_pairs(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """'Same' convolution of [B, H, W, C], W even, with [3, 3, C, F]: [B, H, W, F].

    Pair j holds the pixels 2j - 1 and 2j of a row. Pairs j and j + 1 contain the windows, 3 pixels
    wide, of the pixels 2j and 2j + 1.
    """
    b, h, w, c = image.shape
    pairs = jnp.pad(image, ((0, 0), (0, 0), (1, 1), (0, 0))).reshape(b, h, w // 2 + 1, 2 * c)
    first, second = (jnp.pad(kernel, ((0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in (0, 1))
    both = jnp.stack([first, second], axis=-2).reshape(3, 2, 2 * c, -1)
    dimensions = ("NHWC", "HWIO", "NHWC")
    padding = ((1, 1), (0, 0))
    result = jax.lax.conv_general_dilated(pairs, both, (1, 1), padding, None, None, dimensions)
    return result.reshape(b, h, w, -1)


def depthwise(image: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """'Same' convolution per channel: [B, H, W, C] with [K, K, 1, C] to [B, H/s, W/s, C].

    H and W are multiples of the stride. On a CPU it is a sum of shifted products, because XLA's
    grouped convolution is 10 to 40 times slower there.
    """

    def grouped(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=image.shape[-1],
        )

    shifted = partial(_sum_of_shifts, stride)
    return jax.lax.platform_dependent(image, kernel, cpu=shifted, default=grouped)


def _shifts(image: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each tap of a 'same' convolution reads: size x size arrays [B, H/s, W/s, C]."""
    _, h, w, _ = image.shape
    pads = (size - stride) // 2, size - stride - (size - stride) // 2
    padded = jnp.pad(image, ((0, 0), pads, pads, (0, 0)))
    taps = [(u, v) for u in range(size) for v in range(size)]
    return [padded[:, u : u + h : stride, v : v + w : stride] for u, v in taps]


def _plain_sum(stride: int, image: jax.Array, kernel: jax.Array) -> jax.Array:
    taps = kernel.reshape(-1, 1, 1, kernel.shape[-1])
    shifts = _shifts(image, len(kernel), stride)
    return reduce(jnp.add, [x * tap[None] for x, tap in zip(shifts, taps, strict=True)])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_of_shifts(stride: int, image: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain_sum(stride, image, kernel)


@_sum_of_shifts.defjvp
def _(stride: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The gradient is the transpose of this. Without the barriers XLA recomputes its operands for
    # every tap, and again for the sums of the norm that follows: a training step takes 2.3 times as
    # long.
    image, kernel = jax.lax.optimization_barrier(primals)
    d_image, d_kernel = jax.lax.optimization_barrier(tangents)
    taps = d_kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    shifts = _shifts(image, len(kernel), stride)
    from_kernel = reduce(jnp.add, map(jnp.multiply, shifts, _repeat(taps, shifts[0].shape[:3])))
    d_result = _plain_sum(stride, d_image, kernel) + from_kernel.astype(image.dtype)
    return _sum_of_shifts(stride, image, kernel), jax.lax.optimization_barrier(d_result)


def _repeat(taps: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """Each row of `taps` [T, C], repeated to [*shape, C]; its transpose is `sums`."""
    return _repeat_p.bind(taps, shape=shape)


def _repeat_plainly(taps: jax.Array, *, shape: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.broadcast_to(tap, (*shape, taps.shape[-1])) for tap in taps]


def _repeat_transposed(gradients: Any, taps: Any, *, shape: tuple[int, ...]) -> list[jax.Array]:
    zeros = jnp.zeros((*shape, taps.aval.shape[-1]))
    arrays = [zeros if type(x) is ad.Zero else x for x in gradients]
    return [jnp.stack(sums(arrays, tuple(range(len(shape)))))]


def _repeat_batched(args: Any, axes: Any, *, shape: tuple[int, ...]) -> tuple[Any, list[int]]:
    repeated = jax.vmap(partial(_repeat_plainly, shape=shape), axes)(*args)
    return repeated, [0] * len(repeated)


_repeat_p = Primitive("repeat")
_repeat_p.multiple_results = True
_repeat_p.def_impl(_repeat_plainly)
_repeat_p.def_abstract_eval(
    lambda taps, shape: [taps.update(shape=(*shape, taps.shape[-1]))] * taps.shape[0]
)
ad.deflinear2(_repeat_p, _repeat_transposed)
batching.primitive_batchers[_repeat_p] = _repeat_batched
mlir.register_lowering(_repeat_p, mlir.lower_fun(_repeat_plainly))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def sums(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums of float32 arrays of equal shape over `axes`, in one pass.

    XLA would emit one reduction per array, 3 times slower for the nine products of `depthwise`'s
    gradient, which YNN cannot fuse.
    """
    zeros = [jnp.zeros((), jnp.float32)] * len(arrays)
    return list(jax.lax.reduce(arrays, zeros, partial(jax.tree.map, jnp.add), axes))


@sums.defjvp
def _(axes: tuple[int, ...], arrays: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    return sums(arrays[0], axes), [x.sum(axes) for x in tangents[0]]
