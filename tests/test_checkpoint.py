from functools import partial

import jax
import numpy as np
import optax
import pytest

from flax_unet import checkpoint, losses, train
from flax_unet.model import UNet

MODEL, TX = UNet(features=(4, 8), group_size=2), optax.adam(1e-2)
create = partial(train.create_train_state, MODEL, TX, image_shape=(1, 8, 8, 3))


def abstract():
    return jax.eval_shape(create, jax.random.key(0))


def state_at(step):
    """A state with known numbers: every entry is the step."""
    return jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, step, leaf.dtype), abstract())


def value(state):
    values = np.unique(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)]))
    assert len(values) == 1
    return int(values[0])


def test_the_newest_and_the_best_are_kept_and_no_others(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step, dice in [(1, 0.2), (2, 0.9), (3, 0.4), (4, 0.5)]:
            checkpoint.save(checkpoints, state_at(step), {"at": step}, dice=dice)
        checkpoint.save(checkpoints, state_at(5), {"at": 5})  # in the middle of an epoch
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [2, 5]
        for which, step in (("latest", 5), ("best", 2)):
            state, progress = checkpoint.restore(checkpoints, abstract(), which)
            assert (value(state), progress) == (step, {"at": step})


def test_a_run_goes_on_after_a_checkpoint_in_the_middle(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
        checkpoint.save(checkpoints, state_at(2), {})
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(2), {})  # stopped again before a step was made
        checkpoint.save(checkpoints, state_at(3), {}, dice=0.3)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [3]
        assert checkpoints.best_step() == checkpoints.latest_step() == 3


def test_what_is_saved_is_not_what_donated_steps_write_over_it(tmp_path):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.random((2, 8, 8, 3), np.float32),
        "mask": rng.integers(0, 2, (2, 8, 8, 1), np.uint8),
        "weight": np.ones(2, np.float32),
    }
    step = train.make_train_step(MODEL, TX, losses.bce)
    state, _ = step(jax.jit(create)(jax.random.key(0)), batch, jax.random.key(1))
    saved = jax.tree.map(np.array, state)  # copies
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
        for _ in range(20):
            state, _ = step(state, batch, jax.random.key(1))
        checkpoints.wait_until_finished()
        restored, _ = checkpoint.restore(checkpoints, abstract())
    for a, b in zip(*map(jax.tree.leaves, (saved, restored)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_killed_save_left_is_passed_over_and_foreign_files_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert value(checkpoint.restore(checkpoints, abstract())[0]) == 1
        checkpoint.save(checkpoints, state_at(2), {}, dice=0.2)
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        assert value(checkpoint.restore(checkpoints, abstract())[0]) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_no_checkpoint_is_an_error_that_names_the_place(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path} holds no best"):
            checkpoint.restore(checkpoints, abstract(), "best")


def test_another_network_is_refused(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
        checkpoints.wait_until_finished()
        wider = MODEL.clone(features=(4, 8, 16))
        other = partial(train.create_train_state, wider, TX, image_shape=(1, 8, 8, 3))
        with pytest.raises(checkpoint.CheckpointError, match="1 cannot be restored.*another model"):
            checkpoint.restore(checkpoints, jax.eval_shape(other, jax.random.key(0)))


def test_a_damaged_checkpoint_is_named(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-10])
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="1 cannot be restored, it is damaged"):
            checkpoint.restore(checkpoints, abstract())
