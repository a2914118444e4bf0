"""Checkpoints: the newest and the best state of a run. The only file that knows Orbax.

A step is a folder that appears under its name only once it is whole, so a run killed while saving
finds the step before. Saving goes on while training does; `close` waits for it.
"""

import os
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from flax_unet.train import TrainState


class CheckpointError(OSError):
    """There is no checkpoint that can be restored; the message says where it was looked for."""


def _dice(figures: dict[str, float]) -> float:
    return figures["dice"]


def open_checkpoints(
    folder: str | os.PathLike, *, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints in a folder, which is made unless `read_only`. Close what this returns."""
    policy = AnyPreservationPolicy([LatestN(1), BestN(get_metric_fn=_dice, n=1)])
    # `best_fn` makes Orbax write the figures; what is deleted is the policy's to say, for on its
    # own `best_fn` would delete the newest step.
    options = ocp.CheckpointManagerOptions(
        best_fn=_dice,
        preservation_policy=policy,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    return ocp.CheckpointManager(
        Path(folder).absolute(), item_names=("state", "progress"), options=options
    )


def save(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    progress: dict[str, Any],
    *,
    dice: float | None = None,
) -> None:
    """Begin to save a state under its step; a step that is there already is left alone.

    Args:
        checkpoints: from `open_checkpoints`.
        state: may be donated as soon as this returns.
        progress: what else a restart needs, as JSON.
        dice: the validation Dice by which the best is chosen; None: any other is better.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    # The next step writes over these arrays; a copy is Orbax' own to read after it has returned.
    state = jax.tree.map(jnp.copy, state)
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
        ),
        # Orbax complains of a step without a figure: this one is below all real ones.
        metrics={"dice": -1.0 if dice is None else float(dice)},
    )


def restore(
    checkpoints: ocp.CheckpointManager,
    abstract: TrainState,
    which: Literal["latest", "best"] = "latest",
) -> tuple[TrainState, dict[str, Any]]:
    """The state, on the first device, and the progress that were saved.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: shapes and types, from `jax.eval_shape` of `create_train_state`.
        which: `latest`, or `best` by validation Dice.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model or optimizer.
    """
    step = checkpoints.latest_step() if which == "latest" else checkpoints.best_step()
    if step is None:
        remedy = "train first" if checkpoints.latest_step() is None else "ask for the latest"
        raise CheckpointError(f"{checkpoints.directory} holds no {which} checkpoint: {remedy}")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )
    try:
        restored = checkpoints.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()
            ),
        )
    except Exception as error:  # Orbax and TensorStore raise many kinds, some of pages
        folder, reason = checkpoints.directory / str(step), str(error)[:200].splitlines()
        raise CheckpointError(
            f"{folder} cannot be restored, it is damaged or of another model: {' '.join(reason)}"
        ) from error
    return restored["state"], restored["progress"]
