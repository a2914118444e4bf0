"""What is computed in another form on a CPU is what the plain form computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_unet import cpu


def plain(image, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", None, None, dimensions)


def quick(image, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return cpu.convolve(image, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 5, 2, 1), (1, 4, 7, 3), (1, 4, 6, 8)])
def test_convolution_equals_the_plain_one_in_value_and_gradients(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (3, 3, shape[-1], 5))
    expected = reference.conv3x3(image, kernel, np.zeros(5))
    np.testing.assert_allclose(quick(image, kernel), expected, rtol=1e-5, atol=1e-5)
    outer = jax.random.normal(keys[2], expected.shape)
    for ours, theirs in zip(
        jax.vjp(quick, image, kernel)[1](outer),
        jax.vjp(plain, image, kernel)[1](outer),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends take the plain form")
@pytest.mark.parametrize("width, channels, pairs", [(8, 3, True), (7, 3, False), (8, 16, False)])
def test_pairs_are_for_few_channels_and_even_widths(width, channels, pairs):
    image, kernel = np.zeros((1, 4, width, channels)), np.zeros((3, 3, channels, 5))
    assert ("reshape" in str(jax.make_jaxpr(quick)(image, kernel))) == pairs


def test_sums_are_sums_with_all_their_derivatives():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))

    def f(total):
        def value(x):
            first, second = total([x, x * x], (1, 2))
            return (jnp.sin(first) * second).sum()

        return value

    ours, theirs = f(cpu.sums), f(lambda arrays, axes: [x.sum(axes) for x in arrays])
    for found, expected in zip(
        cpu.sums([x, x * x], (0, 1)), (x.sum((0, 1)), (x * x).sum((0, 1))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for change in (
        jax.grad,
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
        lambda f: jax.grad(lambda x: jnp.cos(jax.grad(f)(x)).sum()),
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
    ):
        pairs = zip(*map(jax.tree.leaves, (change(ours)(x), change(theirs)(x))), strict=True)
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
