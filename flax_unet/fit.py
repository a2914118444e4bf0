"""The training loop: a generator of epochs. It reads and writes no files."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from flax_unet import data, devices, metrics
from flax_unet.augment import Augment
from flax_unet.classes import check_mask
from flax_unet.model import accepted
from flax_unet.train import Batch, Loss, TrainState, make_train_step


class Epoch(NamedTuple):
    """One pass over the training images, or its beginning if it was stopped.

    Attributes:
        number: 1, 2, ...
        state: the state after it. The next epoch donates it: use or copy it before that.
        records: one per step, as JSON: what resuming in the middle of an epoch needs.
        metrics: `metrics.summary` over its images; None if it was stopped before its end.
        seconds: how long it took.
        images: how many images it trained on in this time, fewer than all after a restart.
    """

    number: int
    state: TrainState
    records: list[dict[str, Any]]
    metrics: dict[str, float] | None
    seconds: float
    images: int


def fit(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: Loss,
    state: TrainState,
    n: int,
    batches: Callable[..., Iterator[Batch]],
    *,
    key: jax.Array,
    seed: int,
    epochs: int,
    batch_size: int,
    augment: Augment | None = None,
    records: Sequence[dict[str, Any]] = (),
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
    stop: Callable[[], Any] = lambda: False,
    accumulate: int = 1,
    remat: bool = False,
    frozen: Sequence[str] = (),
    mesh: Mesh | None = None,
    check_values: bool = True,
) -> Iterator[Epoch]:
    """Train from a state to the last epoch.

    All randomness comes from `key` and `seed`, so a run that is resumed from its last state and
    records ends with the same parameters as an uninterrupted one.

    Args:
        model, tx, loss_fn: see `train.train_step`.
        state: donated; from `train.create_train_state`, or the state of an earlier `Epoch`.
        n: number of training images.
        batches: maps image indices to batches of those images, in order: `data.batches` or
            `data.stream` with the other arguments bound. If it has an argument `epoch`, as
            `crops.batches`, it is given that too, from 0.
        key: PRNG key of dropout and augmentation.
        seed: of the order of the images.
        epochs: number of the last epoch.
        batch_size: images per batch, as in `batches`.
        records: the ones of the unfinished `Epoch` that `state` comes from.
        on_step: called with the number of images and the record of each step.
        stop: called after each step and each epoch; if true, the epoch is yielded as it is, as the
            last one.
        augment, accumulate, remat, frozen, mesh: see `train.make_train_step`.
        check_values: whether to look for values in the batches that no network can be trained on.

    Yields:
        Each epoch.

    Raises:
        FloatingPointError: a loss or an update is not finite.
        ValueError: `state` and `records`, or `batches` and `batch_size`, do not fit together, or
            the images or masks have other values than the model needs.
    """
    step_fn = make_train_step(
        model,
        tx,
        loss_fn,
        augment=augment,
        accumulate=accumulate,
        remat=remat,
        frozen=frozen,
        mesh=mesh,
    )
    steps_per_epoch, step, rows = -(-n // batch_size), int(state.step), list(records)
    if step % steps_per_epoch != len(rows) % steps_per_epoch:
        raise ValueError(
            f"the state has made {step % steps_per_epoch} of the {steps_per_epoch} steps of an "
            f"epoch, and there are records of {len(rows)}: use those of the same Epoch"
        )

    if len(rows) == steps_per_epoch:  # of an epoch that was stopped at its end
        rows = []

    def fetch(step: int, result: dict[str, Any], weight: np.ndarray) -> None:
        rows.append(_record(result, weight))
        check_finite(step, loss=rows[-1]["loss"], update_norm=rows[-1]["update_norm"])
        if on_step is not None:
            on_step(int(weight.sum()), rows[-1])

    channels: int | None = None
    for epoch in range(step // steps_per_epoch, epochs):
        done, stopped, started = len(rows) * batch_size, False, time.perf_counter()
        # The metrics of a step are fetched while the device runs the next one.
        pending: list[tuple[int, dict[str, Any], np.ndarray]] = []
        order = data.shuffled(n, seed, epoch)[done:]
        for batch in batches(order, **accepted(batches, epoch=epoch)):
            if check_values and channels is None:
                image, mask = devices.here(batch["image"]), devices.here(batch["mask"])
                data.check(image, mask)
                channels = _channels(model, state.variables, image)
                check_mask(mask, channels)
            elif check_values and "index" not in batch:  # the arrays on a device stay the same
                check_mask(devices.here(batch["mask"]), channels)
            state, result = step_fn(state, batch, key)
            step += 1
            pending.append((step, result, np.asarray(batch["weight"])))
            if len(pending) > 1:
                fetch(*pending.pop(0))
            if stopped := bool(stop()):
                break
        for entry in pending:
            fetch(*entry)
        complete = len(rows) == steps_per_epoch
        if not complete and not stopped:
            raise ValueError(
                f"{n} images are {steps_per_epoch} batches of {batch_size}, but `batches` made "
                f"{len(rows)}: use the same batch_size for both"
            )
        summary = _summary(rows) if complete else None
        seconds = time.perf_counter() - started
        yield Epoch(epoch + 1, state, rows, summary, seconds, min(n, len(rows) * batch_size) - done)
        if stopped or stop():
            return
        rows = []


def _channels(model: Any, variables: Any, image: Any) -> int:
    """The number of channels of a model's logits."""
    image = jax.ShapeDtypeStruct((1, *image.shape[1:]), np.float32)
    apply = partial(model.apply, **accepted(model, train=False))
    return jax.eval_shape(apply, variables, image).shape[-1]


def check_finite(step: int, **values: float) -> None:
    """Raise FloatingPointError, with the step's number, if a value is not finite."""
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the {name.replace('_', ' ')} of step {step} is {value}: try a smaller learning "
                "rate"
            )


def _record(result: dict[str, Any], weight: np.ndarray) -> dict[str, Any]:
    """What the summary of an epoch needs of one step, as JSON."""
    result, real = jax.device_get(result), weight > 0
    return {
        "loss": float(result["loss"]),
        "update_norm": float(result["update_norm"]),
        "iou_coef": float(result["iou_coef"]),
        "confusion": [count[real].tolist() for count in result["confusion"]],
    }


def _summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """The training metrics of an epoch from the records of its steps."""
    counts = [np.concatenate(x) for x in zip(*(r["confusion"] for r in records), strict=True)]
    # Each image counts equally, including those of the last, smaller batch.
    loss = np.repeat([r["loss"] for r in records], [len(r["confusion"][0]) for r in records])
    return metrics.summary(loss, [r["iou_coef"] for r in records], metrics.Confusion(*counts))
