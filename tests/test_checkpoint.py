import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_unet import checkpoint, losses, train
from flax_unet.model import UNet

MODEL, TX = UNet(features=(4, 8), norm=2), optax.adam(1e-2)
OLD_RUN = Path(__file__).parent / "golden" / "run-0.1.0" / "workdir"
create = partial(train.create_train_state, MODEL, TX, image_shape=(1, 8, 8, 3))


def abstract():
    return jax.eval_shape(create, jax.random.key(0))


def state_at(step):
    """A state in which every entry is the step."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, step, leaf.dtype), abstract())


def value(state):
    values = np.unique(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)]))
    assert len(values) == 1
    return int(values[0])


def abstract_variables(model):
    """What a reader knows who has only the model."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_the_two_latest_and_the_best_checkpoint_are_kept(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step, dice in [(1, 0.2), (2, 0.9), (3, 0.4), (4, 0.5)]:
            checkpoint.save(checkpoints, state_at(step), {"at": step}, dice=dice)
        checkpoint.save(checkpoints, state_at(5), {"at": 5})  # in the middle of an epoch
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [2, 4, 5]
        for which, step in (("latest", 5), ("best", 2)):
            state, progress = checkpoint.restore(checkpoints, abstract(), which)
            assert (value(state), progress) == (step, {"at": step})
            variables, at = checkpoint.restore_variables(
                checkpoints, abstract_variables(MODEL), which
            )
            assert (value(variables), at) == (step, step)


def test_a_run_can_be_resumed_from_a_checkpoint_in_the_middle_of_an_epoch(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
        checkpoint.save(checkpoints, state_at(2), {})
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(2), {})  # stopped again before a step was made
        checkpoint.save(checkpoints, state_at(3), {}, dice=0.3)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [1, 2, 3]  # 3 was not yet known to be better
        assert value(checkpoint.restore(checkpoints, abstract(), "best")[0]) == 3


def test_a_saved_state_is_not_overwritten_by_later_steps(tmp_path):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.random((2, 8, 8, 3), np.float32),
        "mask": rng.integers(0, 2, (2, 8, 8, 1), np.uint8),
        "weight": np.ones(2, np.float32),
    }
    step = train.make_train_step(MODEL, TX, losses.bce)
    state, _ = step(create(key=jax.random.key(0)), batch, jax.random.key(1))
    saved = jax.tree.map(np.array, state)  # copies
    variables = jax.tree.map(np.array, state.variables)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
        for _ in range(20):
            state, _ = step(state, batch, jax.random.key(1))
        checkpoints.wait_until_finished()
        restored, _ = checkpoint.restore(checkpoints, abstract())
        read, _ = checkpoint.restore_variables(checkpoints, abstract_variables(MODEL))
    assert_equal(restored, saved)
    assert_equal(read, variables)


def test_leftovers_of_a_killed_save_are_ignored_and_other_files_stay(tmp_path):
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


def test_a_missing_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path} holds no best"):
            checkpoint.restore(checkpoints, abstract(), "best")
        with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path} holds no latest"):
            checkpoint.restore_variables(checkpoints, abstract_variables(MODEL))


def test_another_network_is_refused(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
        checkpoints.wait_until_finished()
        wider = MODEL.clone(features=(4, 8, 16))
        other = partial(train.create_train_state, wider, TX, image_shape=(1, 8, 8, 3))
        with pytest.raises(checkpoint.CheckpointError, match="1 cannot be restored.*another model"):
            checkpoint.restore(checkpoints, jax.eval_shape(other, jax.random.key(0)))
        with pytest.raises(checkpoint.CheckpointError, match="1 cannot be restored.*another model"):
            checkpoint.restore_variables(checkpoints, abstract_variables(wider))


@pytest.mark.parametrize("norm", [2, "batch"])
@pytest.mark.parametrize("averaged", [False, True])
def test_variables_are_read_without_the_optimizer(tmp_path, norm, averaged):
    model = MODEL.clone(norm=norm)
    tx = optax.chain(TX, train.average_params(0.9)) if averaged else TX
    state = train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))
    rng = np.random.default_rng(0)  # every array differs from every other, also the average
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    state = state.replace(step=jnp.int32(3))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {}, dice=0.5)
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        variables, step = checkpoint.restore_variables(checkpoints, abstract_variables(model))
    assert step == 3
    assert_equal(variables, state.variables)
    devices = {device for leaf in jax.tree.leaves(variables) for device in leaf.devices()}
    assert devices == {jax.devices()[0]}


def test_checkpoints_of_version_0_2_0_are_ranked_by_their_metrics(tmp_path):
    dice = {1: 0.9, 2: 0.3}
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step, value in dice.items():
            checkpoint.save(checkpoints, random_state(step), {"at": step}, dice=value)
    for step, value in dice.items():
        file = tmp_path / str(step) / "_CHECKPOINT_METADATA"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {}}))
        (tmp_path / str(step) / "metrics").mkdir()
        (tmp_path / str(step) / "metrics" / "metrics").write_text(json.dumps({"dice": value}))
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        for which, step in (("best", 1), ("latest", 2)):
            assert checkpoint.restore(checkpoints, abstract(), which)[1] == {"at": step}
            found, at = checkpoint.restore_variables(checkpoints, abstract_variables(MODEL), which)
            assert at == step
            assert_equal(found, random_state(step).variables)


def old_layout(folder, state):
    """Save a state as version 0.1.0 did: without the item `variables`, and without checksums."""
    with checkpoint.open_checkpoints(folder) as checkpoints:
        checkpoint.save(checkpoints, state, {"records": []}, dice=0.5)
    folder /= str(int(state.step))
    shutil.rmtree(folder / "variables")
    file = folder / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {}}))


@pytest.mark.parametrize(
    "tx",
    [
        TX,
        optax.chain(TX, train.average_params(0.9)),
        optax.chain(
            optax.masked(
                optax.adam(1.0), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
            ),
            optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
            train.average_params(0.9),
        ),
    ],
    ids=["plain", "averaged", "nested"],
)
def test_variables_are_read_from_a_checkpoint_of_the_old_layout(tmp_path, tx):
    state = train.create_train_state(MODEL.clone(norm="batch"), tx, jax.random.key(0), (1, 8, 8, 3))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    state = state.replace(step=jnp.int32(3))
    old_layout(tmp_path, state)
    model = MODEL.clone(norm="batch")
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        variables, step = checkpoint.restore_variables(checkpoints, abstract_variables(model))
        assert step == 3
        assert_equal(variables, state.variables)
        for other in (model.clone(features=(4, 6)), model.clone(norm=None)):
            with pytest.raises(checkpoint.CheckpointError, match="does not fit the model"):
                checkpoint.restore_variables(checkpoints, abstract_variables(other))


def test_variables_are_read_from_a_checkpoint_of_another_machine(tmp_path):
    """Version 0.1.0 recorded the device of each array, which may be a GPU that is not here."""
    shutil.copytree(OLD_RUN / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / "4" / "state" / "_sharding"
    text = file.read_text()
    assert "cpu:0" in text
    file.write_text(text.replace("cpu:0", "cuda:0"))
    model = UNet((4, 8), convs=2, norm="batch", residual=True, patch=2, deep=True)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        variables, step = checkpoint.restore_variables(checkpoints, abstract_variables(model))
    assert step == 4
    with checkpoint.open_checkpoints(OLD_RUN / "checkpoints", read_only=True) as checkpoints:
        expected, _ = checkpoint.restore_variables(checkpoints, abstract_variables(model))
    assert_equal(variables, expected)


def test_a_folder_has_a_checkpoint_once_one_is_complete(tmp_path):
    assert not checkpoint.exists(tmp_path / "nothing")
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert not checkpoint.exists(tmp_path)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert not checkpoint.exists(tmp_path)
        checkpoint.save(checkpoints, state_at(1), {})
    assert checkpoint.exists(tmp_path)


def random_state(step):
    """A state with other numbers for every step."""
    rng = np.random.default_rng(step)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract())
    return state.replace(step=jnp.int32(step))


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("item", ["state", "variables"])
def test_a_damaged_checkpoint_is_named(tmp_path, item):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_at(1), {}, dice=0.1)
    for file in files(tmp_path / "1" / item):
        file.write_bytes(file.read_bytes()[:-10])
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="1 cannot be restored, it is damaged"):
            if item == "state":
                checkpoint.restore(checkpoints, abstract())
            else:
                checkpoint.restore_variables(checkpoints, abstract_variables(MODEL))


def test_no_flipped_bit_is_restored_as_another_number(tmp_path):
    good, rng = tmp_path / "good", np.random.default_rng(0)
    with checkpoint.open_checkpoints(good) as checkpoints:
        checkpoint.save(checkpoints, random_state(1), {"records": [1]}, dice=0.9)
        checkpoint.save(checkpoints, random_state(2), {"records": [2]}, dice=0.3)
    outcomes = []
    for file in files(good / "2"):
        content = bytearray(file.read_bytes())
        for at in rng.integers(0, len(content), 4 if len(content) > 2000 else 1):
            folder = tmp_path / f"{len(outcomes)}"
            shutil.copytree(good, folder)
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            (folder / file.relative_to(good)).write_bytes(damaged)
            with (
                warnings.catch_warnings(),
                checkpoint.open_checkpoints(folder, read_only=True) as checkpoints,
            ):
                warnings.simplefilter("ignore")
                state, progress = checkpoint.restore(checkpoints, abstract())
            step = int(state.step)
            outcomes.append(step)
            assert progress == {"records": [step]}
            assert_equal(state, random_state(step))
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize("which", ["latest", "best"])
def test_readers_go_on_with_another_checkpoint_and_say_so(tmp_path, which):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step, dice in [(1, 0.9), (2, 0.2), (3, 0.4), (4, 0.3)]:
            checkpoint.save(checkpoints, random_state(step), {"at": step}, dice=dice)
    wanted, other = {"latest": (4, 3), "best": (1, 3)}[which]
    shutil.rmtree(tmp_path / str(wanted) / "state")
    shutil.rmtree(tmp_path / str(wanted) / "variables")
    (tmp_path / "9").mkdir()  # somebody else's
    message = f"{tmp_path}/{wanted} .*; going on with step {other}"
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.warns(UserWarning, match=message):
            state, progress = checkpoint.restore(checkpoints, abstract(), which)
        assert_equal(state, random_state(other))
        assert progress == {"at": other}
        with pytest.warns(UserWarning, match=message):
            variables, step = checkpoint.restore_variables(
                checkpoints, abstract_variables(MODEL), which
            )
        assert step == other
        assert_equal(variables, random_state(other).variables)
    assert (tmp_path / "9").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"item_handlers", b"item_handleXs"),  # Orbax knows no such
        lambda content: content.replace(b'"dice": 0.9', b'"dice": 0.1'),
        lambda content: b"[]",
        lambda content: b"[" * 20_000,
        lambda content: None,
    ],
)
def test_a_step_whose_metadata_is_damaged_does_not_hide_the_others(tmp_path, damage):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step, dice in [(1, 0.2), (2, 0.9)]:
            checkpoint.save(checkpoints, random_state(step), {"at": step}, dice=dice)
    file = tmp_path / "2" / "_CHECKPOINT_METADATA"
    content = damage(before := file.read_bytes())
    assert content != before
    file.unlink() if content is None else file.write_bytes(content)
    message = f"{tmp_path}/2 is .*damaged.*; going on with step 1"
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        for which in ("latest", "best"):
            with pytest.warns(UserWarning, match=message):
                state, _ = checkpoint.restore(checkpoints, abstract(), which)
            assert_equal(state, random_state(1))
    with pytest.warns(UserWarning, match="damaged"):
        with checkpoint.open_checkpoints(tmp_path) as checkpoints:
            checkpoint.set_aside_damaged(checkpoints, abstract())
            assert checkpoint.restore(checkpoints, abstract())[1] == {"at": 1}
    assert (tmp_path / "damaged-2").exists() and not (tmp_path / "2").exists()


def test_a_run_sets_damaged_checkpoints_aside_and_saves_their_steps_again(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, random_state(step), {}, dice=0.1)
    for file in files(tmp_path / "2" / "progress"):
        file.write_text("{}x")
    (tmp_path / "3").mkdir()
    (tmp_path / "4").write_text("not mine")
    with (
        pytest.warns(UserWarning) as caught,
        checkpoint.open_checkpoints(tmp_path) as checkpoints,
    ):
        checkpoint.set_aside_damaged(checkpoints, abstract())
        assert int(checkpoint.restore(checkpoints, abstract())[0].step) == 1
        for step in (2, 3, 4):
            checkpoint.save(checkpoints, random_state(step), {"again": step}, dice=0.1)
    messages = [str(warning.message) for warning in caught]
    for step in (2, 3, 4):
        (message,) = (m for m in messages if m.startswith(f"{tmp_path}/{step} is renamed"))
        assert f"damaged-{step}" in message
    assert (tmp_path / "damaged-4").read_text() == "not mine"
    with checkpoint.open_checkpoints(tmp_path, read_only=True) as checkpoints:
        state, progress = checkpoint.restore(checkpoints, abstract())
    assert progress == {"again": 4}
    assert_equal(state, random_state(4))


def test_nothing_is_set_aside_if_nothing_else_is_left(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, random_state(step), {}, dice=0.1)
    other = partial(train.create_train_state, MODEL.clone(features=(4, 6)), TX)
    other = jax.eval_shape(partial(other, image_shape=(1, 8, 8, 3)), jax.random.key(0))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="2 cannot be restored"):
            checkpoint.set_aside_damaged(checkpoints, other)
    assert {"1", "2"} <= {entry.name for entry in tmp_path.iterdir()}


def test_a_checkpoint_is_read_back_before_the_next_one_is_saved(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, random_state(1), {}, dice=0.1)
        checkpoints.wait_until_finished()
        for file in files(tmp_path / "1" / "variables"):
            file.write_bytes(b"")  # as Orbax writes them into a folder [1]
        with pytest.raises(checkpoint.CheckpointError, match="1 cannot be restored"):
            checkpoint.save(checkpoints, random_state(2), {}, dice=0.1)


@pytest.mark.parametrize("name", ["run[1]", "a]b", "a*b", "what?", "back\\slash"])
def test_folders_that_orbax_takes_for_a_pattern_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="rename it or choose another --workdir"):
        with checkpoint.open_checkpoints(tmp_path / name / "checkpoints"):
            pass
    assert not (tmp_path / name).exists()


def test_a_reader_beside_a_training_that_deletes_checkpoints_reads_another(tmp_path):
    """The step that was to be read is gone: neither an error nor a warning."""
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, random_state(1), {}, dice=0.1)
        checkpoint.finish(checkpoints, abstract())
        with (
            checkpoint.open_checkpoints(tmp_path, read_only=True) as reader,
            warnings.catch_warnings(),
        ):
            assert reader.all_steps() == [1]
            for step in (2, 3, 4):
                checkpoint.save(checkpoints, random_state(step), {}, dice=0.1 * step)
            checkpoints.wait_until_finished()
            assert not (tmp_path / "1").exists()
            warnings.simplefilter("error")
            for which in ("latest", "best"):
                assert int(checkpoint.restore(reader, abstract(), which)[0].step) == 4


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        usage = shutil.disk_usage(tmp_path)
        leaves = jax.tree.leaves((abstract(), abstract().variables))
        needed = sum(int(np.prod(leaf.shape)) * 4 for leaf in leaves)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(
            checkpoint.CheckpointError, match="the disk is full; one needs .* MB are"
        ):
            checkpoint.save(checkpoints, random_state(1), {}, dice=0.1)
        assert not [entry for entry in tmp_path.iterdir() if entry.name != "checkpoints"]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        checkpoint.save(checkpoints, random_state(1), {}, dice=0.1)
        checkpoint.finish(checkpoints, abstract())
        assert int(checkpoint.restore(checkpoints, abstract())[0].step) == 1
