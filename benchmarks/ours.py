"""flax_unet as a worker: `python benchmarks/ours.py IMAGES`; see worker.py."""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import count, repeat
from typing import Any

import jax
import numpy as np
import optax
from worker import SIZE, images, serve

from flax_unet import augment, data, losses, predict, train
from flax_unet.model import ARTICLE

KEY = jax.random.key(1)
TX = optax.adam(1e-3, eps=1e-7)
CHANGE = augment.chain(augment.random_affine, augment.random_colour)
EPOCH = count()
CLASSES = 11


@cache
def arrays(n: int) -> data.Arrays:
    image, mask = images(n)
    return data.to_device(data.Arrays(image, mask, [""] * len(image), ""))


@cache
def indices(n: int) -> data.Arrays:
    """The same images with masks of `CLASSES` classes, in squares."""
    y, x = np.mgrid[:SIZE, :SIZE] // 16
    mask = ((y + 3 * x) % CLASSES).astype(np.uint8)[None, ..., None].repeat(n, 0)
    return data.to_device(arrays(n)._replace(mask=mask))


def network(precision: str, classes: int = 1) -> Any:
    """The tutorial's network. On a GPU, JAX uses TF32 for float32 by default."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else None)
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    return ARTICLE.clone(dtype=dtype, num_classes=classes)


def initial_state(precision: str, classes: int = 1) -> train.TrainState:
    shape = (1, SIZE, SIZE, 3)
    return train.create_train_state(network(precision, classes), TX, jax.random.key(0), shape)


@cache
def variables(precision: str) -> Any:
    return initial_state(precision).variables


@cache
def trainer(precision: str, augmented: bool, classes: int = 1) -> Callable[[Iterable[Any]], None]:
    """A function that takes a training step on each batch and waits for the last one."""
    model, state = network(precision, classes), initial_state(precision, classes)
    loss = losses.bce if classes == 1 else losses.cross_entropy
    step = train.make_train_step(model, TX, loss, augment=CHANGE if augmented else None)

    def run(batches: Iterable[Any]) -> None:
        nonlocal state
        metrics = None
        for batch in batches:
            state, metrics = step(state, batch, KEY)
        jax.block_until_ready(metrics)

    return run


def work(kind: str, precision: str, batch: int, times: int) -> None:
    model, dataset = network(precision), arrays(int(sys.argv[1]))
    if kind == "step":
        first = jax.device_put(next(data.batches(dataset, batch)))
        trainer(precision, False)(repeat(first, times))
    elif kind == "classes":
        first = jax.device_put(next(data.batches(indices(int(sys.argv[1])), batch)))
        trainer(precision, False, CLASSES)(repeat(first, times))
    elif kind == "infer":
        image = dataset.image[:batch]
        answers = [predict.predict_proba(model, variables(precision), image) for _ in range(times)]
        jax.block_until_ready(answers)
    else:
        for _ in range(times):
            order = data.shuffled(len(dataset.image), 0, next(EPOCH))
            trainer(precision, kind == "augmented")(data.batches(dataset, batch, order))


def peak() -> int:
    """Peak memory in use on the device, in bytes."""
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    serve(work, None if jax.default_backend() == "cpu" else peak)
