"""The training step: (state, batch, key) to (state, metrics).

A batch is a dict: `image` [B, H, W, C], uint8 or float in [0, 1]; `mask` uint8, see
`flax_unet.classes`; `weight` [B], 0 for padding images, which do not count. With an `index` [B],
`image` and `mask` hold the entire data set [N, ...] on the device, and the step gathers those rows.
A `pixel_weight` [B, H, W, 1] is passed on to the loss.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jax.extend.core import Literal
from jax.sharding import Mesh
from optax.contrib import ScheduleFreeState

from flax_unet import classes, cpu, devices, metrics
from flax_unet.augment import Augment
from flax_unet.model import accepted, warm_up
from flax_unet.pictures import as_float

Batch = Mapping[str, jax.Array | np.ndarray]
#: (logits, mask), or (logits, mask, pixel_weight) if a batch has that, to the loss per image, [B].
Loss = Callable[..., jax.Array]


@struct.dataclass
class TrainState:
    """Everything a step updates, as a pytree of arrays: saved, sharded and donated as one."""

    step: jax.Array  # int32 scalar: the number of updates so far
    params: Any
    model_state: Any  # the model's other collections, such as batch statistics
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for `model.apply`.

        The parameters are the averaged ones if the optimizer has some: `average_params`, or
        `optax.contrib.schedule_free`. Batch statistics are not averaged a second time: they are
        those of the latest parameters.
        """
        params = self.params
        for node in jax.tree.leaves(self.opt_state, is_leaf=_has_average):
            if isinstance(node, Average):
                params = _where_given(node.params, params)
            elif isinstance(node, ScheduleFreeState):
                z = _where_given(node.z, params)
                params = optax.contrib.schedule_free_eval_params(node._replace(z=z), params)
        return {"params": params, **self.model_state}


@struct.dataclass
class Average:
    """State of `average_params`."""

    count: jax.Array  # int32 scalar: the number of updates so far
    params: Any


def _has_average(node: Any) -> bool:
    return isinstance(node, Average | ScheduleFreeState)


def _where_given(new: Any, old: Any) -> Any:
    """The leaves of `new`, and those of `old` where an optimizer was given none."""

    return jax.tree.map(lambda n, o: o if _is_masked(n) else n, new, old, is_leaf=_is_masked)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def average_params(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of the parameters, for `TrainState.variables`.

    Put it last in an `optax.chain`; updates pass through unchanged. After t updates the decay is
    capped at (1 + t) / (10 + t), so the initial parameters are forgotten quickly.

    Args:
        decay: fraction of the old average that each update keeps.
    """

    def init(params: Any) -> Any:
        # Copied because the state is donated; float32 because bfloat16 would lose small updates.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return Average(jnp.zeros((), jnp.int32), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        capped = warm_up(decay, state.count)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, x: a + (1 - capped) * (x - a), state.params, new)
        return updates, Average(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def freeze(
    tx: optax.GradientTransformation, frozen: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for all parameters but those of some modules, which it does not see.

    Args:
        tx: an optimizer.
        frozen: names of modules, such as "encoder" or "encoder/block0".

    Raises:
        ValueError: when it is applied, there is no module of such a name.
    """

    def labels(params: Any) -> Any:
        names = _names_of(params, frozen)
        flat = {each: "frozen" if _is_within(each, frozen) else "trained" for each in names}
        return unflatten_dict(flat, sep="/")

    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def _names_of(params: Any, frozen: Sequence[str]) -> list[str]:
    """The names of parameters.

    Raises:
        ValueError: a frozen module has none.
    """
    names = ["/".join(path) for path in flatten_dict(params)]
    for name in frozen:
        if not any(_is_within(each, [name]) for each in names):
            modules = ", ".join(sorted(params))
            raise ValueError(f"frozen: there is no module {name!r}: the modules are {modules}")
    return names


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}/") for module in modules)


def create_train_state(
    model: nn.Module, tx: optax.GradientTransformation, key: jax.Array, image_shape: tuple[int, ...]
) -> TrainState:
    """The state before the first step; under `jax.eval_shape`, its shapes and types.

    Args:
        model: a Linen module called with an image [B, H, W, C].
        tx: the optimizer.
        key: a PRNG key for the initial parameters.
        image_shape: (B, H, W, C); the parameters depend on C alone.

    Raises:
        ValueError: an attribute of the model, such as a list, is not hashable.
    """
    try:
        hash(model)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} has an attribute that is not hashable: use a tuple or "
            "FrozenDict"
        ) from error
    return _create(model, tx, key, tuple(image_shape))


@partial(jax.jit, static_argnums=(0, 1, 3))
def _create(
    model: nn.Module, tx: optax.GradientTransformation, key: jax.Array, image_shape: tuple[int, ...]
) -> TrainState:
    # A network draws dozens of times, and threefry compiles several times slower than XLA's own
    # generator, whose values differ between kinds of devices.
    rbg = jax.random.wrap_key_data(jax.random.bits(key, (4,), jnp.uint32), impl="rbg")
    image = jnp.zeros(image_shape, jnp.float32)
    model_state = dict(model.init(rbg, image, **accepted(model, train=False)))
    params = model_state.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))


def start_from(state: TrainState, tx: optax.GradientTransformation, variables: Any) -> TrainState:
    """A fresh state (step 0) with the given variables, of the same or nearly the same model.

    Heads (modules named `head*`) whose arrays differ only in the last axis keep their initial
    values, so the number of classes may change.

    Args:
        state: from `create_train_state`.
        tx: the optimizer; its state is initialised again.
        variables: `params` and the model's other collections, such as another state's `variables`.

    Raises:
        ValueError: any other array is missing, unexpected or of another shape; the message lists
            them all.
    """

    def by_name(tree: Any) -> dict[str, Any]:
        return cast(dict[str, Any], flatten_dict(tree, sep="/"))

    own = by_name({"params": state.params, **state.model_state})
    new = by_name(dict(variables))
    wrong = [f"{name} is missing" for name in own.keys() - new.keys()]
    wrong += [f"{name} is not in the model" for name in new.keys() - own.keys()]
    for name in own.keys() & new.keys():
        shape, new_shape = own[name].shape, new[name].shape
        is_head = name.startswith("params/head") and shape[:-1] == new_shape[:-1]
        if shape != new_shape and is_head:
            new[name] = own[name]
        elif shape != new_shape:
            wrong.append(f"{name} has shape {new_shape} instead of {shape}")
    if wrong:
        raise ValueError("the variables are not this model's: " + ", ".join(sorted(wrong)))
    # Copied because the state is donated.
    model_state = _copy(unflatten_dict(new, sep="/"))
    params = model_state.pop("params")
    opt_state = _copy(tx.init(params))  # some begin as the parameters, which are donated with it
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, x.dtype), tree)


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
    frozen: Sequence[str] = (),
) -> tuple[TrainState, dict[str, Any]]:
    """One update of the parameters.

    Args:
        state: its `step` selects the randomness, so that step n is the same after a restart.
        batch: `image`, `mask` and `weight`, and perhaps `pixel_weight`, see above.
        key: the run's PRNG key, the same for every step.
        model: a Linen module called with an image, and with `train=True`, `weight=weight` and
            `step=state.step` if its `__call__` accepts them; `weight` keeps padding images out of
            batch statistics. Dropout keys come from `rngs={"dropout": key}`.
        tx: the optimizer. If it takes them, it is given `value`, `grad`, `value_fn` and `grad_fn`:
            the loss, its gradient, and both as functions of the parameters.
        loss_fn: see `Loss`; the mask is float32.
        augment: (key, image, mask) to (image, mask).
        accumulate: number of micro-batches, which run in sequence to save memory (gradient
            accumulation). The update is that of the entire batch, unless images interact (batch
            norm).
        frozen: names of modules that run as with `train=False` and keep their batch statistics;
            their parameters stay too if `tx` is `freeze(tx, frozen)`.

    Returns:
        The next state, and a dict: `loss` (mean over the images of weight 1), `iou_coef` and
        `confusion` [B, C], all of this batch before the update; and `update_norm`, which is finite
        if and only if the new parameters are.

    Raises:
        ValueError: the loss is not one value per image, shapes do not agree, the batch cannot be
            split into `accumulate` micro-batches, the model has `train` under another name, or a
            `pixel_weight` meets an augmentation, which would not move it; or the optimizer never
            changes a module that is not `frozen` and has batch statistics, or there is no module of
            a name in `frozen`.
    """
    _names_of(state.params, frozen)
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    image, mask, weight, *extra = _take(batch)
    if augment is not None:
        if extra:
            raise ValueError("an augmentation moves no pixel_weight: augment the pictures before")
        image, mask = augment(augment_key, image, mask)
    image, mask = as_float(image), mask.astype(jnp.float32)
    if len(image) % accumulate:
        raise ValueError(
            f"{len(image)} images cannot be split into {accumulate} micro-batches: use a multiple"
        )

    # Avoids 0 / 0: the loss of a batch of padding images is 0.
    images = jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)

    def total_loss(params: Any, model_state: Any, micro_batch: Any) -> tuple[jax.Array, Any]:
        image, mask, micro_weight, *extra, key = micro_batch
        with nn.intercept_methods(partial(_without_training, frozen)):
            logits, model_state = model.apply(
                {"params": params, **model_state},
                image,
                rngs={"dropout": key},
                mutable=list(model_state),
                **_training_arguments(model, micro_weight, state.step),
            )
        loss = loss_fn(logits, mask, *extra)
        _check_loss(loss, micro_weight)
        return (micro_weight * loss).sum() / images, (logits, model_state)

    gradient = jax.value_and_grad(total_loss, has_aux=True)

    def add_gradient(carry: Any, micro_batch: Any) -> tuple[Any, jax.Array]:
        loss, grads, model_state = carry
        (more, (logits, model_state)), more_grads = gradient(state.params, model_state, micro_batch)
        return (loss + more, optax.tree.add(grads, more_grads), model_state), logits

    if accumulate == 1:
        micro_batches = image, mask, weight, *extra, dropout_key
        (loss, (logits, model_state)), grads = gradient(
            state.params, state.model_state, micro_batches
        )
    else:
        # Image i goes to micro-batch i % accumulate: each has images of all devices.
        arrays = [
            x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
            for x in (image, mask, weight, *extra)
        ]
        micro_batches = *arrays, jax.random.split(dropout_key, accumulate)
        zeros = jnp.zeros((), jnp.float32), optax.tree.zeros_like(state.params), state.model_state
        (loss, grads, model_state), logits = jax.lax.scan(add_gradient, zeros, micro_batches)
        logits = logits.swapaxes(0, 1).reshape(-1, *logits.shape[2:])

    # Optax's line searches demand that it takes whatever else they are given.
    def value_fn(params: Any, grad_fn: Any = None) -> jax.Array:
        def loss(micro_batch: Any) -> jax.Array:
            return total_loss(params, state.model_state, micro_batch)[0]

        if accumulate == 1:
            return loss(micro_batches)
        return jax.lax.map(loss, micro_batches).sum()

    def grad_fn(params: Any, _: Any) -> Any:
        return jax.grad(value_fn)(params)

    extra_args = accepted(tx.update, value=loss, grad=grads, value_fn=value_fn, grad_fn=grad_fn)
    _check_frozen(partial(tx.update, **extra_args), state, frozen)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra_args)
    params = optax.apply_updates(state.params, updates)
    result = {
        "loss": loss,
        **_batch_metrics(model, logits, mask, weight),
        "update_norm": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, model_state, opt_state), result


def _check_frozen(update: Any, state: TrainState, frozen: Sequence[str]) -> None:
    """Refuse an optimizer that never changes a module whose batch statistics would change.

    The update of such a parameter, by `optax.set_to_zero`, is computed from nothing.
    """
    masked = any(map(_is_masked, jax.tree.leaves(state.opt_state, is_leaf=_is_masked)))
    if not state.model_state or not masked:
        return
    closed = jax.make_jaxpr(lambda *args: update(*args)[0])(
        state.params, state.opt_state, state.params
    )
    changing: set[Any] = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    for equation in closed.jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in changing for x in equation.invars):
            changing.update(equation.outvars)
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    fixed = {
        path: isinstance(x, Literal) or x not in changing
        for path, x in zip(paths, closed.jaxpr.outvars, strict=True)
    }
    statistics = jax.tree_util.tree_leaves_with_path(state.model_state)
    for module in sorted({_name(path[1:-1]) for path, _ in statistics}):
        own = [fixed[path] for path in paths if _is_within(path, [module])]
        if own and all(own) and not _is_within(module, frozen):
            raise ValueError(
                f"the optimizer never changes {module}, but its batch statistics would change: "
                "name what is frozen in `frozen`, and use `train.freeze` with the same names"
            )


def _name(path: Any) -> str:
    return "/".join(entry.key for entry in path)


def _without_training(
    frozen: Sequence[str], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """A call inside of `nn.intercept_methods`, with `train=False` in frozen modules."""
    if not _is_within("/".join(context.module.path), frozen):
        return call(*args, **kwargs)
    bound = inspect.signature(call).bind(*args, **kwargs)
    if "train" in bound.arguments:
        bound.arguments["train"] = False
    return call(*bound.args, **bound.kwargs)


def _training_arguments(model: nn.Module, weight: jax.Array, step: jax.Array) -> dict[str, Any]:
    """`train`, `weight` and `step`, if the model accepts them.

    Raises:
        ValueError: the model has another name for `train`, and would be trained as for inference.
    """
    arguments = accepted(model, train=True, weight=weight, step=step)
    names = "training", "is_training", "is_train", "deterministic", "use_running_average"
    others = accepted(model, **dict.fromkeys(names))
    if "train" not in arguments and others:
        raise ValueError(
            f"{type(model).__name__} has no argument `train` but {', '.join(others)}: wrap it in a "
            "module whose `__call__` takes `train`"
        )
    return arguments


def _batch_metrics(
    model: Any, logits: jax.Array, mask: jax.Array, weight: jax.Array
) -> dict[str, Any]:
    overlapping = classes.is_overlapping(model)
    return {
        "iou_coef": metrics.iou_coef(logits, mask, weight, overlapping=overlapping),
        "confusion": metrics.confusion(logits, mask, overlapping=overlapping),
    }


def eval_step(variables: Any, batch: Batch, *, model: Any, loss_fn: Loss) -> dict[str, Any]:
    """A batch's `loss` per image [B], `iou_coef`, `confusion` [B, C] and `logits` [B, H, W, C]."""
    result = _forward(variables, batch, model=model)
    return {**result, "loss": _losses(result["logits"], batch, loss_fn=loss_fn)}


def _forward(variables: Any, batch: Batch, *, model: Any) -> dict[str, Any]:
    image, mask, weight, *_ = _take(batch)
    logits: Any = model.apply(variables, as_float(image), **accepted(model, train=False))
    return {**_batch_metrics(model, logits, mask.astype(jnp.float32), weight), "logits": logits}


def _losses(logits: jax.Array, batch: Batch, *, loss_fn: Loss) -> jax.Array:
    _, mask, weight, *extra = _take(batch)
    loss = loss_fn(logits, mask.astype(jnp.float32), *extra)
    _check_loss(loss, weight)
    return loss


def _take(batch: Batch) -> list[jax.Array]:
    """Image, mask, weight and perhaps pixel weight, gathered from the data set by the `index`."""
    keys = ["image", "mask", "weight", *(["pixel_weight"] if "pixel_weight" in batch else [])]
    arrays = {key: jnp.asarray(batch[key]) for key in keys}
    arrays["weight"] = arrays["weight"].astype(jnp.float32)  # also with 64 bits enabled
    if "index" in batch:
        for key in keys:  # in order: that of a set differs between processes, and so would the code
            if key != "weight":
                arrays[key] = jnp.take(arrays[key], batch["index"], axis=0, mode="clip")
    return list(arrays.values())


def _check_loss(loss: jax.Array, weight: jax.Array) -> None:
    if loss.shape != weight.shape or loss.ndim != 1:
        raise ValueError(
            f"the loss has shape {loss.shape} and weight {weight.shape}: both must be [B], one "
            "value per image: average a loss over H, W and C, not over B"
        )


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: Loss,
    *,
    augment: Augment | None = None,
    remat: bool = False,
    accumulate: int = 1,
    frozen: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Compile `train_step`. The state passed to it is donated: use the one that it returns.

    >>> from flax_unet import UNet, losses
    >>> model, tx = UNet(features=(8, 16)), optax.adam(1e-3)
    >>> state = create_train_state(model, tx, jax.random.key(0), (1, 32, 32, 3))
    >>> step = make_train_step(model, tx, losses.bce)
    >>> image, mask = jnp.zeros((4, 32, 32, 3), jnp.uint8), jnp.zeros((4, 32, 32, 1), jnp.uint8)
    >>> batch = {"image": image, "mask": mask, "weight": jnp.ones(4)}
    >>> state, metrics = step(state, batch, jax.random.key(1))
    >>> int(state.step), metrics["confusion"].tp.shape
    (1, (4, 1))

    Args:
        model, tx, loss_fn, augment, accumulate, frozen: see `train_step`.
        remat: rematerialise the blocks in the backward pass: less memory, more time. The model
            needs a `remat` attribute.
        mesh: devices over which a batch is split, see `devices.put`. The state is copied to each,
            or stays split as it is, see `devices.shard`.
    """
    model = model.clone(remat=True) if remat else model
    step = partial(
        train_step,
        model=model,
        tx=tx,
        loss_fn=loss_fn,
        augment=augment,
        accumulate=accumulate,
        frozen=tuple(frozen),
    )
    if mesh is None:
        return cpu.jit(step, donate_argnums=0)
    if mesh.size == 1:
        return _on_one(cpu.jit(step, donate_argnums=0), *mesh.devices.flat)

    @lru_cache(maxsize=2)
    def compiled(structure: Any, shardings: tuple[Any, ...]) -> Any:
        state = jax.tree.unflatten(structure, shardings)
        return cpu.jit(step, out_shardings=(state, devices.replicated(mesh)), donate_argnums=0)

    def on_mesh(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Any]:
        state, key = devices.spread((state, key), mesh)
        leaves, structure = jax.tree.flatten(state)
        more = devices.put(batch, mesh)
        keeping = compiled(structure, tuple(leaf.sharding for leaf in leaves))
        state, result = keeping(state, more, key)
        return state, devices.first_rows(result, len(batch["weight"]), len(more["weight"]))

    return on_mesh


def _on_one(step: Any, device: Any) -> Callable[..., Any]:
    """A compiled step on one device, without the time that a mesh takes in each step."""

    def on_one(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Any]:
        # The rest of the state is where its step is: there, once a step has been made.
        if not isinstance(state.step, Tracer) and getattr(state.step, "device", None) != device:
            state = jax.device_put(state, device)
        return step(state, batch, key)

    return on_one


def make_eval_step(
    model: Any, loss_fn: Loss, *, mesh: Mesh | None = None
) -> Callable[[Any, Batch], dict[str, Any]]:
    """Compile `eval_step`; see `make_train_step`.

    The network is compiled apart from the loss: once for all losses, which may be made on the spot.
    """
    forward, losses = make_forward(model, mesh), make_losses(loss_fn, mesh)

    def step(variables: Any, batch: Batch) -> dict[str, Any]:
        n = len(batch["weight"])
        if mesh is not None:
            variables, batch = devices.spread(variables, mesh), devices.put(batch, mesh)
        result = forward(variables, batch)
        result = {**result, "loss": losses(result["logits"], batch)}
        return devices.first_rows(result, n, len(batch["weight"]))

    return step


@lru_cache(maxsize=8)
def make_forward(model: Any, mesh: Mesh | None = None) -> Any:
    """Compile what `eval_step` does but for the loss: (variables, batch) to a dict.

    With a mesh both must be on it: see `devices`.
    """
    out = None if mesh is None else devices.replicated(mesh)
    return cpu.jit(partial(_forward, model=model), out_shardings=out)


def make_losses(loss_fn: Loss, mesh: Mesh | None = None) -> Callable[..., jax.Array]:
    """Compile a loss: (logits, batch) to the loss per image, [B]; a mesh as in `make_forward`."""
    out = None if mesh is None else devices.replicated(mesh)
    return cpu.jit(partial(_losses, loss_fn=loss_fn), out_shardings=out)
