"""Several processes give what one gives, end together, and lose nothing if one is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import together
from faults import several
from test_devices import flags, folders, history, near  # noqa: F401

from flax_unet import checkpoint, devices, processes
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


def restored(folder, like):
    """CRCs of the arrays that one process restores on one and on four devices, and the progress."""
    abstract, mesh, found = jax.eval_shape(lambda: like), devices.make_mesh(4), []
    for target in (abstract, devices.abstract(abstract, mesh, split=True)):
        with checkpoint.open_checkpoints(folder) as checkpoints:
            state, progress = checkpoint.restore(checkpoints, target)
        leaves = jax.tree.leaves(state)
        crcs = [together.zlib.crc32(np.asarray(leaf).tobytes()) for leaf in leaves]
        found.append((crcs, progress))
    return found


def test_what_two_processes_save_is_restored_by_one_bit_for_bit(two, saved_elsewhere):
    folder, like = saved_elsewhere
    assert two[0]["saved"] == two[1]["saved"]
    assert restored(folder / "here", like) == [(two[0]["saved"], {"a": 1})] * 2


@pytest.mark.slow
def test_what_two_processes_save_is_restored_by_four_and_theirs_by_one(
    two, saved_elsewhere, tmp_path
):
    folder, like = saved_elsewhere
    shutil.copytree(folder / "here", tmp_path / "other")
    with several.Several(4, 1, [several.ROOT / "tests" / "together.py", tmp_path]) as program:
        assert program.wait(500) == [0] * 4, program.outputs
    results = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(4)]
    for result in results:
        assert result["restored"]["False"] == [two[0]["saved"], [True]]
        assert result["restored"]["True"] == [two[0]["saved"], [False, True]]
        assert result["saved"] == results[0]["saved"]
    assert restored(tmp_path / "here", like) == [(results[0]["saved"], {"a": 1})] * 2


def test_what_one_process_has_saved_is_restored_by_two_bit_for_bit(two, saved_elsewhere):
    _, expected = saved_elsewhere
    crcs = [together.zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(expected)]
    for result in two:
        assert result["progress"] == {"a": 2}
        assert result["restored"]["False"] == [crcs, [True]]
        assert result["restored"]["True"] == [crcs, [False, True]]  # small arrays are copied


def command(folders, workdir, epochs, *more):  # noqa: F811
    return [*flags(folders, workdir, 1, epochs)[:-4], "--epochs", str(epochs), *more]


def epochs_of(workdir):
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):  # noqa: F811
    """A run of five epochs in one process, on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert train_program.main(flags(folders, workdir, 1, 5)) == 0
    return workdir


def test_a_signal_to_one_process_stops_all_and_another_topology_goes_on(
    folders,  # noqa: F811
    alone,
    tmp_path,
):
    """Two processes with two devices each; then one with four, split; then one with one."""
    workdir = tmp_path / "run"
    with several.train(2, 2, *command(folders, workdir, 500)) as run:
        run.until(lambda: epochs_of(workdir) >= 2)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait() == [128 + signal.SIGTERM] * 2, run.outputs
        first, second = run.outputs
    assert "each batch is split over 4 devices of 2 processes" in first
    assert first.count("epoch 1/500") == 1 and "SIGTERM: the state is saved" in first
    assert "epoch" not in second and "Traceback" not in first + second
    done = epochs_of(workdir)
    assert train_program.main([*flags(folders, workdir, 4, done + 1), "--fsdp"]) == 0
    assert train_program.main(flags(folders, workdir, 1, done + 2)) == 0
    lines, expected = history(workdir), history(alone)
    assert [line["epoch"] for line in lines] == list(range(1, done + 3))
    for ours, right in zip(lines, expected, strict=False):
        for name in ("loss", "val_loss", "dice_per_image", "val_dice_per_image"):
            assert ours[name] == near(right[name], name), name


def test_an_unreadable_picture_ends_both_processes_with_its_name(folders, tmp_path):  # noqa: F811
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for file in (folders / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "07.png").write_bytes(b"no picture")
    with several.train(2, 1, *command(tmp_path, tmp_path / "run", 2)) as run:
        assert run.wait(120) == [1, 1], run.outputs
    for output in run.outputs:
        assert "error: " in output and "07.png" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_one_of_several_processes_that_know_nothing_of_each_other_is_refused(
    folders,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    ours = flags(folders, tmp_path / "run", 1, 1)
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            assert train_program.main(ours) == 1
            assert f"one of several processes ({name}=2)" in capsys.readouterr().err
            Several(processes=1).start()  # meant so
            patch.setenv(name, "1")
            Several().start()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--coordinator", "localhost:1"], "go together: give all three"),
        (["--distributed", "--process", "1"], "leave out --coordinator"),
    ],
)
def test_flags_that_name_no_processes_are_refused(folders, tmp_path, capsys, words, expected):  # noqa: F811
    assert train_program.main([*flags(folders, tmp_path / "run", 1, 1), *words]) == 1
    assert expected in capsys.readouterr().err


def test_no_other_processes_are_found(folders, tmp_path):  # noqa: F811
    words = [*flags(folders, tmp_path / "run", 1, 1), "--distributed"]
    program = [sys.executable, "-m", "flax_unet_cli", "train", *words]  # JAX has used no device yet
    run = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "JAX finds no other processes" in run.stderr


def test_an_environment_without_processes_is_one():
    assert (processes.count(), processes.index(), os.environ.get("SLURM_PROCID")) == (1, 0, None)
    assert processes.first(lambda: 3) == processes.in_turn(lambda: 3) == 3
    assert processes.agreed([2, 15], None)() == 15
    with pytest.raises(ZeroDivisionError), processes.together():
        raise ZeroDivisionError
