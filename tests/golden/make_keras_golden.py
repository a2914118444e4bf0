"""Write keras_unet.npz, the outputs of the tutorial's network in Keras, for tests/test_keras.py.

    pip install tensorflow-cpu keras
    python tests/golden/make_keras_golden.py

The network is a narrow version of the tutorial's, with random weights and biases, in float64; its
input is two images that are not square. Keras is imported only by the functions that run it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("keras_unet.npz")
ARTICLE = (16, 32, 64, 128, 256, 512)
NARROW = (2, 3, 4, 4, 5, 6)
DROPOUT = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3)


def article_keras(features: Sequence[int], dropout: Sequence[float] = DROPOUT):
    """The tutorial's network in Keras: images in [0, 256], of any size, to probabilities.

    Its layers are named like our parameter tree, with dots instead of the slashes that Keras
    forbids; the output of the layer "head" is the logits.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from keras import Input, Model, layers

    def block(x, level: int, name: str):
        for i in range(3):
            if i == 2:
                x = layers.Dropout(dropout[level])(x)
            x = layers.Conv2D(
                features[level],
                3,
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                name=f"{name}.Conv_{i}",
            )(x)
        return x

    *outer, bottleneck = range(len(features))
    image = Input((None, None, 3))
    x = layers.Rescaling(1 / 256)(image)
    skips = []
    for level in outer:
        skips.append(block(x, level, f"down{level}"))
        x = layers.MaxPooling2D(2)(skips[-1])
    x = block(x, bottleneck, "bottleneck")
    for level in reversed(outer):
        x = layers.Conv2DTranspose(
            features[level], 2, strides=2, padding="same", name=f"upsample{level}"
        )(x)
        x = block(layers.concatenate([x, skips[level]]), level, f"up{level}")
    logits = layers.Conv2D(1, 1, name="head")(x)
    return Model(image, layers.Activation("sigmoid")(logits))


def variables(model) -> dict:
    """The variables of `article_keras`, keyed by their path in our parameter tree."""
    return {
        f"{layer.name.replace('.', '/')}/{variable.name}": variable
        for layer in model.layers
        for variable in layer.weights
    }


def from_keras(path: str, array: np.ndarray) -> np.ndarray:
    """A Keras weight or its gradient in our layout: only Conv2DTranspose has (out, in) kernels."""
    upsample = path.startswith("upsample") and path.endswith("kernel")
    return array.swapaxes(-1, -2) if upsample else array


def pictures(rng: np.random.Generator, n: int, height: int, width: int):
    """Bright ellipses in noise, uint8 [n, height, width, 3], and their masks, uint8 [n, ..., 1]."""
    y, x = np.mgrid[:height, :width]
    size = np.array([height, width])
    centre = rng.uniform(0.3, 0.7, (n, 2, 1, 1)) * size[:, None, None]
    radius = rng.uniform(0.1, 0.3, (n, 2, 1, 1)) * size[:, None, None]
    mask = (((np.stack([y, x]) - centre) / radius) ** 2).sum(1)[..., None] < 1
    noise = rng.integers(0, 156, (n, height, width, 3))
    return (noise + 100 * mask).astype(np.uint8), mask.astype(np.uint8)


def main() -> None:
    """Record the narrow network's outputs and the tutorial's initial parameters."""
    full = {
        path: from_keras(path, variable.numpy())
        for path, variable in variables(article_keras(ARTICLE)).items()
    }

    import keras
    import tensorflow as tf

    keras.config.set_floatx("float64")
    model = article_keras(NARROW)
    weights = variables(model)
    rng = np.random.default_rng(0)
    for path, variable in weights.items():
        # Not Keras' initial values: zero biases would hide mistakes, and some units of such a
        # narrow network would be dead.
        bias = path.endswith("bias")
        scale = 0.3 if bias else 1.4 / np.sqrt(np.prod(variable.shape[:-1]))
        variable.assign(rng.normal(0.5 * bias, scale, variable.shape).astype(np.float32))

    image, mask = pictures(rng, 2, 64, 96)
    logits_of = keras.Model(model.input, model.get_layer("head").output)
    keras_image = tf.constant(256 * (image / 255))
    with tf.GradientTape() as tape:
        loss = keras.losses.BinaryCrossentropy()(mask, model(keras_image, training=False))
    gradients = dict(zip(weights, tape.gradient(loss, list(weights.values())), strict=True))
    for path, gradient in gradients.items():
        alive = np.mean(gradient.numpy() != 0)
        assert alive > 0.5, (
            f"{path}: only {alive:.0%} of the gradient is not zero: use another seed"
        )

    arrays = {f"params/{path}": from_keras(path, w.numpy()) for path, w in weights.items()}
    arrays |= {f"grads/{path}": from_keras(path, g.numpy()) for path, g in gradients.items()}
    arrays |= {"logits": logits_of(keras_image, training=False).numpy(), "loss": loss.numpy()}
    np.savez_compressed(
        GOLDEN,
        **{name: array.astype(np.float32) for name, array in arrays.items()},
        image=image,
        mask=mask,
        features=np.array(NARROW),
        # initial parameters of the tutorial's network in Keras: [shape, std, largest]
        article=json.dumps(
            {p: [w.shape, float(w.std()), float(abs(w).max())] for p, w in full.items()}
        ),
        versions=json.dumps({"keras": keras.__version__, "tensorflow": tf.__version__}),
    )
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, loss {loss:.6f}")
    print(f"Keras {keras.__version__}, TensorFlow {tf.__version__}")


if __name__ == "__main__":
    main()
