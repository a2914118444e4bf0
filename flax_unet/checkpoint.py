"""Checkpoints: the latest and the best state of a run. The only module that uses Orbax.

A step is a folder that gets its name only when it is complete, so a run killed while saving still
has the step before. Saving is asynchronous; `close` waits for it.

A step holds the items `state` (to resume), `progress` (JSON) and `variables` (to predict: they are
read without the optimizer).
"""

import os
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from flax_unet.train import TrainState

Which = Literal["latest", "best"]


class CheckpointError(OSError):
    """No checkpoint can be restored; the message names the folder."""


def _dice(metrics: dict[str, float]) -> float:
    return metrics["dice"]


def exists(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a complete checkpoint."""
    return any(entry.name.isdigit() for entry in Path(folder).glob("*"))


def open_checkpoints(
    folder: str | os.PathLike, *, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints in a folder, which is created unless `read_only`. Close the result."""
    policy = AnyPreservationPolicy([LatestN(1), BestN(get_metric_fn=_dice, n=1)])
    # `best_fn` only makes Orbax record the metric; the policy decides what is deleted. On its own,
    # `best_fn` would delete the latest step.
    options = ocp.CheckpointManagerOptions(
        best_fn=_dice,
        preservation_policy=policy,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    return ocp.CheckpointManager(
        Path(folder).absolute(), item_names=("state", "variables", "progress"), options=options
    )


def save(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    progress: dict[str, Any],
    *,
    dice: float | None = None,
) -> None:
    """Start saving a state under its step; a step that exists is left as it is.

    Args:
        checkpoints: from `open_checkpoints`.
        state: may be donated as soon as this returns.
        progress: what else a restart needs, as JSON.
        dice: validation Dice, for choosing the best; None ranks below every real value.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    # The next step donates these buffers, so Orbax gets a copy to write in the background.
    state = jax.tree.map(jnp.copy, state)
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            variables=ocp.args.StandardSave(state.variables),
            progress=ocp.args.JsonSave(progress),
        ),
        # Orbax complains about a step without metrics.
        metrics={"dice": -1.0 if dice is None else float(dice)},
    )


def restore(
    checkpoints: ocp.CheckpointManager, abstract: TrainState, which: Which = "latest"
) -> tuple[TrainState, dict[str, Any]]:
    """The saved state, on the first device, and its progress.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: shapes and types, from `jax.eval_shape` of `create_train_state`.
        which: `latest`, or `best` by validation Dice.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model or optimizer.
    """
    state = ocp.args.StandardRestore(_on_first_device(abstract))
    step, progress = _step(checkpoints, which), ocp.args.JsonRestore()
    restored = _restore(checkpoints, step, state=state, progress=progress)
    return restored["state"], restored["progress"]


def restore_variables(
    checkpoints: ocp.CheckpointManager, abstract: Any, which: Which = "latest"
) -> tuple[dict[str, Any], int]:
    """The saved variables, on the first device, and their step. The optimizer is not needed.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: shapes and types, from `jax.eval_shape` of the model's `init`.
        which: `latest`, or `best` by validation Dice.

    Raises:
        CheckpointError: there are none, or they are damaged or of another model.
    """
    step = _step(checkpoints, which)
    if (checkpoints.directory / str(step) / "variables").exists():
        target = ocp.args.StandardRestore(_on_first_device(abstract))
        return _restore(checkpoints, step, variables=target)["variables"], step
    # Written by version 0.1.0, which saved only the state; perhaps on a device that is not here.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = ocp.args.StandardRestore(fallback_sharding=here)
    state = _restore(checkpoints, step, state=target)["state"]
    variables = {"params": _average(state["opt_state"]) or state["params"], **state["model_state"]}
    if jax.tree.map(jnp.shape, variables) != jax.tree.map(jnp.shape, abstract):
        raise CheckpointError(f"{checkpoints.directory / str(step)} does not fit the model")
    return jax.device_put(variables, jax.devices()[0]), step


def _average(node: Any) -> Any:
    """The parameters of the `train.Average` in an optimizer state restored as dicts, or None."""
    if isinstance(node, dict) and node.keys() == {"count", "params"}:
        return node["params"]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next(filter(None, map(_average, children)), None)


def _on_first_device(abstract: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )


def _step(checkpoints: ocp.CheckpointManager, which: Which) -> int:
    step = checkpoints.latest_step() if which == "latest" else checkpoints.best_step()
    if step is None:
        remedy = "train first" if checkpoints.latest_step() is None else "ask for the latest"
        raise CheckpointError(f"{checkpoints.directory} holds no {which} checkpoint: {remedy}")
    return step


def _restore(checkpoints: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds, some with pages of text
        folder, reason = checkpoints.directory / str(step), str(error)[:200].splitlines()
        raise CheckpointError(
            f"{folder} cannot be restored, it is damaged or of another model: {' '.join(reason)}"
        ) from error
