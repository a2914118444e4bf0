"""Several processes give what one gives, end together, and lose nothing if one is lost."""

import json
import os
import signal
import time

import jax
import numpy as np
import optax
import pytest
import several
import together
from test_devices import Wide, check_same_run, flags, folders, history  # noqa: F401

from flax_unet import checkpoint, data, devices, processes, train
from flax_unet_cli import train as train_program
from flax_unet_cli.program import Several


@pytest.fixture(scope="module")
def saved_elsewhere(tmp_path_factory):
    """A folder with a state that four devices of one process have saved, and that state."""
    folder, mesh = tmp_path_factory.mktemp("together"), devices.make_mesh(4)
    state, _ = together.steps(mesh, split=True)
    expected = jax.device_get(state)
    with checkpoint.open_checkpoints(folder / "other") as checkpoints:
        checkpoint.save(checkpoints, state, {"a": 2}, dice=0.5)
        checkpoint.finish(checkpoints, state)
    return folder, expected


@pytest.fixture(scope="module")
def two(saved_elsewhere):
    """What two processes with two devices each compute."""
    folder, _ = saved_elsewhere
    with several.Several(2, 2, [several.ROOT / "tests" / "together.py", folder]) as program:
        assert program.wait() == [0, 0], program.outputs
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def test_processes_tell_each_other_values_of_any_size(two):
    for index, result in enumerate(two):
        assert result["each"] == [[1, 7], [2, 3007]]
        assert result["first"] == "from 0"
        assert result["in_turn"] == (index > 0)  # the second finds what the first made
        assert result["first_of_host"] == (index == 0)


def test_an_error_in_one_process_is_raised_in_all(two):
    for index, result in enumerate(two):
        caught = result["caught"]
        assert caught["all"] == ["DataError", f"in process {index}"]
        assert caught["one"] == ["DataError", "in process 1"]
        assert caught["before"] == caught["first"] == ["DataError", "in process 0"]
        other = ["RuntimeError", "Odd: cannot be pickled"]
        assert caught["odd"] == (["Odd", "cannot be pickled"] if index == 1 else other)


def test_pictures_are_shared_and_all_errors_are_listed_everywhere(two):
    for index, result in enumerate(two):
        assert result["map_all"] == [i * i for i in range(9)]
        assert result["computed"] == list(range(9))[index::2]
        lines = "3 pictures are unusable:", *(f"picture {i}" for i in (3, 4, 7))
        assert result["caught"]["map_all"] == "\n  ".join(lines)


def test_a_signal_is_agreed_on_one_call_later(two):
    assert [result["signals"] for result in two] == [[0, 0, 0, 0, 15, 15]] * 2


def test_each_process_decodes_the_rows_of_its_devices(two):
    """Batches of five are filled to eight: two rows for each device, four for each process."""
    order = np.arange(100, 112)
    expected = [np.resize(order[start : start + 5], 5) for start in (0, 5, 10)]
    filled = [np.resize(batch, 8) for batch in expected]
    for index, result in enumerate(two):
        rows = slice(4 * index, 4 * index + 4)
        streamed = result["streamed"]
        assert [b["here"] for b in streamed["batches"]] == [b[rows].tolist() for b in filled]
        assert streamed["decoded"] == sorted(int(i) for batch in filled for i in batch[rows])
        for batch, whole, real in zip(streamed["batches"], filled, (5, 5, 2), strict=True):
            assert np.array(batch["image"])[:, 0, 0, 0].tolist() == whole.tolist()
            assert batch["weight"] == [1.0] * real + [0.0] * (8 - real)


@pytest.mark.parametrize("split", [False, True])
def test_steps_and_scores_of_two_processes_are_those_of_one_device(two, split):
    state, alone = together.steps(None, split=False) if not split else wide_alone()
    for result in two:
        ours = result["split" if split else "replicated"]
        for (loss, counts), (expected, right) in zip(ours["steps"], alone["steps"], strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert counts == right
        assert ours["scores"] == pytest.approx(alone["scores"], rel=1e-4)
        assert ours["counts"] == alone["counts"]


def wide_alone():
    """`together.steps` of the network that is split, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "shard", lambda state, _: state)
        return together.steps(None, split=True)


def test_what_two_processes_save_is_restored_by_one_bit_for_bit(two, saved_elsewhere):
    folder, like = saved_elsewhere
    abstract = jax.eval_shape(lambda: like)
    for place in (None, devices.make_mesh(4)):
        target = abstract if place is None else devices.abstract(abstract, place, split=True)
        with checkpoint.open_checkpoints(folder / "here") as checkpoints:
            state, progress = checkpoint.restore(checkpoints, target)
        crcs = [together.zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]
        assert progress == {"a": 1}
        assert crcs == two[0]["saved"] == two[1]["saved"]


def test_what_one_process_has_saved_is_restored_by_two_bit_for_bit(two, saved_elsewhere):
    _, expected = saved_elsewhere
    crcs = [together.zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(expected)]
    for result in two:
        assert result["progress"] == {"a": 2}
        assert result["restored"]["False"] == [crcs, [True]]
        assert result["restored"]["True"] == [crcs, [False, True]]  # small arrays are copied
