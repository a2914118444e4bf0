"""The real Keras as the judge: golden/make_keras_golden.py wrote what it answered."""

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
#: What Keras made of the article's network: {path: [shape, standard deviation, largest |weight|]}.
KERAS = json.loads(str(GOLDEN["article"]))
KERNELS = [path for path in KERAS if path.endswith("kernel")]
# the standard deviation of a normal distribution cut at two of its own
CUT = 0.87962566103423978


def tree(prefix: str) -> dict:
    """The arrays named `prefix`/... in the golden file, nested as our parameters are."""
    flat = {n.removeprefix(prefix): a for n, a in GOLDEN.items() if n.startswith(prefix)}
    return unflatten_dict(flat, sep="/")


def close(ours, keras):
    """Within 1e-5 of the array's largest entry. Keras was run in float64, we are in float32."""
    np.testing.assert_allclose(ours, keras, rtol=0, atol=1e-5 * np.abs(keras).max())


@pytest.fixture(scope="module")
def answers():
    """Loss, logits and gradients of the narrow network with Keras' weights."""
    model = UNet(features=tuple(GOLDEN["features"].tolist()), group_size=None, dropout=0.0)
    image = jnp.asarray(GOLDEN["image"] / 255, jnp.float32)
    labels = jnp.asarray(GOLDEN["mask"], jnp.float32)

    def loss(params):
        logits = model.apply({"params": params}, image)
        return bce(logits, labels).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree("params/"))
    return value, logits, flatten_dict(gradients, sep="/")


def test_logits(answers):
    _, logits, _ = answers
    close(logits, GOLDEN["logits"])


def test_loss(answers):
    value, _, _ = answers
    close(value, GOLDEN["loss"])


def test_gradients(answers):
    _, _, gradients = answers
    keras = flatten_dict(tree("grads/"), sep="/")
    assert gradients.keys() == keras.keys()
    for path in keras:
        close(gradients[path], keras[path])


@pytest.fixture(scope="module")
def article():
    """Parameters of the article's network as we draw them, by path."""
    key = jax.random.key(0, impl="rbg")  # compiles in a quarter of the default generator's time
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
    """The same, but the head drawn 256 times: it has 16 weights only."""

    def head(key):
        return ARTICLE.init(key, jnp.zeros((1, 32, 32, 3)))["params"]["head"]["kernel"]

    heads = jax.jit(jax.vmap(head))(jax.random.split(jax.random.key(1), 256))
    return article | {"head/kernel": np.asarray(heads)}


@pytest.mark.parametrize("path", KERNELS)
def test_initial_kernels(kernels, path):
    """Deviation, bound and shape of each distribution, by hand; Keras' own draw has them too."""
    *window, fan_in, fan_out = KERAS[path][0]
    area = math.prod(window)
    if path.startswith(("upsample", "head")):  # glorot_uniform
        bound = math.sqrt(6 / (area * (fan_in + fan_out)))
        deviation, kurtosis, inner = bound / math.sqrt(3), 1.8, 0.5
    else:  # he_normal, which Keras and JAX cut at two deviations of the normal before the cut
        deviation = math.sqrt(2 / (area * fan_in))
        bound = 2 * deviation / CUT
        kurtosis, inner = 2.3655, math.erf(1 / math.sqrt(2)) / math.erf(2 / math.sqrt(2))
    weights = kernels[path]
    keras_shape, keras_deviation, keras_largest = KERAS[path]
    for size, measured, largest in [
        (weights.size, weights.std(), abs(weights).max()),
        (math.prod(keras_shape), keras_deviation, keras_largest),
    ]:
        # five standard errors of a sample's deviation, from the distribution's fourth moment
        error = 5 * math.sqrt((kurtosis - 1) / size) / 2
        assert measured == pytest.approx(deviation, rel=error)
        assert largest <= bound * (1 + 1e-6)
        assert largest > 0.9 * bound or size < 1000
    # the share of weights within half the bound tells a uniform from a normal
    share = np.mean(abs(weights) < bound / 2)
    assert share == pytest.approx(inner, abs=5 * math.sqrt(inner * (1 - inner) / weights.size))
