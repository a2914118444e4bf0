"""Compare the tutorial's network at full size with Keras: outputs, then five Adam steps.

    pip install tensorflow-cpu keras -e .
    python tests/golden/compare_full_keras.py

Not part of the test suite: it takes some minutes and needs both frameworks.
"""

import platform
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from make_keras_golden import ARTICLE, article_keras, from_keras, pictures, variables

from flax_unet.losses import bce
from flax_unet.model import UNet
from flax_unet.recipes import Adam
from flax_unet.train import TrainState, make_train_step

SIZE, BATCH, STEPS = 256, 8, 5
MODEL = UNet(features=ARTICLE, norm=None)


def our_params(model) -> dict:
    """The weights of a Keras model in the layout of our parameters."""
    flat = {path: from_keras(path, v.numpy()) for path, v in variables(model).items()}
    return jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))


def train_ours(tx: optax.GradientTransformation, params: dict, batches: list):
    """The loss before each step, and the parameters after the last step."""
    step = make_train_step(MODEL, tx, bce)
    params = jax.tree.map(jnp.copy, params)  # the step donates them
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    losses = []
    for image, mask in batches:
        batch = {"image": image, "mask": mask, "weight": np.ones(len(image), np.float32)}
        state, result = step(state, batch, jax.random.key(0))
        losses.append(float(result["loss"]))
    return losses, state.params


def train_keras(model, batches: list) -> list[float]:
    """The same in Keras, with the optimizer and loss that the tutorial compiles."""
    model.compile(optimizer="adam", loss="binary_crossentropy")
    return [
        float(model.train_on_batch(np.float32(256 * (image / 255)), np.float32(mask)))
        for image, mask in batches
    ]


def compare_outputs(model) -> None:
    """Print the largest differences between the logits and probabilities of two images."""
    import keras

    image, _ = pictures(np.random.default_rng(1), 2, SIZE, SIZE)
    both = keras.Model(model.input, [model.get_layer("head").output, model.output])
    keras_logits, keras_proba = (
        np.asarray(y) for y in both(np.float32(256 * (image / 255)), training=False)
    )
    logits = jax.jit(MODEL.apply)(
        {"params": our_params(model)}, jnp.asarray(image / 255, jnp.float32)
    )
    logits_error = abs(logits - keras_logits).max()
    proba_error = abs(jax.nn.sigmoid(logits) - keras_proba).max()
    relative = logits_error / abs(logits).max()
    print(f"outputs at {SIZE}x{SIZE}, batch 2, largest difference:")
    print(f"  logits {logits_error:.2e}, relative to the largest logit {relative:.2e}")
    print(f"  probabilities {proba_error:.2e}; standard deviation of the logits {logits.std():.3f}")
    assert proba_error < 1e-5


def compare_training(model) -> None:
    """Print the losses of Keras and ours, with Keras' formula for Adam and with optax's."""
    start = our_params(model)
    rng = np.random.default_rng(2)
    batches = [pictures(rng, BATCH, SIZE, SIZE) for _ in range(STEPS)]
    keras_losses = train_keras(model, batches)
    keras_end = our_params(model)

    print(f"{STEPS} Adam steps, batch {BATCH}, {SIZE}x{SIZE}, loss before each step:")
    print(f"  {'Keras':22}", *(f"{value:.7f}" for value in keras_losses))
    optimizers = {
        "recipes.Adam": Adam().build(1e-3, STEPS),
        "optax.adam, eps=1e-7": optax.adam(1e-3, b1=0.9, b2=0.999, eps=1e-7),
        "optax.adam, eps=1e-8": optax.adam(1e-3),
    }
    errors = {}
    for name, tx in optimizers.items():
        losses, end = train_ours(tx, start, batches)
        errors[name] = [abs(a / b - 1) for a, b in zip(losses, keras_losses, strict=True)]
        path = optax.tree.norm(optax.tree.sub(start, keras_end))
        distance = optax.tree.norm(optax.tree.sub(end, keras_end)) / path
        print(f"  {name:22}", *(f"{value:.7f}" for value in losses))
        print(f"  {'':22}", *(f"{value:9.1e}" for value in errors[name]), "relative error")
        print(f"  {'':22}", f"distance of the final weights, relative to the path: {distance:.2f}")
    assert max(errors["recipes.Adam"]) < 1e-4


def main() -> None:
    """Print the versions and both comparisons."""
    names = "keras", "tensorflow-cpu", "jax", "flax", "optax", "numpy"
    print(", ".join(f"{name} {version(name)}" for name in names), platform.machine())
    import keras

    keras.utils.set_random_seed(0)
    model = article_keras(ARTICLE, dropout=[0] * len(ARTICLE))
    print(f"{model.count_params():,} parameters")
    compare_outputs(model)
    compare_training(model)


if __name__ == "__main__":
    main()
