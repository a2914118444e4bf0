"""Damaged checkpoints: exactly one of the saved states, with a warning, or a CheckpointError."""

import random
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_unet import checkpoint, train
from flax_unet.checkpoint import CheckpointError
from flax_unet.model import UNet

from .damage import damaged
from .models import same_arrays
from .outcome import Outcome

create = partial(
    train.create_train_state,
    UNet(features=(2, 4), norm=2),
    optax.sgd(0.1),
    image_shape=(1, 4, 4, 1),
)


def run(n: int, seed: int) -> Outcome:
    """Read from n folders of two steps, of which one or both are damaged."""
    outcome, rng = Outcome(), random.Random(seed)
    abstract = jax.eval_shape(create, jax.random.key(0))
    states = {step: state_at(step, abstract) for step in (1, 2)}
    with tempfile.TemporaryDirectory() as place:
        good, folder = Path(place, "good"), Path(place, "damaged")
        with checkpoint.open_checkpoints(good) as checkpoints:
            for step, state in states.items():
                checkpoint.save(checkpoints, state, {"at": step}, dice=step / 10)
        for _ in range(n):
            shutil.copytree(good, folder)
            steps = rng.choice(((1,), (2,), (2,), (2,), (1, 2)))
            case = "\n".join(damage(folder / str(step), rng) for step in steps)
            reader = rng.choice((read_state, read_variables, read_progress, resume))
            # One damaged step is no reason to fail: the other one is sound.
            allowed = (CheckpointError,) if len(steps) > 1 else ()
            with outcome.attempt(f"{reader.__name__}\n{case}", *allowed):
                check(reader, folder, abstract, states, sound=2 not in steps)
            shutil.rmtree(folder)
    return outcome


def state_at(step: int, abstract: train.TrainState) -> train.TrainState:
    rng = np.random.default_rng(step)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract)
    return state.replace(step=jnp.int32(step))


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a step, or remove it or a folder; say which and how."""
    part = rng.choice(sorted(folder.iterdir()))  # first, since some have many files
    files = sorted(path for path in part.rglob("*") if path.is_file()) or [part]
    path, way = rng.choice(files), rng.choice(("change", "change", "empty", "remove", "folder"))
    name = path.relative_to(folder.parent)
    if way == "folder" and path.parent != folder:
        shutil.rmtree(path.parent)
        return f"remove {name.parent}"
    if way == "remove":
        path.unlink()
        return f"remove {name}"
    before = path.read_bytes()
    after = b"" if way == "empty" else damaged([before], rng)
    path.write_bytes(after)
    return f"change {name}: {before.hex()} to {after.hex()}"


def check(reader: Any, folder: Path, abstract: Any, states: dict[int, Any], sound: bool) -> None:
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step, tree, progress = reader(folder, abstract)
    assert step in states, step
    expected = states[step] if isinstance(tree, train.TrainState) else states[step].variables
    assert tree is None or same_arrays(tree, expected), f"not what step {step} was"
    assert progress in (None, {"at": step}), progress
    ours = [str(each.message) for each in caught if str(folder) in str(each.message)]
    assert step == 2 or (not sound and ours), f"no warning, but step {step} is taken"
    if reader is not resume:
        after = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        assert after == before, "a reader wrote"


def read_state(folder: Path, abstract: Any) -> tuple[int, Any, Any]:
    with checkpoint.open_checkpoints(folder, read_only=True) as checkpoints:
        state, progress = checkpoint.restore(checkpoints, abstract)
    return int(state.step), state, progress


def read_variables(folder: Path, abstract: Any) -> tuple[int, Any, Any]:
    with checkpoint.open_checkpoints(folder, read_only=True) as checkpoints:
        variables, step = checkpoint.restore_variables(checkpoints, abstract.variables, "best")
    return step, variables, None


def read_progress(folder: Path, abstract: Any) -> tuple[int, Any, Any]:
    progress = checkpoint.read_progress(folder)
    return progress["at"], None, progress


def resume(folder: Path, abstract: Any) -> tuple[int, Any, Any]:
    with checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.set_aside_damaged(checkpoints, abstract)
        state, progress = checkpoint.restore(checkpoints, abstract)
    return int(state.step), state, progress
