import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_unet.losses import bce, bce_soft_dice, cross_entropy, soft_dice


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (3, 6, 5, 2)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, 2, logits.shape), jnp.float32)


def test_bce_equals_the_float64_reference(pair):
    np.testing.assert_allclose(bce(*pair), reference.bce(*pair), rtol=1e-6)


def test_the_cross_entropy_of_one_channel_is_refused():
    one = jnp.ones((1, 2, 2, 1))
    with pytest.raises(ValueError, match="of one channel is always 0: use bce"):
        cross_entropy(one, one)


def test_bce_of_known_probabilities():
    odds = jnp.array([3.0, 1.0, 1 / 3, 1.0])  # p = 3/4, 1/2, 1/4, 1/2
    logits = jnp.log(odds).reshape(1, 2, 2, 1)
    labels = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 2, 2, 1)
    expected = (2 * np.log(4 / 3) + 2 * np.log(2)) / 4
    np.testing.assert_allclose(bce(logits, labels), [expected], rtol=1e-6)


def test_soft_dice_equals_the_float64_reference(pair):
    np.testing.assert_allclose(soft_dice(*pair), reference.soft_dice(*pair), rtol=1e-5)


def test_soft_dice_is_zero_for_empty_and_for_perfect_predictions():
    empty = jnp.zeros((1, 4, 4, 1))
    np.testing.assert_allclose(soft_dice(empty - 100, empty), [0], atol=1e-6)
    np.testing.assert_allclose(soft_dice(empty + 100, empty + 1), [0], atol=1e-6)


def test_bce_soft_dice_is_their_sum(pair):
    np.testing.assert_allclose(
        bce_soft_dice(*pair), reference.bce(*pair) + reference.soft_dice(*pair), rtol=1e-5
    )


@pytest.mark.parametrize("loss", [bce, soft_dice, bce_soft_dice])
def test_large_logits_give_finite_values_and_gradients(loss):
    logits = jnp.array([-1e4, -90.0, 90.0, 1e4]).reshape(1, 2, 2, 1)
    labels = jnp.array([1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 2, 1)
    value, gradient = jax.value_and_grad(lambda x: loss(x, labels).sum())(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [bce, soft_dice])
def test_shapes_are_not_broadcast(loss):
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 1\).*\(2, 4, 4\)"):
        loss(jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 1\).*\(1, 4, 4, 1\)"):
        loss(jnp.zeros((2, 4, 4, 1)), jnp.zeros((1, 4, 4, 1)))


def test_the_gradient_of_bce_is_the_probability_minus_the_label_also_at_0():
    logits = np.array([-90, -2, -1e-9, -0.0, 0.0, 1e-9, 2, 90], np.float32).reshape(1, 1, 8, 1)
    for label in (0.0, 1.0, 0.3):
        gradient = jax.grad(lambda x, y=label: bce(x, jnp.full(x.shape, y)).sum())(logits)
        expected = (1 / (1 + np.exp(-logits.astype(np.float64))) - label) / 8
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
