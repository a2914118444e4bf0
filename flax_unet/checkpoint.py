"""Checkpoints: the newest states of a run, and the best. The only module that uses Orbax.

A step is a folder that gets its name only when it is complete, so a run killed while saving still
has the steps before. Saving is asynchronous; `finish` waits for it.

A step holds the items `state` (to resume), `progress` (JSON) and `variables` (to predict: they are
read without the optimizer), and in its metadata their checksums, which every reader compares. A
step is read back before the next one is saved, and the two newest are kept: should one be damaged
on disk, readers go on with another and say so.
"""

import contextlib
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_unet import devices, processes
from flax_unet.train import TrainState

Which = Literal["latest", "best"]
T = TypeVar("T")

METADATA = "_CHECKPOINT_METADATA"  # the file that Orbax writes into each step


class CheckpointError(OSError):
    """A checkpoint cannot be restored or saved; the message names the folder."""


def _complete(entry: Path) -> bool:
    """Whether an entry of the folder is a complete step."""
    return entry.name.isdigit() and (entry / METADATA).is_file()


_Names: Any = type(ocp.path.step.standard_name_format())


class _ReadableNames(_Names):
    """Orbax' names of steps, without those whose metadata it cannot read: one would hide all."""

    def find_all(self, base_path: Any) -> Iterator[Any]:
        for step in super().find_all(base_path):
            try:
                _ = step.commit_timestamp_nsecs  # reads the metadata
            except Exception:  # of many kinds
                continue
            yield step


def _readable_names(folder: Path) -> set[str]:
    return {step.path.name for step in _ReadableNames().find_all(folder)}


def exists(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a complete checkpoint."""
    folder = Path(folder)
    return folder.is_dir() and any(map(_complete, folder.iterdir()))


def check_folder(folder: str | os.PathLike) -> None:
    r"""Refuse a folder in which Orbax would save nothing, as it takes its path for a pattern.

    Raises:
        ValueError: the absolute path has one of the characters [ ] * ? \\.
    """
    path = str(Path(folder).absolute())
    if found := sorted(set(path) & set("[]*?\\")):
        raise ValueError(
            f"checkpoints cannot be saved in {path}: its name has {' '.join(found)}; rename it or "
            "choose another --workdir"
        )


@contextlib.contextmanager
def open_checkpoints(
    folder: str | os.PathLike, *, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """A context with the checkpoints in a folder, which is created unless `read_only`.

    An entry that has a step's name but is no checkpoint is set aside unless `read_only`. The end of
    the block waits for what is being saved.

    Raises:
        ValueError: Orbax would save nothing there, see `check_folder`.
        CheckpointError: the folder is damaged, or the last checkpoint cannot be saved.
    """
    check_folder(folder)
    folder = Path(folder).absolute()
    if not read_only:
        processes.first(lambda: _set_others_aside(folder))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_LatestAndBest(folder),
        step_name_format=_ReadableNames(),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    items = ("state", "variables", "progress")
    try:
        checkpoints = _patiently(
            lambda: ocp.CheckpointManager(folder, item_names=items, options=options)
        )
    except ValueError as error:  # Orbax reads the metrics that version 0.2.0 saved
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    try:
        yield checkpoints
    except BaseException as error:
        # The first error is the one to report. Other processes may not come to what this waits for.
        with processes.within(processes.PATIENCE, error=error), contextlib.suppress(Exception):
            checkpoints.close()
        raise
    with _saving(folder):
        checkpoints.close()


@contextlib.contextmanager
def _saving(folder: Path, size: int = 0) -> Iterator[None]:
    """Turn the errors of a block that waits for Orbax into a `CheckpointError` of one line."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds, some with pages of text
        free = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free" if folder.exists() else ""
        needed = f"one needs {size / 1e6:.0f} MB" if size else ""
        reason = " ".join(str(error)[:200].splitlines())
        words = "; ".join(filter(None, [reason, needed, free]))
        raise CheckpointError(f"no checkpoint can be saved in {folder}: {words}") from error


class _LatestAndBest:
    """Keeps the two latest steps, and the best of those whose Dice is on disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max(steps, key=lambda step: (_dice(self.folder / str(step)), step), default=None)
        return [step in steps[-2:] or step == best for step in steps]


def _folder(checkpoints: ocp.CheckpointManager, step: int) -> Path:
    return Path(checkpoints.directory) / str(step)


def _set_others_aside(folder: Path) -> None:
    """Rename what has a step's name and is no checkpoint."""
    if not folder.is_dir():
        return
    readable = _readable_names(folder)
    for entry in folder.iterdir():
        if entry.name.isdigit() and not (_complete(entry) and entry.name in readable):
            _set_aside(entry, "it is no checkpoint")


def _set_aside(entry: Path, reason: str) -> None:
    """Rename an entry, so that nothing is lost and a step can have its name."""
    names = (entry.with_name(f"damaged-{entry.name}{'+' * i}") for i in range(100))
    entry.rename(target := next(name for name in names if not name.exists()))
    warnings.warn(f"{entry} is renamed {target.name}: {reason}", stacklevel=2)


def _checksum(tree: Any) -> int:
    """CRC-32 over the entries of all arrays of a tree, in order."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        entries = np.ascontiguousarray(devices.on_host(leaf))
        value = zlib.crc32(entries.reshape(-1).view(np.uint8).data, value)
    return value


def _checksum_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _record(folder: Path) -> dict[str, Any]:
    """The Dice and checksums that `save` recorded of a step; {} before version 0.3.0.

    Raises:
        CheckpointError: the file is damaged or missing.
    """
    try:
        record = json.loads((folder / METADATA).read_bytes())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no checkpoint, or damaged: {error!r}") from error
    if record and record.pop("checksum", None) != _checksum_of_json(record):
        raise CheckpointError(f"{folder} is damaged: {METADATA} is not what was saved (checksum)")
    return record or {}


def _dice(folder: Path) -> float:
    """The validation Dice of a step; -1 if it has none, -2 if it cannot be read."""
    try:
        record = _record(folder) or json.loads((folder / "metrics" / "metrics").read_bytes())
        return float(record["dice"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return -2.0


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

    Raises:
        CheckpointError: the disk is full, or the step saved before cannot be read back.
    """
    finish(checkpoints, state)
    step = int(state.step)
    if step in checkpoints.all_steps():
        return
    with _saving(folder := Path(checkpoints.directory), size := _size(state)):
        if shutil.disk_usage(folder).free < size:  # Orbax would print pages about it
            raise OSError("the disk is full")
    # The next step donates these buffers, so Orbax gets a copy to write in the background.
    state = jax.tree.map(jnp.copy, state)
    record = {
        "dice": -1.0 if dice is None else float(dice),
        "state": _checksum(state),
        "variables": _checksum(state.variables),
        "progress": _checksum_of_json(progress),
    }
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            variables=ocp.args.StandardSave(state.variables),
            progress=ocp.args.JsonSave(progress),
        ),
        custom_metadata=record | {"checksum": _checksum_of_json(record)},
    )


def _size(state: TrainState) -> int:
    """Bytes of a step on disk."""
    leaves = jax.tree.leaves((state, state.variables))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def finish(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Wait until the latest step is on disk, and read it back.

    Args:
        checkpoints: from `open_checkpoints`.
        state: with the shapes and types of the saved one.

    Raises:
        CheckpointError: it cannot be read back.
    """
    with _saving(Path(checkpoints.directory), _size(state)):
        checkpoints.wait_until_finished()
    if (step := checkpoints.latest_step()) is not None:
        _read_state(checkpoints, step, state)
        _read_variables(checkpoints, step, state.variables)


def restore(
    checkpoints: ocp.CheckpointManager, abstract: TrainState, which: Which = "latest"
) -> tuple[TrainState, dict[str, Any]]:
    """The saved state, on the first device or where `abstract` says, and its progress.

    A step that is damaged is named in a warning, and the next one is taken.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: shapes and types, from `jax.eval_shape` of `create_train_state`. Arrays that it
            places on a mesh, see `devices.abstract`, are restored there if it splits them, or if
            the mesh has devices of several processes.
        which: `latest`, or `best` by validation Dice.

    Raises:
        CheckpointError: there is none, or all are damaged or of another model or optimizer.
    """
    return _first_sound(checkpoints, which, lambda step: _read_state(checkpoints, step, abstract))


def restore_variables(
    checkpoints: ocp.CheckpointManager, abstract: Any, which: Which = "latest"
) -> tuple[dict[str, Any], int]:
    """The saved variables, on the first device, and their step. The optimizer is not needed.

    A step that is damaged is named in a warning, and the next one is taken.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: shapes and types, from `jax.eval_shape` of the model's `init`.
        which: `latest`, or `best` by validation Dice.

    Raises:
        CheckpointError: there are none, or all are damaged or of another model.
    """

    def read(step: int) -> tuple[dict[str, Any], int]:
        return _read_variables(checkpoints, step, abstract), step

    return _first_sound(checkpoints, which, read)


def _first_sound(checkpoints: ocp.CheckpointManager, which: Which, read: Callable[[int], T]) -> T:
    """Call `read` on the wanted step, or on the next one that is not damaged."""
    failures: dict[int, CheckpointError] = {}
    while steps := [step for step in _ranked(checkpoints, which) if step not in failures]:
        try:
            result = read(steps[0])
        except CheckpointError as error:
            if not _vanishes(_folder(checkpoints, steps[0])):
                failures[steps[0]] = error
            continue
        for error in (*failures.values(), *_unreadable(Path(checkpoints.directory), failures)):
            warnings.warn(f"{error}; going on with step {steps[0]}", stacklevel=3)
        return result
    if failures:
        raise next(iter(failures.values()))
    raise CheckpointError(f"{checkpoints.directory} holds no {which} checkpoint: train first")


def _unreadable(folder: Path, known: Container[int]) -> Iterator[CheckpointError]:
    """Errors of other steps whose metadata cannot be read; Orbax lists such last, or not at all."""
    entries = list(folder.iterdir())  # before the readable ones: a training may add some
    readable = _readable_names(folder)
    for entry in entries:
        if entry.name.isdigit() and int(entry.name) not in known:
            try:
                _record(entry)
                if entry.name in readable:
                    continue
                error = CheckpointError(f"{entry} is no checkpoint, or damaged")
            except CheckpointError as caught:
                error = caught
            if not _vanishes(entry):
                yield error


def _ranked(checkpoints: ocp.CheckpointManager, which: Which) -> list[int]:
    """The steps on disk now, the wanted one first."""
    _patiently(checkpoints.reload)  # a training may have saved and deleted some
    steps = sorted(checkpoints.all_steps(), reverse=True)
    if which == "best":
        steps.sort(key=lambda step: _dice(_folder(checkpoints, step)), reverse=True)
    return steps


def _patiently(listing: Callable[[], T]) -> T:
    """What a listing of the steps returns; again, if a training deleted one meanwhile."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError):
            return listing()
        time.sleep(0.05)
    return listing()


def _vanishes(folder: Path) -> bool:
    """Whether a training deletes this step, which takes it a moment."""
    for _ in range(10):
        if not folder.exists():
            return True
        time.sleep(0.05)
    return False


def latest_step(folder: str | os.PathLike) -> int | None:
    """The number of the latest checkpoint of a folder, or None."""
    with open_checkpoints(folder, read_only=True) as checkpoints:
        return next(iter(_ranked(checkpoints, "latest")), None)


def read_progress(folder: str | os.PathLike) -> dict[str, Any]:
    """The progress in the latest checkpoint of a folder.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    with open_checkpoints(folder, read_only=True) as checkpoints:

        def read(step: int) -> dict[str, Any]:
            target = ocp.args.JsonRestore()
            progress = _restore(checkpoints, step, progress=target)["progress"]
            _compare(checkpoints, step, progress=_checksum_of_json(progress))
            return progress

        return _first_sound(checkpoints, "latest", read)


def set_aside_damaged(checkpoints: ocp.CheckpointManager, abstract: TrainState) -> None:
    """Rename the steps that cannot be restored, with a warning, so that a run can go on.

    Args:
        checkpoints: from `open_checkpoints`, not read only.
        abstract: see `restore`.

    Raises:
        CheckpointError: there is no other; nothing is renamed.
    """
    steps, failures = checkpoints.all_steps(), {}
    for step in steps:
        try:
            _read_state(checkpoints, step, abstract)
            _read_variables(checkpoints, step, abstract.variables)
        except CheckpointError as error:
            failures[step] = error
    if failures and len(failures) == len(steps):
        raise failures[max(failures)]

    def set_aside() -> None:
        for step, error in failures.items():
            _set_aside(_folder(checkpoints, step), str(error))

    processes.first(set_aside)
    checkpoints.reload()


def _read_state(
    checkpoints: ocp.CheckpointManager, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Read the state and progress of a step, and check them against their checksums.

    Raises:
        CheckpointError: they are damaged or of another model or optimizer.
    """
    state = ocp.args.StandardRestore(_target(abstract))
    restored = _restore(checkpoints, step, state=state, progress=ocp.args.JsonRestore())
    _compare(
        checkpoints,
        step,
        state=_checksum(restored["state"]),
        progress=_checksum_of_json(restored["progress"]),
    )
    return restored["state"], restored["progress"]


def _read_variables(checkpoints: ocp.CheckpointManager, step: int, abstract: Any) -> Any:
    """Read the variables of a step, and check them against their checksum.

    Raises:
        CheckpointError: they are damaged or of another model.
    """
    if (_folder(checkpoints, step) / "variables").exists():
        target = ocp.args.StandardRestore(_target(abstract))
        variables = _restore(checkpoints, step, variables=target)["variables"]
        _compare(checkpoints, step, variables=_checksum(variables))
        return variables
    if _record(_folder(checkpoints, step)):
        raise CheckpointError(f"{_folder(checkpoints, step)} is damaged: it has no variables")
    # Written by version 0.1.0, which saved only the state; perhaps on a device that is not here.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = ocp.args.StandardRestore(fallback_sharding=here)
    state = _restore(checkpoints, step, state=target)["state"]
    variables = {"params": _average(state["opt_state"]) or state["params"], **state["model_state"]}
    if jax.tree.map(jnp.shape, variables) != jax.tree.map(jnp.shape, abstract):
        raise CheckpointError(f"{_folder(checkpoints, step)} does not fit the model")
    return jax.device_put(variables, jax.local_devices()[0])


def _compare(checkpoints: ocp.CheckpointManager, step: int, **found: int) -> None:
    """Compare checksums with those that were saved, if any were.

    Raises:
        CheckpointError: one differs.
    """
    folder = _folder(checkpoints, step)
    record = _record(folder)
    for name, value in found.items():
        if record and record.get(name) != value:
            raise CheckpointError(
                f"{folder} is damaged: its {name} is not what was saved (checksum)"
            )


def _average(node: Any) -> Any:
    """The parameters of the `train.Average` in an optimizer state restored as dicts, or None."""
    if isinstance(node, dict) and node.keys() == {"count", "params"}:
        return node["params"]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next(filter(None, map(_average, children)), None)


def _target(abstract: Any) -> Any:
    """Where to restore arrays: on the first device, or where they are on several, see `restore`."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        own = getattr(leaf, "sharding", None)
        one = own is None or (own.is_fully_addressable and own.is_fully_replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first if one else own)

    return jax.tree.map(target, abstract)


def _restore(checkpoints: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds, some with pages of text
        folder, reason = _folder(checkpoints, step), str(error)[:200].splitlines()
        raise CheckpointError(
            f"{folder} cannot be restored, it is damaged or of another model: {' '.join(reason)}"
        ) from error
