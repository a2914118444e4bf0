"""Comparison with Keras, whose outputs golden/make_keras_golden.py has recorded."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_unet.losses import bce
from flax_unet.model import ARTICLE, UNet

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "keras_unet.npz"))
#: Initial weights of the tutorial's network in Keras: {path: [shape, std, largest |weight|]}.
KERAS = json.loads(str(GOLDEN["article"]))
KERNELS = [path for path in KERAS if path.endswith("kernel")]
#: Standard deviation of a standard normal distribution truncated at 2.
TRUNCATED = 0.87962566103423978


def tree(prefix: str) -> dict:
    """The arrays named `prefix`/... in the golden file, nested like our parameters."""
    flat = {n.removeprefix(prefix): a for n, a in GOLDEN.items() if n.startswith(prefix)}
    return unflatten_dict(flat, sep="/")


def close(ours, keras):
    """Within 1e-5 of the largest entry: Keras was run in float64, ours is float32."""
    np.testing.assert_allclose(ours, keras, rtol=0, atol=1e-5 * np.abs(keras).max())


@pytest.fixture(scope="module")
def results():
    """Loss, logits and gradients of the narrow network with Keras' weights."""
    model = UNet(features=tuple(GOLDEN["features"].tolist()), norm=None)
    image = jnp.asarray(GOLDEN["image"] / 255, jnp.float32)
    labels = jnp.asarray(GOLDEN["mask"], jnp.float32)

    def loss(params):
        logits = model.apply({"params": params}, image)
        return bce(logits, labels).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree("params/"))
    return value, logits, flatten_dict(gradients, sep="/")


def test_logits(results):
    _, logits, _ = results
    close(logits, GOLDEN["logits"])


def test_loss(results):
    value, _, _ = results
    close(value, GOLDEN["loss"])


def test_gradients(results):
    _, _, gradients = results
    keras = flatten_dict(tree("grads/"), sep="/")
    assert gradients.keys() == keras.keys()
    for path in keras:
        close(gradients[path], keras[path])


@pytest.fixture(scope="module")
def article():
    """Our initial parameters of the tutorial's network, by path."""
    key = jax.random.key(0, impl="rbg")  # compiles 4 times faster than the default generator
    params = jax.jit(ARTICLE.init)(key, jnp.zeros((1, 32, 32, 3)))["params"]
    return {path: np.asarray(w) for path, w in flatten_dict(params, sep="/").items()}


def test_shapes(article):
    assert {path: list(w.shape) for path, w in article.items()} == {
        p: k[0] for p, k in KERAS.items()
    }
    assert sum(w.size for w in article.values()) == 11_707_729


def test_initial_biases(article):
    assert all(k[2] == 0 for path, k in KERAS.items() if path.endswith("bias"))
    assert not any(w.any() for path, w in article.items() if path.endswith("bias"))


@pytest.fixture(scope="module")
def kernels(article):
    """The same, with 256 draws of the head, which has only 16 weights."""

    def head(key):
        return ARTICLE.init(key, jnp.zeros((1, 32, 32, 3)))["params"]["head"]["kernel"]

    heads = jax.jit(jax.vmap(head))(jax.random.split(jax.random.key(1), 256))
    return article | {"head/kernel": np.asarray(heads)}


@pytest.mark.parametrize("path", KERNELS)
def test_initial_kernels(kernels, path):
    """Standard deviation, bound and shape of each distribution, of our draw and of Keras'."""
    *window, fan_in, fan_out = KERAS[path][0]
    area = math.prod(window)
    if path.startswith(("upsample", "head")):  # glorot_uniform
        bound = math.sqrt(6 / (area * (fan_in + fan_out)))
        deviation, kurtosis, inner = bound / math.sqrt(3), 1.8, 0.5
    else:  # he_normal, which Keras and JAX truncate at two standard deviations
        deviation = math.sqrt(2 / (area * fan_in))
        bound = 2 * deviation / TRUNCATED
        kurtosis, inner = 2.3655, math.erf(1 / math.sqrt(2)) / math.erf(2 / math.sqrt(2))
    weights = kernels[path]
    keras_shape, keras_deviation, keras_largest = KERAS[path]
    for size, measured, largest in [
        (weights.size, weights.std(), abs(weights).max()),
        (math.prod(keras_shape), keras_deviation, keras_largest),
    ]:
        # five standard errors of a sample's standard deviation, from the fourth moment
        error = 5 * math.sqrt((kurtosis - 1) / size) / 2
        assert measured == pytest.approx(deviation, rel=error)
        assert largest <= bound * (1 + 1e-6)
        assert largest > 0.9 * bound or size < 1000
    # the fraction of weights within half the bound tells a uniform from a normal distribution
    fraction = np.mean(abs(weights) < bound / 2)
    assert fraction == pytest.approx(inner, abs=5 * math.sqrt(inner * (1 - inner) / weights.size))
