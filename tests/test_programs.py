"""The programs, run as a user runs them, on a small drawn data set."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import drawn
import jax
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from flax_unet import checkpoint, data, fit, formats, runs
from flax_unet.evaluate import evaluate as evaluate_arrays
from flax_unet.model import UNet
from flax_unet.predict import Mirrored
from flax_unet.recipes import RECIPES, Adam, AdamW, Recipe, configure
from flax_unet_cli import (
    __main__,
    ablate,
    data_efficiency,
    evaluate,
    export,
    predict,
    program,
    sources,
    study,
    train,
)

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "experiments"
EPOCHS = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return drawn.discs(tmp_path_factory.mktemp("discs"), 60, 32)


def arguments(folders, workdir, features="8 16", **changes):
    """Flags of train, and of the studies."""
    settings = {
        "workdir": workdir,
        "dataset": "folder",
        "images": folders / "images",
        "masks": folders / "masks",
        "image-size": 32,
        "epochs": EPOCHS,
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*words, "--features", *features.split()]


def environment(folders):
    # So that a restarted program finds what the first one compiled.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folders / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(folders / "cache"),
    }
    return os.environ | cache


def start(folders, workdir, **changes):
    command = [sys.executable, PROGRAMS / "train.py", *arguments(folders, workdir, **changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(folders), **pipes)


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def lines(workdir):
    """metrics.jsonl without times."""
    content = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in content]


def parameters(workdir):
    trained = runs.load_model(workdir, "latest")
    return trained.step, [np.asarray(x).tobytes() for x in jax.tree.leaves(trained.variables)]


def snapshot(folder):
    """Every file below a folder with its content, and every folder."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def undisturbed(folders, tmp_path_factory):
    """A run that nothing interrupted, and the seconds that its start and the rest took."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(folders, tmp_path_factory.mktemp("warm-up"), epochs=1))
    began = time.monotonic()
    process = start(folders, workdir)
    wait_until(lambda: epochs_written(workdir), process)
    first = time.monotonic() - began
    finish(process)
    return workdir, first, time.monotonic() - began - first


@pytest.fixture(scope="module")
def one_epoch(folders, tmp_path_factory):
    """A run of one epoch, trained in this process."""
    workdir = tmp_path_factory.mktemp("one-epoch") / "run"
    assert train.main(arguments(folders, workdir, epochs=1)) == 0
    return workdir


@pytest.fixture
def short(one_epoch, tmp_path):
    """A copy of a run of one epoch."""
    return Path(shutil.copytree(one_epoch, tmp_path / "run"))


@pytest.fixture
def before_each_step(monkeypatch):
    """Have a function called with the number of each training step, before it."""
    make = fit.make_train_step

    def call(function):
        def make_observed(*args, **options):
            step = make(*args, **options)

            def observed(state, batch, key):
                function(int(state.step))
                return step(state, batch, key)

            return observed

        monkeypatch.setattr(fit, "make_train_step", make_observed)

    return call


# Training


def test_a_run_explains_itself(undisturbed):
    workdir, *_ = undisturbed
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "checkpoints", "samples", "curves.png"}
    assert list((workdir / "tensorboard").glob("events.*"))
    config = json.loads((workdir / "config.json").read_text())
    parts = {*runs.DETERMINES, "places", "device", "versions"}
    assert config.keys() == parts | {"summary", "terms"} and {"masks", "images"} <= parts
    assert config["summary"]["files_left_out"] == 0
    assert config["settings"]["features"] == [8, 16] and config["settings"]["recipe"] == "unet"
    assert set(config["data"]) == {"train", "validation", "test"} and "jax" in config["versions"]
    history = lines(workdir)
    assert [line["epoch"] for line in history] == list(range(1, EPOCHS + 1))
    tutorial = {"loss", "accuracy", "iou_coef"}
    ours = {"dice_per_image", "iou_per_image"}
    assert set(history[0]) >= {p + k for p in ("", "val_") for k in tutorial | ours}
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert Image.open(workdir / f"samples/epoch-{EPOCHS:04d}.png").size[0] == 3 * 264 + 8


def epochs_written(workdir):
    """The number of complete lines of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def half_saved(workdir):
    return {path.name for path in (workdir / "checkpoints").glob("*tmp*")}


def wait_until(happened, process):
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)


def test_a_run_killed_at_any_moment_ends_like_an_uninterrupted_one(folders, undisturbed, tmp_path):
    straight, first, rest = undisturbed
    workdir, rng = tmp_path / "killed", random.Random(0)
    (workdir / "demo").mkdir(parents=True)  # another run inside this one's folder
    (workdir / "demo" / "notes.txt").write_text("mine")
    moments = ["saving"] * 3 + ["starting"] * 3 + ["training"] * 4
    rng.shuffle(moments)
    for moment in moments:
        before, stale = epochs_written(workdir), half_saved(workdir)
        process = start(folders, workdir)
        if moment == "saving":
            wait_until(lambda stale=stale: half_saved(workdir) - stale, process)
        elif moment == "training":
            wait_until(lambda before=before: epochs_written(workdir) > before, process)
            time.sleep(rng.uniform(0, 1.5 * rest / EPOCHS))
        else:
            time.sleep(rng.uniform(0, first))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if moment == "saving" and not half_saved(workdir) - stale:
            moments.append(moment)  # the checkpoint was complete already
    assert 0 < epochs_written(workdir) < EPOCHS
    finish(start(folders, workdir))
    assert parameters(workdir) == parameters(straight)
    assert lines(workdir) == lines(straight)
    assert not list(workdir.rglob("*.part"))
    # A new run and a resumed one share the compiled step.
    assert len(list((folders / "compiled").glob("jit_train_step-*-cache"))) == 1
    assert (workdir / "demo" / "notes.txt").read_text() == "mine"


def test_signals_save_in_the_middle_of_an_epoch(folders, undisturbed, tmp_path):
    straight, *_ = undisturbed
    for number in (signal.SIGTERM, signal.SIGINT):
        before = epochs_written(tmp_path)
        process = start(folders, tmp_path)
        wait_until(lambda before=before: epochs_written(tmp_path) > before, process)
        process.send_signal(number)
        output = finish(process, 128 + number)
        assert f"{number.name}: the state is saved" in output and "Traceback" not in output
    assert "resuming after step" in finish(start(folders, tmp_path))
    assert parameters(tmp_path) == parameters(straight)
    assert lines(tmp_path) == lines(straight)


def test_a_signal_ends_a_run_before_the_end_of_the_epoch(folders, tmp_path, before_each_step):
    # There are 6 steps per epoch.
    before_each_step(lambda step: step == 8 and signal.raise_signal(signal.SIGTERM))
    assert train.main(arguments(folders, tmp_path)) == 128 + signal.SIGTERM
    assert parameters(tmp_path)[0] == 9 and len(lines(tmp_path)) == 1


def test_checkpoints_may_be_fewer_than_epochs(folders, tmp_path, before_each_step):
    straight, workdir = tmp_path / "straight", tmp_path / "few"
    assert train.main(arguments(folders, straight, epochs=5)) == 0

    def saved():
        return {int(x.name) for x in (workdir / "checkpoints").iterdir() if x.name.isdigit()}

    few = [*arguments(folders, workdir, epochs=5), "--save-every", "2"]
    # There are 6 steps per epoch: a signal in the third one, and then one at its end.
    for at, steps in ((13, {12, 14}), (17, {12, 14, 18})):
        before_each_step(lambda step, at=at: step == at and signal.raise_signal(signal.SIGTERM))
        assert train.main(few) == 128 + signal.SIGTERM
        assert max(saved()) == max(steps) and saved() <= steps
    before_each_step(lambda step: None)
    assert train.main(few) == 0
    assert saved() <= {12, 18, 24, 30} and max(saved()) == 30
    assert parameters(workdir) == parameters(straight)
    first, *others = lines(workdir)
    assert [first, *others] == [lines(straight)[0] | {"saved": False}, *lines(straight)[1:]]


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    folders, tmp_path, monkeypatch, capsys
):
    workdir, copy = tmp_path / "run", tmp_path / "copy"
    few = [*arguments(folders, workdir, epochs=4), "--save-every", "4"]

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", kill)
        assert train.main(few) == 128 + signal.SIGINT
    assert len(lines(workdir)) == 4 and not checkpoint.exists(workdir / "checkpoints")
    assert train.main(few) == 0
    assert [line["epoch"] for line in lines(workdir)] == [1, 2, 3, 4]
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    assert train.main(arguments(folders, copy, epochs=4)) == 1
    assert "metrics.jsonl has no checkpoint to resume from" in capsys.readouterr().err


def test_the_best_epoch_is_one_that_was_saved():
    def line(epoch, dice, **saved):
        return {"epoch": epoch, "val_dice": dice, "loss": 1.0, "val_loss": 1.0, **saved}

    ends = [0.0, 1.0, 2.0, 3.0]
    history = [line(1, 0.5), line(2, 0.9, saved=False)]
    assert "(best)" not in train.epoch_line(history, "dice", 3, ends)
    assert "(best)" in train.epoch_line([*history, line(3, 0.6)], "dice", 3, ends)
    assert "(best)" not in train.epoch_line([*history, line(3, 0.4)], "dice", 3, ends)


def test_a_run_is_extended_with_more_epochs(folders, short, capsys):
    assert train.main(arguments(folders, short, epochs=2)) == 0
    assert "resuming after step 6" in capsys.readouterr().out
    assert [line["epoch"] for line in lines(short)] == [1, 2]


def test_a_finished_run_says_so(folders, short, capsys):
    assert train.main(arguments(folders, short, epochs=1)) == 0
    assert "all 1 epochs are done" in capsys.readouterr().out


def test_a_run_keeps_the_number_of_epochs_that_it_has_done(folders, short, capsys):
    assert train.main(arguments(folders, short, epochs=2)) == 0
    assert train.main(arguments(folders, short, epochs=1)) == 0
    assert "all 2 epochs are done" in capsys.readouterr().out
    assert json.loads((short / "config.json").read_text())["settings"]["epochs"] == 2


def test_other_versions_are_a_warning(folders, short, capsys):
    config = json.loads((short / "config.json").read_text())
    config["versions"]["jax"] = "0.0.1"
    (short / "config.json").write_text(json.dumps(config))
    assert train.main(arguments(folders, short, epochs=1)) == 0
    error = capsys.readouterr().err
    assert "warning" in error and "jax: 0.0.1 ->" in error


def test_a_config_with_more_than_this_version_knows_is_refused(folders, short, capsys):
    config = json.loads((short / "config.json").read_text())
    config["images"]["bits"] = 8
    (short / "config.json").write_text(json.dumps(config))
    assert train.main(arguments(folders, short, epochs=2)) == 1
    assert "holds a run with other settings (bits: 8 -> " in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_run_none_of_whose_checkpoints_can_be_read_begins_again(folders, short, capsys):
    for file in short.glob("checkpoints/*/_CHECKPOINT_METADATA"):
        file.write_text("[]")
    assert train.main(arguments(folders, short, epochs=1)) == 1
    words = f"no checkpoint in {short} can be read: the same command begins the run again"
    assert words in capsys.readouterr().err
    assert train.main(arguments(folders, short, epochs=1)) == 0
    assert len(lines(short)) == 1


def test_other_data_is_refused(folders, short, tmp_path, capsys):
    other = tmp_path / "other"
    for part in ("images", "masks"):
        (other / part).mkdir(parents=True)
        for file in (folders / part).iterdir():
            if file.stem != "07":
                (other / part / file.name).write_bytes(file.read_bytes())
    assert train.main(arguments(other, short, epochs=2)) == 1
    words = "holds a run with other settings (pictures of the train split: "
    assert words in capsys.readouterr().err


def test_a_run_keeps_the_network_that_its_recipe_had(folders, short, capsys):
    assert evaluate.main(["--workdir", str(short)]) == 0
    before = json.loads((short / "evaluation-test.json").read_text())["loss"]
    config = json.loads((short / "config.json").read_text())
    config["model"]["norm"] = 8  # as if another version had trained it
    (short / "config.json").write_text(json.dumps(config))
    assert train.main(arguments(folders, short, epochs=2)) == 1
    assert "norm: 8 -> instance" in capsys.readouterr().err
    assert evaluate.main(["--workdir", str(short)]) == 0
    assert json.loads((short / "evaluation-test.json").read_text())["loss"] != before


def test_a_run_is_read_although_its_recipe_has_changed(folders, short, tmp_path, monkeypatch):
    def results(name):
        """The loss, the mask and the exported model of the run."""
        out, picture = tmp_path / name, folders / "images" / "07.png"
        assert evaluate.main(["--workdir", str(short), "--out", str(out)]) == 0
        assert predict.main(["--workdir", str(short), "--out", str(out), str(picture)]) == 0
        assert export.main(["--workdir", str(short), "--out", str(out / "model")]) == 0
        return (
            json.loads((out / "evaluation-test.json").read_text())["loss"],
            (out / "07-mask.png").read_bytes(),
            (out / "model" / "model.json").read_text(),
            np.load(out / "model" / "weights.npz")["params/head/kernel"].tobytes(),
        )

    before, unet = results("before"), RECIPES["unet"]
    today = replace(unet, optimizer=AdamW(), loss="bce_soft_dice", augment={})
    other_network = replace(today, model=UNet(features=(4, 4), norm=None, residual=True))
    monkeypatch.setitem(RECIPES, "unet", other_network)
    assert results("after") == before
    monkeypatch.setitem(RECIPES, "unet", today)  # --init needs the same network
    settings = {"init": short, "epochs": 1, "learning_rate": 1e-30}  # no parameter changes
    assert train.main(arguments(folders, tmp_path / "begun", **settings)) == 0
    assert parameters(tmp_path / "begun")[1] == parameters(short)[1]


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_run_writes_its_config_and_history_again(folders, short, capsys):
    config, history = ((short / name).read_text() for name in ("config.json", "metrics.jsonl"))
    (short / "config.json").write_text("")
    (short / "metrics.jsonl").write_text(history.replace('"loss": ', '"loss": 1'))
    assert evaluate.main(["--workdir", str(short)]) == 1
    assert "run the training again: it is written again" in capsys.readouterr().err
    assert train.main(arguments(folders, short, epochs=1)) == 0
    error = capsys.readouterr().err
    assert error.count("config.json is missing or empty: written again from the checkpoint") == 1
    assert "line 1 is not that of epoch 1; written again from the checkpoint" in error
    written, before = json.loads((short / "config.json").read_text()), json.loads(config)
    assert written | {"places": None} == before | {"places": None}  # this is a copy of the run
    assert (short / "metrics.jsonl").read_text() == history


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(folders, undisturbed, tmp_path):
    """It repeats the last epoch, with the same parameters at its end."""
    straight = undisturbed[0]
    workdir = Path(shutil.copytree(straight, tmp_path / "run"))
    last = max((p for p in (workdir / "checkpoints").iterdir()), key=lambda p: int(p.name))
    for file in (last / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    output, step = finish(start(folders, workdir)), int(last.name) * (EPOCHS - 1) // EPOCHS
    assert f"checkpoints/{last.name} is renamed damaged-{last.name}: " in output
    assert f"resuming after step {step}" in output
    assert parameters(workdir) == parameters(straight)
    assert lines(workdir) == lines(straight)


@pytest.mark.filterwarnings("default::UserWarning")
def test_failing_tensorboard_events_are_a_warning(folders, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboardX")

    def fail(self, data):
        raise OSError(28, "No space left on device")

    write = train.event_writer

    @contextlib.contextmanager
    def fails_later(*args):
        with write(*args) as events:
            monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", fail)
            yield events

    monkeypatch.setattr(train, "event_writer", fails_later)
    assert train.main(arguments(folders, tmp_path / "run", epochs=2)) == 0
    words = "no more TensorBoard events are written: [Errno 28] No space left on device"
    assert capsys.readouterr().err.count(words) == 1
    assert parameters(tmp_path / "run")[0] == 12


def test_a_workdir_that_is_moved_away_ends_the_run(folders, tmp_path, capsys, before_each_step):
    workdir = tmp_path / "run"
    before_each_step(lambda step: step == 8 and workdir.rename(tmp_path / "moved"))
    assert train.main(arguments(folders, workdir)) == 1
    assert f"{workdir} was moved or removed during the training" in capsys.readouterr().err


def test_tensorboard_is_optional(monkeypatch, tmp_path):
    for name in ("tensorboardX", "tensorboardX.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    with train.event_writer(tmp_path, 0) as events:
        assert events is None


def test_the_article_trains_in_bfloat16(folders, tmp_path):
    other = {"recipe": "article", "dtype": "bfloat16"}
    assert train.main(arguments(folders, tmp_path, epochs=2, **other)) == 0
    history = lines(tmp_path)
    assert history[1]["loss"] < history[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(folders, tmp_path, capsys):
    assert train.main(arguments(folders, tmp_path, learning_rate=1e38)) == 1
    assert "the update norm of step 1 is inf" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())
    # Nothing of that run was saved, so another may use the workdir.
    assert train.main(arguments(folders, tmp_path, epochs=1)) == 0


def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(
    folders, short, capsys, monkeypatch
):
    good, make = parameters(short), fit.make_train_step

    def make_broken(*args, **options):
        step = make(*args, **options)

        def broken(state, batch, key):
            state, result = step(state, batch, key)
            return state, result | {"loss": float("nan")}

        return broken

    monkeypatch.setattr(fit, "make_train_step", make_broken)
    assert train.main(arguments(folders, short, epochs=2)) == 1
    error = capsys.readouterr().err
    assert f"the loss of step {good[0] + 1} is nan" in error and "another --workdir" in error
    assert parameters(short) == good and len(lines(short)) == 1


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_each_split_is_hashed_once(folders, short, monkeypatch, flags):
    if flags:
        pytest.importorskip("grain")
    fingerprint, counts = data.fingerprint, Counter()

    def counted(source, pictures=None):
        counts[tuple(source[i]["name"] for i in range(len(source)))] += 1
        return fingerprint(source, pictures)

    monkeypatch.setattr(data, "fingerprint", counted)
    assert train.main([*arguments(folders, short, epochs=1), *flags]) == 0
    assert len(counts) == 3 and set(counts.values()) == {1}


def test_a_stream_trains_like_pictures_in_memory(folders, short, tmp_path):
    pytest.importorskip("grain")
    streamed = tmp_path / "streamed"
    assert train.main([*arguments(folders, streamed, epochs=1), "--stream"]) == 0
    assert parameters(streamed) == parameters(short) and lines(streamed) == lines(short)


def test_the_strong_recipe_learns_and_keeps_its_number_of_epochs(
    folders, tmp_path, capsys, monkeypatch
):
    build, lengths = AdamW.build, []

    def noted(self, learning_rate, steps):
        lengths.append(steps)
        return build(self, learning_rate, steps)

    monkeypatch.setattr(AdamW, "build", noted)
    settings = {"recipe": "strong", "learning_rate": 1e-2}
    workdir, out = tmp_path / "run", tmp_path / "out"
    assert train.main(arguments(folders, workdir, epochs=20, **settings)) == 0
    assert {*lengths} == {lines(workdir)[-1]["step"]}
    assert lines(workdir)[-1]["val_dice_per_image"] > 0.5
    capsys.readouterr()
    assert train.main(arguments(folders, workdir, epochs=21, **settings)) == 1
    assert "epochs: 20 -> 21" in capsys.readouterr().err
    for flags in ([], ["--flips"]):
        words = ["--workdir", str(workdir), "--out", str(out / str(len(flags))), *flags]
        assert predict.main([*words, str(folders / "images" / "07.png")]) == 0
    masks = [np.asarray(Image.open(out / name / "07-mask.png")) > 0 for name in "01"]
    assert 0 < masks[0].mean() < 0.5 and (masks[0] != masks[1]).any()


def test_the_strong_recipe_resumes_in_the_middle_of_an_epoch(folders, tmp_path, before_each_step):
    stops = []
    before_each_step(lambda step: step in stops and signal.raise_signal(signal.SIGTERM))

    def state(workdir):
        settings = runs.load_model(workdir, "latest").settings
        training = runs.build(settings, runs.recipe_of(settings), 54)
        with checkpoint.open_checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            restored, _ = checkpoint.restore(checkpoints, runs.abstract_state(training))
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)]

    straight, stopped = (
        arguments(folders, tmp_path / name, recipe="strong", epochs=3)
        for name in ("straight", "stopped")
    )
    assert train.main(straight) == 0
    stops.append(10)  # in the second epoch: there are 7 steps per epoch
    assert train.main(stopped) == 128 + signal.SIGTERM
    stops.clear()
    assert train.main(stopped) == 0
    assert state(tmp_path / "straight") == state(tmp_path / "stopped")
    assert lines(tmp_path / "straight") == lines(tmp_path / "stopped")


def test_a_run_starts_from_the_parameters_of_another(undisturbed, folders, tmp_path, capsys):
    first, begun = tmp_path / "first", tmp_path / "begun"
    shutil.copytree(undisturbed[0], first)
    expected = runs.load_model(first, "best").variables
    settings = {"init": first, "learning_rate": 1e-30}  # no parameter changes
    assert train.main(arguments(folders, begun, epochs=1, **settings)) == 0
    variables = runs.load_model(begun, "latest").variables
    for a, b in zip(*map(jax.tree.leaves, (variables, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    shutil.rmtree(first)  # resuming does not need it
    assert train.main(arguments(folders, begun, epochs=2, **settings)) == 0
    assert len(lines(begun)) == 2


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 33}, "image_size 33 is not a multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"save_every": 0}, "--save-every is 0: it must be positive"),
        ({"images": "/nowhere"}, "/nowhere is not a folder"),
        ({"recipe": "weak"}, "no recipe 'weak': choose one of unet, article, strong, pretrained"),
        ({"encoder": "lite0"}, "encoder is lite0, but this recipe has none"),
        ({"dataset": "kvasir_seg"}, "--images needs --dataset folder"),
    ],
)
def test_impossible_settings_are_named_and_leave_nothing(folders, tmp_path, capsys, changes, words):
    assert train.main(arguments(folders, tmp_path / "run", **changes)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "places", "words"),
    [
        ({}, {"images": "here"}, "--images needs --dataset folder"),
        ({}, {"masks": "here"}, "--masks needs --dataset folder"),
        ({"dataset": "synthetic_polyps"}, {"kvasir_zip": "a.zip"}, "--kvasir-zip needs --dataset"),
        ({"dataset": "folder"}, {"images": "here"}, "needs --images DIR and --masks DIR"),
        ({"dataset": "cats"}, {}, "'cats': choose one of kvasir_seg, synthetic_cells"),
        ({"protocol": "mine"}, {}, "kvasir_seg has no protocol 'mine': choose one of article, "),
    ],
)
def test_flags_that_do_not_fit_the_data_set_are_refused(tmp_path, settings, places, words):
    with pytest.raises(ValueError, match=words):
        sources.open_sources(runs.Settings(**settings), runs.Places(tmp_path, **places))


@pytest.mark.parametrize(
    ("settings", "places", "words"),
    [
        ({"protocol": "medico"}, {}, "--protocol needs --dataset kvasir_seg"),
        ({"dataset": "tfds:kvasir_seg", "protocol": "medico"}, {}, "--protocol needs --dataset"),
        ({"dataset": "kvasir_seg"}, {"split_by": "name"}, "--split-by needs --dataset folder"),
        ({}, {"split_by": "name", "split_file": "a.json"}, "without --split-file"),
        ({}, {"data_dir": "here"}, "--data-dir is for data sets of TFDS"),
    ],
)
def test_flags_without_an_effect_are_refused(tmp_path, settings, places, words):
    settings = runs.Settings(**{"dataset": "folder"} | settings)
    with pytest.raises(ValueError, match=words):
        sources.check_used(settings, runs.Places(tmp_path, **places))
    sources.check_used(runs.Settings(protocol="medico"), runs.Places(tmp_path, data_dir=tmp_path))
    sources.check_used(runs.Settings(dataset="folder"), runs.Places(tmp_path, split_by="name"))


def test_a_run_that_began_with_a_flag_without_an_effect_goes_on(folders, short, capsys):
    """Older versions took them."""
    flags = arguments(folders, short, epochs=2)
    assert train.main([*flags[:1], str(short.parent / "new"), *flags[2:], "--protocol", "medico"])
    assert "--protocol needs --dataset kvasir_seg" in capsys.readouterr().err
    config = json.loads((short / "config.json").read_text())
    config["settings"]["protocol"] = "medico"
    (short / "config.json").write_text(json.dumps(config))
    assert train.main([*flags, "--protocol", "medico"]) == 0


def test_an_empty_split_is_named(folders, tmp_path, capsys):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "07.png").write_bytes((folders / part / "07.png").read_bytes())
    assert train.main(arguments(tmp_path, tmp_path / "run")) == 1
    assert "1 pictures or groups of them cannot be split in three" in capsys.readouterr().err


def test_a_stream_without_grain_says_what_to_install(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert train.main([*arguments(folders, tmp_path / "run"), "--stream"]) == 1
    assert "pip install 'flax-unet[stream]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


#: {file of another program or of another run: its content, what the message says}
FOREIGN = {
    "config.json": ('{"mine": 1}\n', "config.json is damaged or not of a run"),
    "metrics.jsonl": ('{"mine": 1}\n', "metrics.jsonl has no checkpoint to resume from"),
}


@pytest.mark.parametrize("file", FOREIGN)
def test_the_workdir_of_another_program_is_left_as_it_is(folders, tmp_path, capsys, file):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "notes.txt").write_text("mine")
    content, words = FOREIGN[file]
    (workdir / file).write_text(content)
    before = snapshot(tmp_path)
    assert train.main(arguments(folders, workdir)) == 1
    assert words in (error := capsys.readouterr().err) and "choose another --workdir" in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("empty", "there is no run in this workdir"),
        ("run", "params/bottleneck/Conv_0/bias has shape (16,) instead of (12,)"),
        ("run", "needs --recipe unet --features 8 16:"),
    ],
)
def test_the_workdir_is_left_as_it_is_if_init_cannot_be_used(
    short, folders, tmp_path, capsys, init, words, exists
):
    (tmp_path / "empty").mkdir()
    workdir = tmp_path / "new"
    if exists:
        workdir.mkdir()
        (workdir / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert train.main(arguments(folders, workdir, features="8 12", init=tmp_path / init)) == 1
    assert words in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_run_with_other_settings_is_refused_and_left_as_it_is(folders, short, capsys):
    shutil.rmtree(short / "samples")  # as if another version had trained it
    before = snapshot(short)
    assert train.main(arguments(folders, short, learning_rate=0.5, seed=3)) == 1
    error = capsys.readouterr().err
    assert "learning_rate: 0.001 -> 0.5" in error and "seed: 0 -> 3" in error
    assert "recipe" not in error
    assert snapshot(short) == before


def test_a_history_without_its_checkpoints_is_left_as_it_is(folders, short, capsys):
    (short / "metrics.jsonl").write_text((short / "metrics.jsonl").read_text() * 3)
    shutil.rmtree(short / "checkpoints")
    before = snapshot(short)
    assert train.main(arguments(folders, short)) == 1
    assert "metrics.jsonl has no checkpoint to resume from" in capsys.readouterr().err
    assert snapshot(short) == before


def test_a_workdir_in_use_is_refused(folders, short, capsys):
    before = snapshot(short)
    with runs.locked(short):
        assert train.main(arguments(folders, short, epochs=2)) == 1
    assert "another process is training in" in capsys.readouterr().err
    assert snapshot(short) == before


@pytest.mark.parametrize("content", ["{", '{"hello": 1}', "[]"])
def test_a_damaged_config_is_named(short, folders, capsys, content):
    (short / "config.json").write_text(content)
    assert train.main(arguments(folders, short)) == 1
    assert evaluate.main(["--workdir", str(short)]) == 1
    assert capsys.readouterr().err.count("config.json is damaged or not of a run") == 2


# Evaluation, prediction, export


@pytest.mark.slow
def test_the_demonstration_reaches_its_score(tmp_path):
    make = ["make", "--dry-run", "--old-file=.venv/installed", f"BIN={Path(sys.executable).parent}"]
    commands = subprocess.check_output([*make, "demo"], cwd=ROOT, text=True)
    commands = commands.replace("runs/demo", str(tmp_path))
    subprocess.run(["bash", "-e", "-c", commands], cwd=ROOT, check=True)
    assert json.loads((tmp_path / "evaluation-test.json").read_text())["dice_per_image"] >= 0.85


def test_evaluation_needs_only_the_workdir(undisturbed, capsys):
    workdir, *_ = undisturbed
    assert evaluate.main(["--workdir", str(workdir)]) == 0
    report = json.loads((workdir / "evaluation-test.json").read_text())
    low, high = report["dice_per_image_interval"]
    assert 0.5 < low < report["dice_per_image"] < high <= 1
    output, error = capsys.readouterr()
    assert f"{report['dice_per_image']:.4f}" in output and "not the pictures" not in error
    assert report["split"] == "test" and report["checkpoint"] == "best"
    dice = {line["step"]: line["val_dice_per_image"] for line in lines(workdir)}
    assert dice[report["step"]] == max(dice.values()) > dice[min(dice)]
    assert set(report) >= {
        *("iou_per_image", "dice_pooled", "iou_pooled", "precision_pooled", "recall_pooled"),
        *("accuracy", "n_images", "iou_per_image_interval", "protocol", "step"),
    }
    # These pictures have the network's size.
    own_size = report["own_size"]
    assert own_size["per_image"]["dice"]["mean"] == pytest.approx(report["dice_per_image"])
    assert own_size["pooled"]["recall"] == pytest.approx(report["recall_pooled"])
    assert 0 < own_size["calibration_error"] < 0.5
    assert Image.open(workdir / "evaluation-test.png").size == (800, 22 + 3 * 286 + 20)
    assert Image.open(workdir / "evaluation-test-reliability.png").format == "PNG"
    assert evaluate.main(["--workdir", str(workdir), "--flips"]) == 0
    flips = json.loads((workdir / "evaluation-test-flips.json").read_text())
    assert flips["flips"] and flips["dice_per_image"] != report["dice_per_image"]


def test_flips_of_a_model_of_upright_pictures_are_left_to_right(undisturbed, tmp_path):
    """Upside down the network has never seen one: all four flips cost CamVid 0.2 of Dice."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["settings"]["upright"] = True
    (workdir / "config.json").write_text(json.dumps(config))
    flags = ["--workdir", str(workdir), "--split", "validation", "--flips"]
    assert evaluate.main(flags) == 0
    report = json.loads((workdir / "evaluation-validation-latest-flips.json").read_text())
    trained = runs.load_model(workdir, "latest")
    settings, places = trained.settings, trained.places
    source = sources.open_sources(settings, places)["validation"]
    arrays = data.load(source, settings.size, trained.mask_format, trained.image_format)
    for upright in (True, False):
        model = Mirrored(trained.model, upright)
        scores, _ = evaluate_arrays(model, trained.variables, arrays)
        assert (report["loss"] == pytest.approx(scores["loss"], rel=1e-5)) == upright


def test_evaluation_of_the_validation_split_repeats_the_metrics_of_training(undisturbed, capsys):
    workdir, *_ = undisturbed
    assert evaluate.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    report = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert report["n_images"] > 0
    dice = lines(workdir)[-1]["val_dice_per_image"]
    assert report["dice_per_image"] == pytest.approx(dice, abs=1e-6)
    best = ["--workdir", str(workdir), "--split", "validation", "--checkpoint", "best"]
    assert evaluate.main(best) == 0
    assert "the best checkpoint was chosen on these very images" in capsys.readouterr().out


def test_evaluation_of_other_folders_takes_all_their_pictures(folders, undisturbed):
    workdir, *_ = undisturbed
    others = ["--images", str(folders / "images"), "--masks", str(folders / "masks")]
    assert evaluate.main(["--workdir", str(workdir), *others]) == 0
    (report,) = workdir.glob("evaluation-folder-*-images.json")
    assert json.loads(report.read_text())["n_images"] == 60


def test_evaluation_warns_if_the_pictures_have_changed(folders, short, tmp_path, capsys):
    other = Path(shutil.copytree(folders / "images", tmp_path / "images"))
    names = [example["name"] for example in data.FolderSource(other, folders / "masks", "test")]
    shutil.copy(other / "07.png", other / f"{names[0]}.png")
    config = json.loads((short / "config.json").read_text())
    config["places"]["images"] = str(other)
    (short / "config.json").write_text(json.dumps(config))
    assert evaluate.main(["--workdir", str(short)]) == 0
    assert "warning: these are not the pictures" in capsys.readouterr().err


def test_evaluation_without_a_run_is_an_error(tmp_path, capsys):
    assert evaluate.main(["--workdir", str(tmp_path)]) == 1
    assert "there is no run in this workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--images {}/images", "both --images and --masks"),
        ("--mask-suffix _m", "--mask-suffix need --images and --masks"),
        ("--mask-files class", "--mask-suffix need --images and --masks"),
        ("--images {0}/images --masks {0}/masks --split train", "leave out --split train"),
    ],
)
def test_flags_of_evaluation_that_do_not_belong_together_are_refused(
    short, folders, capsys, flags, words
):
    flags = flags.format(folders).split()
    assert evaluate.main(["--workdir", str(short), *flags]) == 1
    assert words in capsys.readouterr().err


def test_a_report_of_another_model_is_not_replaced(short, tmp_path, capsys):
    shutil.copytree(short, tmp_path / "other")
    out = ["--out", str(tmp_path / "out")]
    for workdir, code in ((short, 0), (tmp_path / "other", 1), (short, 0)):
        assert evaluate.main(["--workdir", str(workdir), *out]) == code
        assert ("is of another model" in capsys.readouterr().err) == code


def test_evaluation_warns_if_no_mask_has_an_object(folders, short, tmp_path, capsys):
    flags = ["--workdir", str(short), "--out", str(tmp_path), "--images", str(folders / "images")]
    assert evaluate.main([*flags, "--masks", str(folders / "masks"), "--foreground", "9"]) == 0
    words = "warning: none of the 60 masks has an object, of foreground 9; background elsewhere"
    assert words in capsys.readouterr().err
    assert evaluate.main(["--workdir", str(short)]) == 0
    assert "none of the" not in capsys.readouterr().err


def test_prediction_takes_pictures_of_any_mode_and_size(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    rng = np.random.default_rng(0)
    inputs = tmp_path / "in"
    inputs.mkdir()
    colour = Image.fromarray(rng.integers(0, 256, (45, 70, 3), np.uint8))
    for mode in ("L", "RGBA", "P", "CMYK"):
        colour.convert(mode).save(inputs / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.fromarray(rng.integers(0, 65536, (45, 70), np.uint16)).save(inputs / "sixteen.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    colour.save(inputs / "rotated.jpg", exif=rotated)
    (inputs / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    command = ["--workdir", str(workdir), "--out", str(out), str(inputs)]
    assert predict.main(command) == 1
    captured = capsys.readouterr()
    assert re.search("skipped: .*broken.png", captured.err) and "5 of 7 pictures" in captured.out
    # It was trained on 8 bits: what 16 bits mean is declared.
    assert re.search("skipped: .*sixteen.png.*--value-range LOW HIGH", captured.err)
    (inputs / "broken.png").unlink()
    wide = [*command[:-1], str(inputs / "sixteen.png"), "--value-range", "0", "65535"]
    assert predict.main([*wide, "--overwrite"]) == 0
    (inputs / "sixteen.png").unlink()
    assert predict.main([*command, "--overwrite"]) == 0
    for name in ("L", "RGBA", "P", "CMYK", "sixteen", "rotated"):
        size = (45, 70) if name == "rotated" else (70, 45)
        mask = Image.open(out / f"{name}-mask.png")
        assert mask.size == size and set(np.unique(mask)) <= {0, 255}
        assert Image.open(out / f"{name}-overlay.png").size == size


def test_prediction_finds_the_disc(folders, undisturbed, tmp_path):
    workdir, *_ = undisturbed
    file = folders / "images" / "07.png"
    assert predict.main(["--workdir", str(workdir), "--out", str(tmp_path), str(file)]) == 0
    mask = np.asarray(Image.open(tmp_path / "07-mask.png")) > 127
    true = np.asarray(Image.open(folders / "masks" / "07.png")) > 0
    assert (mask & true).sum() / (mask | true).sum() > 0.5


def test_prediction_overwrites_no_picture(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    for name in ("a.png", "a-mask.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    before = (tmp_path / "a-mask.png").read_bytes()
    command = ["--workdir", str(workdir), "--out", str(tmp_path), str(tmp_path)]
    assert predict.main(command) == 1
    assert re.search("a-mask.png, a result of .*a.png, would overwrite", capsys.readouterr().err)
    assert (tmp_path / "a-mask.png").read_bytes() == before


def test_prediction_overwrites_no_result_without_a_flag(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    picture, out = tmp_path / "in" / "a.png", tmp_path / "out"
    for folder in (picture.parent, out):
        folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(picture)
    command = ["--workdir", str(workdir), "--out", str(out), str(picture)]
    for content in (b"a mask drawn by hand", picture.read_bytes()):
        (out / "a-mask.png").write_bytes(content)
        assert predict.main(command) == 1
        words = f"these results exist already: {out}/a-mask.png: write over them with --overwrite"
        assert words in capsys.readouterr().err
        assert (out / "a-mask.png").read_bytes() == content
    (out / "a-mask.png").unlink()
    (out / "a-mask.png").symlink_to(picture)
    assert predict.main([*command, "--overwrite"]) == 1
    assert "would overwrite" in capsys.readouterr().err
    (out / "a-mask.png").unlink()
    assert predict.main(command) == 0
    assert predict.main(command) == 1
    assert predict.main([*command, "--overwrite"]) == 0
    expected = ["a-mask.png", "a-overlay.png", "predictions.csv"]
    assert sorted(file.name for file in out.iterdir()) == expected


def test_pictures_whose_results_cannot_be_written_or_do_not_fit_are_skipped(
    undisturbed, tmp_path, capsys
):
    workdir, *_ = undisturbed
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for name in ("0", "5" + "x" * 245, "9"):  # its overlay's name has 258 bytes
        Image.new("RGB", (8, 8), "red").save(inputs / f"{name}.png")
    Image.new("RGB", (9000, 5400)).save(inputs / "7.png")
    command = ["--workdir", str(workdir), "--out", str(out), str(inputs)]
    assert predict.main(command) == 1
    captured = capsys.readouterr()
    assert "2 of 4 pictures" in captured.out and "File name too long" in captured.err
    assert "7.png: 9000 x 5400 pixels take 1.5 GB: allow it with --max-memory 1.6" in captured.err
    assert {"0-mask.png", "0-overlay.png", "9-mask.png"} <= {file.name for file in out.iterdir()}


def test_two_pictures_with_one_name_are_refused(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    for suffix in ("png", "jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}")
    out = tmp_path / "out"
    assert predict.main(["--workdir", str(workdir), "--out", str(out), str(tmp_path)]) == 1
    assert "would overwrite" in capsys.readouterr().err and not out.exists()


def test_a_threshold_that_is_no_probability_is_refused(tmp_path, capsys):
    command = ["--workdir", str(tmp_path), "--out", str(tmp_path), "--threshold", "1.5"]
    assert predict.main([*command, str(tmp_path)]) == 1
    assert "threshold is 1.5: it must be in [0, 1)" in capsys.readouterr().err


def test_a_size_that_the_network_does_not_take_is_not_exported(
    folders, one_epoch, tmp_path, capsys
):
    flags = ["--workdir", str(one_epoch), "--out", str(tmp_path / "model"), "--image-size"]
    for size, words in (("2", "leaves one pixel in the bottleneck"), ("16384", "up to 8192")):
        assert export.main([*flags, size]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["LICENSE", "weights.npz", "weights.safetensors", "model.json"])
def test_an_export_replaces_no_file(one_epoch, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert export.main(["--workdir", str(one_epoch), "--out", str(tmp_path)]) == 1
    assert f"{tmp_path / name} exists: choose another folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_without_safetensors_nothing_is_exported(one_epoch, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    out = tmp_path / "model"
    assert export.main(["--workdir", str(one_epoch), "--out", str(out), "--safetensors"]) == 1
    assert "flax-unet[safetensors]" in capsys.readouterr().err and not out.exists()


def test_an_exported_model_takes_the_place_of_its_run(undisturbed, folders, tmp_path, capsys):
    workdir, *_ = undisturbed
    out = tmp_path / "models" / "disc"
    assert export.main(["--workdir", str(workdir), "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"model.json", "weights.npz"}
    assert "/" not in json.dumps(json.loads((out / "model.json").read_text())["about"])
    exported, trained = runs.load_model(out), runs.load_model(workdir)
    assert (exported.step, exported.fingerprints) == (trained.step, trained.fingerprints)
    for name, flag, folder in (("a", "--workdir", workdir), ("b", "--model", out)):
        command = [flag, str(folder), "--out", str(tmp_path / name)]
        assert predict.main([*command, str(folders / "images")]) == 0
        pictures = ["--images", str(folders / "images"), "--masks", str(folders / "masks")]
        assert evaluate.main([*command, *pictures]) == 0
    dice, masks = [], []
    for name in ("a", "b"):
        (report,) = (tmp_path / name).glob("evaluation-*.json")
        dice.append(json.loads(report.read_text())["dice_per_image"])
        masks.append(
            np.stack([Image.open(x) for x in sorted((tmp_path / name).glob("*-mask.png"))])
        )
    assert (masks[0] != masks[1]).mean() < 1e-3 and abs(dice[0] - dice[1]) < 1e-3
    assert {file.name for file in out.iterdir()} == {"model.json", "weights.npz"}
    begun = tmp_path / "begun"
    assert train.main(arguments(folders, begun, init=out, epochs=1, learning_rate=1e-30)) == 0
    variables = runs.load_model(begun, "latest").variables
    for a, b in zip(*map(jax.tree.leaves, (variables, exported.variables)), strict=True):
        np.testing.assert_array_equal(a, b)
    for taken in (out, workdir):
        before = sorted(file.name for file in taken.iterdir())
        assert export.main(["--workdir", str(workdir), "--out", str(taken)]) == 1
        assert "choose another folder" in capsys.readouterr().err
        assert sorted(file.name for file in taken.iterdir()) == before
    assert evaluate.main(["--model", str(out), "--out", str(tmp_path)]) == 1
    assert "does not record where its pictures are" in capsys.readouterr().err


def test_an_exported_model_records_which_checkpoint_it_is(undisturbed, tmp_path):
    for which in ("best", "latest"):
        command = ["--workdir", str(undisturbed[0]), "--out", str(tmp_path / which)]
        assert export.main([*command, "--checkpoint", which]) == 0
        assert runs.load_model(tmp_path / which).checkpoint == which


def test_an_exported_model_may_resize_pictures_to_another_size(undisturbed, tmp_path, capsys):
    def export_as(name, size, source=undisturbed[0]):
        command = ["--model", str(source), "--out", str(tmp_path / name), "--image-size"]
        return export.main([*command, *map(str, size)])

    trained = runs.load_model(undisturbed[0])
    assert export_as("a", [16, 64]) == 0
    changed = runs.load_model(tmp_path / "a")
    assert changed.settings == replace(trained.settings, image_size=(16, 64), init=None)
    assert changed.predictor()[1] == (16, 64) and changed.config["trained_at"] == 32
    assert export_as("b", [64], source=tmp_path / "a") == 0
    assert runs.load_model(tmp_path / "b").config["trained_at"] == 32
    for wrong in ([33], [0]):
        assert export_as("c", wrong) == 1 and not (tmp_path / "c").exists()
        assert f"image_size {wrong[0]} is not a multiple of 2" in capsys.readouterr().err


# Studies


SMALL = runs.Settings(recipe="strong", features=(4, 8), image_size=16, epochs=2)
STRONG = runs.configure(RECIPES["strong"], SMALL)
ARRAYS = {
    split: data.Arrays(
        np.zeros((4, 16, 16, 3), np.uint8), np.zeros((4, 16, 16, 1), np.uint8), [*"abcd"], split
    )
    for split in ("train", "validation")
}


@pytest.fixture
def trainings(monkeypatch):
    """The names of the study's training runs, which return their number instead of training."""
    names = []

    def numbered(settings, recipe, arrays, name):
        names.append(name)
        return {"dice": [float(len(names))], "dice_flips": [float(len(names))]}

    monkeypatch.setattr(study, "_train_and_score", numbered)
    return names


def score(workdir, settings=SMALL, recipe=STRONG, arrays=ARRAYS, name="strong"):
    [dice] = study.train_and_score(workdir, settings, recipe, arrays, name)["dice"]
    return int(dice)


#: Changes of what determines the scores of a study's training run.
OTHERS = {
    "loss": {"recipe": replace(STRONG, loss="bce")},
    "model": {"recipe": replace(STRONG, model=STRONG.model.clone(norm="instance"))},
    "depth": {"recipe": replace(STRONG, model=STRONG.model.clone(residual=False, deep=False))},
    "optimizer": {"recipe": replace(STRONG, optimizer=Adam())},
    "clip": {"recipe": replace(STRONG, optimizer=replace(STRONG.optimizer, clip=2.0))},
    "augmentations": {"recipe": replace(STRONG, augment={})},
    "augmentation": {
        "recipe": replace(STRONG, augment=STRONG.augment | {"random_blur": {"sigma": 2.0}})
    },
    "imagenet": {"recipe": replace(STRONG, imagenet=True)},
    "seed": {"settings": replace(SMALL, seed=1)},
    "epochs": {"settings": replace(SMALL, epochs=3)},
    "learning rate": {"settings": replace(SMALL, learning_rate=0.1)},
    "batch size": {"settings": replace(SMALL, batch_size=4)},
    "subset": {"arrays": ARRAYS | {"train": ARRAYS["train"]._replace(name=[*"abc"])}},
    "order": {"arrays": ARRAYS | {"train": ARRAYS["train"]._replace(name=[*"abdc"])}},
    "pictures": {"arrays": ARRAYS | {"train": ARRAYS["train"]._replace(fingerprint="other")}},
    "validation": {
        "arrays": ARRAYS | {"validation": ARRAYS["validation"]._replace(fingerprint="other")}
    },
    "name": {"name": "another row"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_study_trains_again_if_anything_that_determines_the_scores_changes(
    tmp_path, trainings, what
):
    assert score(tmp_path) == 1
    assert score(tmp_path, **OTHERS[what]) == 2
    assert len(list(tmp_path.iterdir())) == 2
    # Both are kept.
    assert score(tmp_path) == 1 and score(tmp_path, **OTHERS[what]) == 2
    assert len(trainings) == 2


@pytest.mark.parametrize("package", ["jax", "pillow"])
def test_a_study_trains_again_with_another_version_of_a_package(
    tmp_path, trainings, monkeypatch, package
):
    version = metadata.version
    assert score(tmp_path) == 1
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda p: "99" if p == package else version(p))
        assert score(tmp_path) == 2
    assert score(tmp_path) == 1


def test_a_study_trains_again_with_another_version_of_flax_unet(tmp_path, trainings, monkeypatch):
    assert score(tmp_path) == 1
    monkeypatch.setattr("flax_unet.__version__", "99")
    assert score(tmp_path) == 2


def test_a_study_reuses_finished_trainings(tmp_path, trainings):
    assert score(tmp_path) == 1
    described = replace(STRONG, about="in other words")
    copied = {split: each._replace(image=each.image.copy()) for split, each in ARRAYS.items()}
    assert score(tmp_path, recipe=described, arrays=copied) == 1
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert score(tmp_path / "moved") == 1
    assert trainings == ["strong"]


def test_the_rows_of_the_ablation_have_different_files(tmp_path, trainings):
    rows = [runs.configure(recipe, SMALL) for recipe in ablate.ROWS.values()]
    assert [score(tmp_path, recipe=recipe) for recipe in rows] == [*range(1, len(rows) + 1)]


def test_the_ablation_trains_each_row_once_and_prints_the_table(
    folders, tmp_path, capsys, monkeypatch
):
    rows = ("strong", "BCE alone")
    monkeypatch.setattr(ablate, "ROWS", {name: ablate.ROWS[name] for name in rows})
    assert ablate.main(arguments(folders, tmp_path / "a", epochs=1)) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:4]] == [f"| {name}" for name in rows]
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 2 and files[0].read_text() != files[1].read_text()
    times = [file.stat().st_mtime_ns for file in files]
    assert ablate.main(arguments(folders, tmp_path / "a", epochs=1)) == 0
    assert capsys.readouterr().out.splitlines()[-len(table) :] == table
    assert times == [file.stat().st_mtime_ns for file in files]


def test_each_row_of_the_ablation_changes_one_thing():
    changed = [
        [
            field.name
            for field in dataclasses.fields(Recipe)
            if getattr(row, field.name) != getattr(RECIPES["strong"], field.name)
        ]
        for row in ablate.ROWS.values()
    ]
    augment, model = ["augment"], ["model"]
    assert changed == [[], augment, augment, ["loss"], model, model, ["optimizer"]]


def test_the_data_efficiency_trains_on_fractions_of_the_images_for_as_many_steps(
    folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(data_efficiency, "RECIPES", ("strong",))
    monkeypatch.setattr(data_efficiency, "FRACTIONS", (0.25, 1.0))
    trainings, split = [], {}
    train_and_score, open_study = data_efficiency.train_and_score, data_efficiency.open_study

    def noted_open_study(*args, **kwargs):
        split.update(open_study(*args, **kwargs))
        return split

    def noted_train_and_score(workdir, settings, recipe, arrays, name):
        trainings.append((settings.epochs, arrays["train"]))
        return train_and_score(workdir, settings, recipe, arrays, name)

    monkeypatch.setattr(data_efficiency, "train_and_score", noted_train_and_score)
    monkeypatch.setattr(data_efficiency, "open_study", noted_open_study)
    assert data_efficiency.main(arguments(folders, tmp_path / "a", epochs=2)) == 0
    (quarter_epochs, quarter), (all_epochs, everything) = trainings
    some, names = quarter.name, everything.name
    batches = [-(-len(some) // 8), -(-len(names) // 8)]
    assert 0 <= batches[0] * quarter_epochs - batches[1] * 2 < batches[0] and all_epochs == 2
    assert len(some) == round(len(names) / 4) and some == names[: len(some)]
    assert {*names} == {*split["train"].name} and len(names) == len({*names})
    place = np.array([split["train"].name.index(name) for name in names])
    for part in ("image", "mask"):
        original = getattr(split["train"], part)[place]
        assert (getattr(everything, part) == original).all()
        assert (getattr(quarter, part) == original[: len(some)]).all()
    table = capsys.readouterr().out
    assert all(f"\n| {n} | 0." in table for n in (len(some), len(names)))
    assert (tmp_path / "a" / "data-efficiency.png").is_file()


@pytest.mark.parametrize("study", [ablate, data_efficiency])
@pytest.mark.parametrize(
    "changes, words",
    [({"learning_rate": 1e30}, "strong.*: the .* of step .* is (inf|nan)")],
)
def test_an_impossible_study_is_refused_and_leaves_nothing(
    folders, tmp_path, capsys, monkeypatch, study, changes, words
):
    monkeypatch.setattr(data_efficiency, "RECIPES", ("strong",))
    assert study.main(arguments(folders, tmp_path / "a", epochs=1, **changes)) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "a").exists()


def test_missing_weights_are_named_before_anything_is_trained(
    folders, tmp_path, capsys, monkeypatch
):
    def missing(variant):
        raise ModuleNotFoundError(f"no weights of {variant}")

    monkeypatch.setattr(study, "imagenet", missing)
    command = arguments(folders, tmp_path / "a")
    command = [*command[: command.index("--features")], "--encoder", "lite2"]
    assert data_efficiency.main(command) == 1
    assert "no weights of lite2" in capsys.readouterr().err and not (tmp_path / "a").exists()


# The command line


def console(*words, code=0):
    """The output of a Python command, in two parts."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def console_script():
    """The Python code of the command `flax-unet`, as pip writes it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["flax-unet"].split(":")
    return f"import sys; from {module} import {function}; sys.exit({function}())"


def test_a_program_has_three_names():
    helps = [
        console(str(PROGRAMS / "train.py"), "--help")[0],
        console("-m", "flax_unet_cli", "train", "--help")[0],
        console("-c", console_script(), "train", "--help")[0],
    ]
    names = [re.match(r"usage: (.*) \[-h\]", text)[1] for text in helps]
    assert names == [str(PROGRAMS / "train.py"), "flax-unet train", "flax-unet train"]
    texts = [text.split("[-h]", 1)[1] for text in helps]
    assert texts[0] == texts[1] == texts[2]
    assert all(flag in texts[0] for flag in ("--workdir", "--recipe", "--stream"))
    text = " ".join(texts[0].split())
    assert all(f" {name}: {recipe.about}" in text for name, recipe in RECIPES.items())


def test_the_scripts_are_the_programs():
    scripts = {file.stem: file for file in PROGRAMS.glob("*.py")}
    assert scripts.keys() == {*__main__.PROGRAMS}
    for name, file in scripts.items():
        assert runpy.run_path(str(file))["main"] is sys.modules[f"flax_unet_cli.{name}"].main


def test_flax_unet_lists_its_programs():
    listed = ", ".join(__main__.PROGRAMS).replace("_", "-")
    assert listed in console("-c", console_script(), code=2)[0]
    assert listed in console("-c", console_script(), "--help")[0]
    output, error = console("-c", console_script(), "segment", code=2)
    assert listed in output and "no program 'segment'" in error


def test_a_wrong_flag_names_the_program():
    _, error = console("-m", "flax_unet_cli", "data-efficiency", "--bogus", code=2)
    assert "--bogus" in error and "flax-unet data-efficiency --help" in error


def test_the_compilation_cache_is_turned_on_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        before = jax.config.jax_compilation_cache_dir
        try:
            program.keep_compiled()
            once = warnings.showwarning
            program.keep_compiled()
            assert warnings.showwarning is once
            folder = Path(jax.config.jax_compilation_cache_dir)
            assert folder.parent == tmp_path / "flax_unet" and folder.name.startswith("xla-")
        finally:
            jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_code_is_found_again_and_a_damaged_entry_is_replaced(tmp_path):
    code = (
        "import jax\n"
        "from flax_unet_cli import program\n"
        "program.keep_compiled()\n"
        "program.keep_compiled()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x * 2 + 1).lower(1.0).compile()\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path)}

    def compiled():
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        (entry,) = tmp_path.glob("flax_unet/xla-*/jit__lambda-*-cache")
        return entry, done.stderr

    entry, no_warning = compiled()
    content, written = entry.read_bytes(), entry.stat().st_mtime_ns
    assert compiled() == (entry, no_warning) and entry.stat().st_mtime_ns == written
    entry.write_bytes(content[: len(content) // 2])
    assert compiled()[1].count("Error reading persistent compilation cache entry") == 1
    assert len(entry.read_bytes()) > len(content) // 2
    assert "Error" not in compiled()[1]


# More than one class


@pytest.fixture(scope="module")
def discs_and_squares(tmp_path_factory):
    """Forty pictures of a disc and a square on noise; masks in colours, one colour not counted."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for part in ("images", "masks"):
        (root / part).mkdir()
    for i in range(40):
        cy, cx, sy, sx = rng.uniform(6, 26, 4)
        disc, square = (y - cy) ** 2 + (x - cx) ** 2 < 36, (abs(y - sy) < 5) & (abs(x - sx) < 5)
        index = np.select([square, disc], [2, 1])
        image = rng.normal(60, 20, (32, 32, 3)) + np.eye(3)[index] * 120
        mask = np.array([(0, 0, 0), (0, 0, 255), (255, 255, 0)], np.uint8)[index]
        mask[:2] = (9, 9, 9)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{i:02d}.png")
        Image.fromarray(mask).save(root / f"masks/{i:02d}.png")
    table = {"background": "#000000", "disc": "#0000ff", "square": "#ffff00", "ignore": "#090909"}
    (root / "classes.json").write_text(json.dumps(table))
    return root


def test_exclusive_classes_from_colours_to_report_masks_and_exported_model(
    discs_and_squares, tmp_path, capsys
):
    root, workdir, out = discs_and_squares, tmp_path / "run", tmp_path / "out"
    flags = arguments(root, workdir, epochs=8, learning_rate=5e-3, class_weights="frequency")
    assert train.main([*flags, "--classes", str(root / "classes.json")]) == 0
    output = capsys.readouterr().out
    assert "background (0, 0, 0); disc (0, 0, 255); square (255, 255, 0); not counted" in output
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["num_classes"] == 3 and config["training"]["loss"] == "cross_entropy"
    assert config["training"]["augment"]["random_affine"]["outside"] == 255
    assert config["masks"]["names"] == ["background", "disc", "square"]
    weights = config["training"]["class_weight"]
    assert weights[0] < 0.3 and min(weights[1:]) > 0.8  # most pixels are background
    trained = runs.load_model(workdir, "latest")
    assert trained.mask_format.names == ("background", "disc", "square")
    assert trained.loss_fn.keywords == {"class_weight": tuple(weights)}

    assert evaluate.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    report = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert report["dice_pooled"] == pytest.approx(lines(workdir)[-1]["val_dice_pooled"], abs=1e-6)
    assert (workdir / "evaluation-validation-latest-confusion.png").is_file()
    assert "mean without background" in capsys.readouterr().out

    # The predictions on disk, read back, have the scores of the report.
    split = data.FolderSource(root / "images", root / "masks", "validation")
    names = [entry["name"] for entry in split]
    pictures = [str(root / "images" / f"{name}.png") for name in names]
    command = ["--workdir", str(workdir), "--checkpoint", "latest", "--out", str(out)]
    assert predict.main([*command, *pictures]) == 0
    true, predicted = [], []
    for name in names:
        colours = np.asarray(Image.open(root / f"masks/{name}.png")).astype(int).sum(-1)
        counts = colours != 27
        index = np.select([colours == 255, colours == 510], [1, 2])
        with Image.open(out / f"{name}-mask.png") as picture:
            assert picture.mode == "P" and len(picture.convert("RGB").getcolors()) > 1
            predicted.append(np.asarray(picture)[counts])
        true.append(index[counts])
        with Image.open(out / f"{name}-overlay.png") as overlay:
            assert overlay.width == 32 and overlay.height > 32  # with a legend
    true, predicted = np.concatenate(true), np.concatenate(predicted)
    matrix = sklearn.metrics.confusion_matrix(true, predicted)
    np.testing.assert_array_equal(report["own_size"]["confusion_matrix"], matrix)
    jaccard = sklearn.metrics.jaccard_score(true, predicted, average=None)
    by_class = report["own_size"]["by_class"]
    assert [by_class[name]["pooled"]["iou"] for name in by_class] == pytest.approx(jaccard)
    assert report["own_size"]["mean_of_classes"]["iou"] == pytest.approx(jaccard.mean())
    assert jaccard.mean() > 0.6

    # An exported model has the same classes, and starts a network with other ones.
    assert export.main(["--workdir", str(workdir), "--out", str(tmp_path / "model")]) == 0
    assert runs.load_model(tmp_path / "model").mask_format == trained.mask_format
    again = arguments(root, tmp_path / "other", epochs=1, init=tmp_path / "model")
    assert train.main([*again, "--foreground", "0"]) == 1  # the masks have colours
    (tmp_path / "two.json").write_text(
        json.dumps({"rest": ["#000000", "#090909"], "object": ["#0000ff", "#ffff00"]})
    )
    assert train.main([*again, "--classes", str(tmp_path / "two.json")]) == 0


def test_overlapping_classes_from_separate_files_to_report_and_masks(tmp_path, capsys):
    root, workdir, out = tmp_path / "set", tmp_path / "run", tmp_path / "out"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for part in ("images", "masks/disc", "masks/square"):
        (root / part).mkdir(parents=True)
    for i in range(40):
        cy, cx, sy, sx = rng.uniform(8, 24, 4)
        disc, square = (y - cy) ** 2 + (x - cx) ** 2 < 49, (abs(y - sy) < 6) & (abs(x - sx) < 6)
        image = rng.normal(60, 10, (32, 32, 3))
        image[..., 0] += 120 * disc
        image[..., 2] += 120 * square * (i % 8 > 0)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{i:02d}.png")
        Image.fromarray(disc).save(root / f"masks/disc/{i:02d}.png")
        if i % 8:  # other pictures have no square, and no file for it
            Image.fromarray(square).save(root / f"masks/square/{i:02d}.png")
    flags = arguments(root, workdir, epochs=20, learning_rate=1e-2, mask_files="class")
    flags += ["--recipe", "strong"]
    flags += ["--classes", "disc", "square"]
    assert train.main(flags) == 1
    assert "its classes overlap in" in capsys.readouterr().err
    assert train.main([*flags, "--overlapping"]) == 0
    assert "separate files of disc, square that may overlap" in capsys.readouterr().out
    model = runs.load_model(workdir, "latest").model
    assert (model.num_classes, model.overlapping) == (2, True)
    assert evaluate.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    report = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert report["dice_pooled"] == pytest.approx(lines(workdir)[-1]["val_dice_pooled"], abs=1e-6)
    assert list(report["own_size"]["by_class"]) == ["disc", "square"]

    # The predictions on disk, read back, have the scores of the report.
    options = {"mask_files": "class", "classes": ("disc", "square")}
    split = data.FolderSource(root / "images", root / "masks", "validation", **options)
    names = [entry["name"] for entry in split]
    pictures = [str(root / "images" / f"{name}.png") for name in names]
    command = ["--workdir", str(workdir), "--checkpoint", "latest", "--out", str(out)]
    assert predict.main([*command, *pictures]) == 0
    for kind, scores in report["own_size"]["by_class"].items():
        true, predicted = [], []
        for name in names:
            file = root / f"masks/{kind}/{name}.png"
            mask = np.asarray(Image.open(file)) if file.exists() else np.zeros((32, 32), bool)
            true.append(mask)
            predicted.append(np.asarray(Image.open(out / f"{name}-mask-{kind}.png")) == 255)
        true, predicted = np.concatenate(true).ravel(), np.concatenate(predicted).ravel()
        jaccard = sklearn.metrics.jaccard_score(true, predicted)
        assert scores["pooled"]["iou"] == pytest.approx(jaccard) and jaccard > 0.5
    with Image.open(out / f"{names[0]}-overlay.png") as overlay:
        assert overlay.width == 32 and overlay.height > 32  # with a legend

    # Other pictures of the same layout.
    flags = ["--workdir", workdir, "--images", root / "images", "--masks", root / "masks"]
    assert evaluate.main([*map(str, flags), "--out", str(out)]) == 0
    more = ["--foreground", "255"]  # what the values mean may be declared again
    assert evaluate.main([*map(str, flags), "--out", str(out / "again"), *more]) == 0
    report = json.loads((out / f"evaluation-folder-{root.name}-images.json").read_text())
    assert report["masks"]["separate"] and report["images"]["channels"] == 3
    one = ["--mask-files", "one", "--masks", str(root / "masks/disc")]
    assert evaluate.main([*map(str, flags[:4]), "--out", str(out), *one]) == 1
    words = "the masks have one class against the background, and the model 2 overlapping classes"
    assert words in capsys.readouterr().err


def test_a_model_of_one_mask_per_picture_is_scored_on_a_file_per_class(folders, short, tmp_path):
    shutil.copytree(folders / "masks", tmp_path / "masks" / "disc")
    reports = []
    for masks, more in ((folders, []), (tmp_path, ["--mask-files", "class", "--classes", "disc"])):
        flags = ["--workdir", str(short), "--images", str(folders / "images"), "--masks"]
        out = tmp_path / f"out-{len(more)}"
        assert evaluate.main([*flags, str(masks / "masks"), "--out", str(out), *more]) == 0
        [file] = out.glob("*.json")
        reports.append(json.loads(file.read_text()))
    assert reports[1]["masks"]["names"][1] == "disc"
    assert reports[0]["own_size"]["images"] == reports[1]["own_size"]["images"]


def test_a_class_without_a_mask_file_is_refused(folders, tmp_path, capsys):
    for part in ("images", "masks"):
        shutil.copytree(
            folders / part, tmp_path / part if part == "images" else tmp_path / "masks/disc"
        )
    flags = arguments(tmp_path, tmp_path / "run", mask_files="class")
    assert train.main([*flags, "--classes", "disc", "sqare", "--dry-run"]) == 1
    assert "is of class 'sqare'" in capsys.readouterr().err
    assert train.main([*flags, "--classes", "disc", "--dry-run"]) == 0
    assert train.main([*flags, "--classes", "disc", "--overlapping", "--dry-run"]) == 1
    assert "at least two --classes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def three_classes(discs_and_squares, tmp_path_factory):
    """A run of one epoch."""
    workdir = tmp_path_factory.mktemp("three") / "run"
    flags = arguments(discs_and_squares, workdir, epochs=1)
    assert train.main([*flags, "--classes", str(discs_and_squares / "classes.json")]) == 0
    return workdir


@pytest.fixture
def tables(discs_and_squares, tmp_path):
    """Class files with the classes of `three_classes`: in another order, and with another name."""
    table = json.loads((discs_and_squares / "classes.json").read_text())
    renamed = {"sky" if name == "disc" else name: colour for name, colour in table.items()}
    for name, content in {"other": dict(reversed(table.items())), "renamed": renamed}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_a_run_with_other_classes_is_refused(discs_and_squares, three_classes, tables, capsys):
    flags = arguments(discs_and_squares, three_classes, epochs=1)
    assert train.main([*flags, "--classes", str(tables / "renamed.json")]) == 1
    assert "names: " in capsys.readouterr().err


def test_classes_are_scored_as_the_classes_of_the_model(
    discs_and_squares, three_classes, tables, capsys
):
    root, out = discs_and_squares, tables / "out"
    flags = ["--workdir", three_classes, "--images", root / "images", "--masks", root / "masks"]
    flags = [*map(str, flags), "--out", str(out), "--classes"]
    assert evaluate.main([*flags, str(tables / "other.json")]) == 1
    words = "the model's classes are background disc square, in this order: give --classes in it"
    assert words in capsys.readouterr().err and not out.exists()
    assert evaluate.main([*flags, str(tables / "renamed.json")]) == 0
    words = "scored in this order: background as background, sky as disc, square as square"
    assert words in capsys.readouterr().out


def test_exclusive_classes_have_no_threshold(discs_and_squares, three_classes, tmp_path, capsys):
    flags = ["--workdir", str(three_classes), "--out", str(tmp_path / "out"), "--threshold", "0.9"]
    assert predict.main([*flags, str(discs_and_squares / "images")]) == 1
    assert "there is no threshold" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_may_begin_with_pictures_without_an_object(tmp_path):
    """Also if the other pixels of the first batch do not count."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(30):
        image, mask = rng.integers(0, 255, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        mask[:4] = 255
        mask[10:20, 10:20] = i % 15 == 0
        Image.fromarray(image).save(tmp_path / f"images/{i:02d}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{i:02d}.png")
    flags = [*arguments(tmp_path, tmp_path / "run", epochs=1, batch_size=1), "--stream"]
    assert train.main([*flags, "--foreground", "1", "--ignore", "255"]) == 0


@pytest.mark.parametrize(
    ("weights", "k", "facts", "words"),
    [
        ("frequency", 1, [{"0": 5}], "--class-weights needs exclusive classes"),
        ("frequency", 3, None, "does not go with --stream: give numbers"),
        ("frequency", 3, [{"0": 5, "2": 1}], "class 1 is in no training mask"),
        ((1.0, 2.0), 3, None, "there are 2 class weights for 3 classes"),
        ((1.0, 2.0, 3.0), 3, None, None),
    ],
)
def test_class_weights_must_fit_the_classes(weights, k, facts, words):
    recipe = configure(RECIPES["strong"], num_classes=k)
    masks = facts and SimpleNamespace(facts=[SimpleNamespace(resized=x) for x in facts])
    use = recipe, runs.Settings(class_weights=weights), SimpleNamespace(train=masks)
    if words is None:
        assert train.with_class_weights(*use).class_weight == weights
        return
    with pytest.raises(ValueError, match=words):
        train.with_class_weights(*use)


def test_evaluation_of_masks_with_other_values_needs_a_flag(folders, short, tmp_path, capsys):
    other = tmp_path / "masks"
    other.mkdir()
    for file in (folders / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) // 255 * np.uint8(7)).save(other / file.name)
    flags = ["--workdir", str(short), "--images", str(folders / "images"), "--masks", str(other)]
    assert evaluate.main(flags) == 1
    assert "it has the values 7, but" in (error := capsys.readouterr().err) and "--fore" in error
    assert evaluate.main([*flags, "--foreground", "7"]) == 0
    file = short / f"evaluation-folder-{folders.name}-images.json"
    report = json.loads(file.read_text())
    assert evaluate.main([*flags[:5], str(folders / "masks")]) == 1  # has the same name
    assert "of other pictures or masks" in capsys.readouterr().err
    assert json.loads(file.read_text()) == report
    assert evaluate.main([*flags[:5], str(folders / "masks"), "--out", str(tmp_path)]) == 0
    same = json.loads((tmp_path / file.name).read_text())
    assert report["own_size"] == same["own_size"] and report["dice_pooled"] == same["dice_pooled"]
    assert evaluate.main([*flags, "--classes", "a", "b", "c", "d", "e", "f", "g", "h"]) == 1
    words = "the masks have 8 exclusive classes, and the model one class against the background"
    assert words in capsys.readouterr().err
    assert evaluate.main(["--workdir", str(short), "--foreground", "7"]) == 1
    assert "need --images" in capsys.readouterr().err


def test_evaluation_takes_suffixes_and_another_range(folders, short, tmp_path):
    (tmp_path / "masks").mkdir()
    for file in (folders / "masks").iterdir():
        shutil.copy(file, tmp_path / "masks" / f"{file.stem}_m.png")
    flags = ["--workdir", str(short), "--out", str(tmp_path / "out")]
    others = ["--images", str(folders / "images"), "--masks", str(tmp_path / "masks")]
    assert evaluate.main([*flags, *others, "--mask-suffix", "_m"]) == 0
    [file] = (tmp_path / "out").glob("evaluation-folder-*.json")
    number = len(list((folders / "images").iterdir()))
    assert json.loads(file.read_text())["n_images"] == number
    assert evaluate.main([*flags, "--value-range", "10", "200"]) == 0
    report = json.loads((tmp_path / "out" / "evaluation-test-ranged.json").read_text())
    assert (report["images"]["low"], report["images"]["high"]) == ([10.0], [200.0])


def test_a_model_of_a_known_data_set_is_evaluated_on_other_files(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "models" / "strong", model)
    content = json.loads((model / "model.json").read_text())
    del content["checksum"]
    content["about"]["masks"] = formats.to_json(
        formats.BINARY
    )  # those of TFDS; these are 0 and 255
    (model / "model.json").write_text(json.dumps(content))
    flags = ["--model", model, "--images", folders / "images", "--masks", folders / "masks"]
    assert evaluate.main([*map(str, flags), "--out", str(tmp_path)]) == 0


def test_masks_of_a_known_data_set_need_no_flags(tmp_path, capsys):
    flags = ["--workdir", tmp_path, "--data-dir", tmp_path, "--dataset", "synthetic_polyps"]
    assert train.main([*map(str, flags), "--foreground", "1"]) == 1
    assert "the masks of synthetic_polyps are known" in capsys.readouterr().err


# Other channels, ranges and sizes


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """Thirty arrays of five channels with very different ranges; a disc in the fourth channel."""
    root = tmp_path_factory.mktemp("stacks")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :60]
    for part in ("images", "masks"):
        (root / part).mkdir()
    for i in range(30):
        cy, cx = rng.uniform(8, 32), rng.uniform(8, 52)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < 49
        image = rng.normal(0, 1, (40, 60, 5)) * [1, 1e-3, 50, 400, 1e4]
        image[disc, 3] += 3000
        np.save(root / f"images/{i:02d}.npy", image.astype(np.float32))
        np.save(root / f"masks/{i:02d}.npy", disc)
    return root


def test_arrays_of_five_channels_from_training_to_prediction(stacks, tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "out"
    flags = arguments(stacks, workdir, recipe="strong", epochs=12)
    where = flags.index("--image-size")
    flags[where : where + 2] = ["--image-size", "32", "64"]
    flags += ["--learning-rate", "5e-3"]
    assert train.main(flags) == 0
    assert "images: 5 channels, floats, -" in capsys.readouterr().out
    config = json.loads((workdir / "config.json").read_text())
    assert config["settings"]["image_size"] == [32, 64]
    assert config["images"]["channels"] == 5 and len(config["images"]["low"]) == 5
    assert config["images"]["high"][3] > 3000 > config["images"]["high"][2]
    assert evaluate.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    report = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert report["dice_per_image"] == lines(workdir)[-1]["val_dice_per_image"] > 0.7
    # A resumed run, and one that is finished, keep the range that was measured.
    assert train.main(flags) == 0
    assert export.main(["--workdir", str(workdir), "--out", str(tmp_path / "model")]) == 0
    files = [str(stacks / f"images/{i:02d}.npy") for i in range(3)]
    assert predict.main(["--model", str(tmp_path / "model"), "--out", str(out), *files]) == 0
    for i in range(3):
        with (
            Image.open(out / f"{i:02d}-mask.png") as mask,
            Image.open(out / f"{i:02d}-overlay.png") as overlay,
        ):
            assert mask.size == overlay.size == (60, 40) and overlay.mode == "RGB"
            true = np.load(stacks / f"masks/{i:02d}.npy")
            found = np.asarray(mask) > 0
            assert 2 * (true & found).sum() / (true.sum() + found.sum()) > 0.7
    # Another number of channels, another kind of values: refused by name; a range may be declared.
    grey = np.zeros((40, 60), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    command = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "grey")]
    assert predict.main([*command, str(tmp_path / "grey.png")]) == 1
    assert "it has 1 channels, and the images should have 5" in capsys.readouterr().err
    np.save(tmp_path / "bytes.npy", np.zeros((40, 60, 5), np.uint8))
    command = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "bytes")]
    command.append(str(tmp_path / "bytes.npy"))
    assert predict.main(command) == 1
    assert "its values are 8 bits (0 to 0)" in capsys.readouterr().err
    assert predict.main([*command, "--overwrite", "--value-range", "0", "255"]) == 0


def test_grey_of_16_bits_trains_the_same_network_whatever_its_scale(tmp_path):
    """A scale and an offset of all values change nothing but rounding."""
    losses = []
    for name, scale, offset in (("a", 16, 0), ("b", 200, 5000)):
        root = tmp_path / name
        rng = np.random.default_rng(0)
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
        for i in range(20):
            mask = np.zeros((32, 32), bool)
            cy, cx = rng.integers(4, 20, 2)
            mask[cy : cy + 10, cx : cx + 10] = True
            grey = (rng.integers(20, 120, (32, 32)) + 80 * mask) * scale + offset
            Image.fromarray(grey.astype(np.uint16)).save(root / f"images/{i:02d}.tif")
            Image.fromarray(mask).save(root / f"masks/{i:02d}.png")
        assert train.main(arguments(root, root / "run", epochs=1)) == 0
        config = json.loads((root / "run/config.json").read_text())
        assert config["images"]["channels"] == 1 and config["images"]["kind"] == "integers"
        losses.append(lines(root / "run")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# The summary


def test_a_dry_run_ends_with_the_summary(folders, tmp_path, capsys):
    assert train.main([*arguments(folders, tmp_path / "run"), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "foreground" in output and "% in 48" in output and "test: 6 pictures" in output
    assert not (tmp_path / "run").exists()


def test_objects_that_are_too_small_are_refused_and_doubles_are_reported(folders, tmp_path, capsys):
    root = tmp_path / "spots"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(30):
        mask = np.zeros((320, 320), np.uint8)
        mask[i * 10 : i * 10 + 3, 50:53] = 255
        shutil.copy(folders / f"images/{min(i, 20):02d}.png", root / f"images/{i:02d}.png")
        picture = Image.open(folders / f"images/{min(i, 20):02d}.png").resize((320, 320))
        picture.save(root / f"images/{i:02d}.png")
        Image.fromarray(mask).save(root / f"masks/{i:02d}.png")
    assert train.main(arguments(root, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "all masks are empty after resizing" in error and "about 107 would keep them" in error
    assert train.main([*arguments(root, tmp_path / "run", image_size=160), "--dry-run"]) == 0
    assert "pictures are the same in two splits: " in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, predict, evaluate])
def test_a_folder_that_cannot_be_written_to_is_found_out_before_the_work(
    program, undisturbed, folders, tmp_path, monkeypatch, capsys
):
    workdir, *_ = undisturbed
    (tmp_path / "file").touch()
    for place, words in (
        (tmp_path / "file" / "deep" / "out", "cannot be made: .*file is a file"),
        (tmp_path / "locked" / "out", "tmp.* is read-only: choose another folder than .*out"),
    ):
        monkeypatch.setattr(os, "access", lambda *_: False)
        command = ["--workdir", str(place)]
        if program is not train:
            command = ["--workdir", str(workdir), "--out", str(place)]
        if program is predict:
            command.append(str(folders / "images"))
        assert program.main(command) == 1
        captured = capsys.readouterr()
        assert re.search(words, captured.err) and "opening" not in captured.out


def test_a_disk_that_is_full_while_a_run_writes_is_one_line(folders, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train.draw, "save_sheet", full)
    assert train.main(arguments(folders, tmp_path / "run", epochs=1)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert re.search("error: the disk of .*run is full: make room and run the same", errors[-1])


def test_threads_that_report_after_a_failed_write_are_left_out(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(sys, "__unraisablehook__", shown := [].append)
    assert predict.main(["--workdir", "gone", "--threshold", "7", "picture.png"]) == 1
    closed, other = (
        SimpleNamespace(exc_value=RuntimeError(words))
        for words in ("Event loop is closed", "another error")
    )
    for error in (closed, other):
        sys.unraisablehook(error)
    assert shown.__self__ == [other]
