"""The training step: (state, batch, key) to (state, metrics).

A batch is a dict: `image` [B, H, W, 3], uint8 or float in [0, 1]; `mask` [B, H, W, C] of 0 and 1;
`weight` [B], 0 for an image that only fills the batch and must not count. With an `index` [B] too,
`image` and `mask` are a whole data set [N, ...] on the device, of which the step takes these.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_unet import metrics
from flax_unet.augment import Augment
from flax_unet.cpu import compiler_options
from flax_unet.data import as_float

Batch = Mapping[str, jax.Array | np.ndarray]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


@struct.dataclass
class TrainState:
    """All that training changes. Arrays only, so that it is saved, sharded and donated whole."""

    step: jax.Array  # int32 scalar: the updates made
    params: Any
    model_state: Any  # what the model keeps beside its parameters, such as batch statistics
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes: with the average of the parameters, if the optimizer has it."""
        params = self.params
        for part in jax.tree.leaves(self.opt_state, is_leaf=_is_average):
            params = part.params if _is_average(part) else params
        return {"params": params, **self.model_state}


@struct.dataclass
class Average:
    """State of `average_params`."""

    count: jax.Array  # int32 scalar: the updates so far
    params: Any


def _is_average(part: Any) -> bool:
    return isinstance(part, Average)


def average_params(decay: float) -> optax.GradientTransformation:
    """An exponential moving average of the parameters, for `TrainState.variables`.

    Stands last in an `optax.chain` and changes no update. In the beginning, after t updates, the
    decay is no more than (1 + t) / (10 + t), so that the initial parameters are soon forgotten.

    Args:
        decay: share of the old average that each update keeps.
    """

    def init(params: Any) -> Any:
        # A copy, for the state is donated whole; in bfloat16 small steps would be lost.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return Average(jnp.zeros((), jnp.int32), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        keep = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, now: old + (1 - keep) * (now - old), state.params, new)
        return updates, Average(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def create_train_state(
    model: nn.Module, tx: optax.GradientTransformation, key: jax.Array, image_shape: tuple[int, ...]
) -> TrainState:
    """The state before the first step; under `jax.eval_shape`, its shapes and types.

    Args:
        model: a module called with an image [B, H, W, C].
        tx: the optimizer.
        key: a PRNG key for the initial parameters.
        image_shape: (B, H, W, C); the parameters depend on C alone.
    """
    # XLA's own generator: it compiles several times faster than JAX's threefry, of which a network
    # has dozens. What it draws depends on the kind of device.
    rbg = jax.random.wrap_key_data(jax.random.bits(key, (4,), jnp.uint32), impl="rbg")
    model_state = dict(model.init(rbg, jnp.zeros(image_shape, jnp.float32)))
    params = model_state.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))


def start_from(state: TrainState, tx: optax.GradientTransformation, variables: Any) -> TrainState:
    """A state before the first step with given variables, of the same model or one much like it.

    A head for another number of classes stays as it was: modules named `head` and so on, whose
    arrays differ in their last axis alone.

    Args:
        state: from `create_train_state`.
        tx: the optimizer; its state begins anew.
        variables: `params` and what else the model keeps, such as another state's `variables`.

    Raises:
        ValueError: other arrays are missing, too many or of another shape; all are named.
    """

    def by_name(tree: Any) -> dict[str, Any]:
        return cast(dict[str, Any], flatten_dict(tree, sep="/"))

    mine = by_name({"params": state.params, **state.model_state})
    given = by_name(dict(variables))
    wrong = [f"{name} is missing" for name in mine.keys() - given.keys()]
    wrong += [f"{name} is not in the model" for name in given.keys() - mine.keys()]
    for name in mine.keys() & given.keys():
        old, new = mine[name].shape, given[name].shape
        if old != new and name.startswith("params/head") and old[:-1] == new[:-1]:
            given[name] = mine[name]
        elif old != new:
            wrong.append(f"{name} has shape {new} instead of {old}")
    if wrong:
        raise ValueError("the given variables are not this model's: " + ", ".join(sorted(wrong)))
    # Copies, for the state is donated whole.
    both = jax.tree.map(lambda x: jnp.array(x, x.dtype), unflatten_dict(given, sep="/"))
    params = both.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, both, tx.init(params))


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: Loss,
    augment: Augment | None = None,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Any]]:
    """One update of the parameters.

    Args:
        state: the state; its `step` picks the randomness, so step n is the same after a restart.
        batch: `image`, `mask` and `weight`, see above.
        key: the run's PRNG key, the same for every step.
        model: called as `model.apply(variables, image, train=True, rngs={"dropout": key})`; one
            that keeps more than parameters with `weight=weight` too, to leave out of its batch
            statistics what only fills the batch.
        tx: the optimizer.
        loss_fn: (logits, labels) to a loss an image, [B].
        augment: (key, image, mask) to (image, mask).
        accumulate: parts into which the batch is split, one after the other: less memory. The
            update is that of the whole batch, for a model whose images do not see each other.

    Returns:
        The next state, and figures: of this batch before the update, `loss`, the mean over its
        images of weight 1, `iou_coef`, and the `confusion` of each image, [B, C]; and of the
        update, its `update_norm`: where it is finite, so are the next parameters.

    Raises:
        ValueError: the loss has not one value an image, shapes do not agree, or the batch cannot be
            split into `accumulate` parts.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    image, labels, weight = _take(batch)
    if augment is not None:
        image, labels = augment(augment_key, image, labels)
    image, labels = as_float(image), labels.astype(jnp.float32)
    if len(image) % accumulate:
        raise ValueError(f"{len(image)} images cannot be split into {accumulate} equal parts")

    # Of a batch without a single real image the loss is 0.
    images = jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)

    def total_loss(params: Any, model_state: Any, part: Any) -> tuple[jax.Array, Any]:
        image, labels, part_weight, key = part
        logits, model_state = model.apply(
            {"params": params, **model_state},
            image,
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
            **({"weight": part_weight} if model_state else {}),
        )
        loss = loss_fn(logits, labels)
        _check_loss(loss, part_weight)
        return (part_weight * loss).sum() / images, (logits, model_state)

    gradient = jax.value_and_grad(total_loss, has_aux=True)

    def add_part(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        loss, grads, model_state = carry
        (more, (logits, model_state)), gradient_of_part = gradient(state.params, model_state, part)
        return (loss + more, optax.tree.add(grads, gradient_of_part), model_state), logits

    if accumulate == 1:
        part = image, labels, weight, dropout_key
        (loss, (logits, model_state)), grads = gradient(state.params, state.model_state, part)
    else:
        # Every n-th image to the n-th part, so that each part has images of all devices.
        parts = [
            x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1) for x in (image, labels, weight)
        ]
        nothing = jnp.zeros(()), optax.tree.zeros_like(state.params), state.model_state
        (loss, grads, model_state), logits = jax.lax.scan(
            add_part, nothing, (*parts, jax.random.split(dropout_key, accumulate))
        )
        logits = logits.swapaxes(0, 1).reshape(-1, *logits.shape[2:])
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    figures = {
        "loss": loss,
        "iou_coef": metrics.iou_coef(logits, labels, weight),
        "confusion": metrics.confusion(logits, labels),
        "update_norm": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, model_state, opt_state), figures


def eval_step(variables: Any, batch: Batch, *, model: Any, loss_fn: Loss) -> dict[str, Any]:
    """Figures of a batch: `loss` of each image [B], `iou_coef`, and `confusion` [B, C]."""
    image, labels, weight = _take(batch)
    logits: Any = model.apply(variables, as_float(image))
    labels = labels.astype(jnp.float32)
    loss = loss_fn(logits, labels)
    _check_loss(loss, weight)
    return {
        "loss": loss,
        "iou_coef": metrics.iou_coef(logits, labels, weight),
        "confusion": metrics.confusion(logits, labels),
    }


def _take(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The image, mask and weight of a batch, gathered from the data set if it has an `index`."""
    image, labels, weight = (jnp.asarray(batch[key]) for key in ("image", "mask", "weight"))
    if "index" in batch:
        image, labels = (jnp.take(x, batch["index"], axis=0, mode="clip") for x in (image, labels))
    return image, labels, weight


def _check_loss(loss: jax.Array, weight: jax.Array) -> None:
    if loss.shape != weight.shape or loss.ndim != 1:
        raise ValueError(
            f"the loss has shape {loss.shape} and weight {weight.shape}: both must be [B], one "
            "value an image"
        )


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: Loss,
    *,
    augment: Augment | None = None,
    remat: bool = False,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Compile `train_step`; the state given to it is donated, so use the one that it returns.

    Args:
        model, tx, loss_fn, augment, accumulate: as `train_step` takes them.
        remat: keep only what passes between the model's blocks for the backward pass, and compute
            the rest again: less memory, more time. The model must have such an attribute.
        mesh: devices over which the arrays of a batch are split, a whole data set too, so that
            their lengths must be multiples of the number of devices; the state is the same on each.
    """
    model = model.clone(remat=True) if remat else model
    step = partial(
        train_step, model=model, tx=tx, loss_fn=loss_fn, augment=augment, accumulate=accumulate
    )
    whole, split = _shardings(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, split, whole),
        out_shardings=whole,
        donate_argnums=0,
        compiler_options=compiler_options(),
    )


def make_eval_step(
    model: Any, loss_fn: Loss, *, mesh: Mesh | None = None
) -> Callable[[Any, Batch], dict[str, Any]]:
    """Compile `eval_step`; see `make_train_step`."""
    whole, split = _shardings(mesh)
    return jax.jit(
        partial(eval_step, model=model, loss_fn=loss_fn),
        in_shardings=(whole, split),
        out_shardings=whole,
        compiler_options=compiler_options(),
    )


def _shardings(mesh: Mesh | None) -> tuple[Any, Any]:
    """Of what every device holds whole, and of what is split along its first axis."""
    if mesh is None:
        return None, None
    return (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
    )
