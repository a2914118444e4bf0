"""The three programs, run as a user runs them, on a small drawn data set."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablate
import data_efficiency
import evaluate
import export
import jax
import numpy as np
import predict
import pytest
import recipes
import train
from PIL import Image
from recipes import restore_run

from flax_unet import checkpoint

PROGRAMS = Path(__file__).parent.parent / "experiments"
EPOCHS = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sixty pictures of a disc on a noisy ground."""
    root = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for part in ("images", "masks"):
        (root / part).mkdir()
    for i in range(60):
        r, (cy, cx) = rng.uniform(4, 9), rng.uniform(8, 24, 2)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        image = rng.normal(90, 25, (32, 32, 3)) + 80 * disc[..., None]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{i:02d}.png")
        Image.fromarray(disc.astype(np.uint8) * 255).save(root / f"masks/{i:02d}.png")
    return root


def arguments(folders, workdir, **changes):
    settings = {
        "workdir": workdir,
        "dataset": "folder",
        "images": folders / "images",
        "masks": folders / "masks",
        "image-size": 32,
        "epochs": EPOCHS,
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*words, "--features", "8", "16"]


def environment(folders):
    # A restarted program finds what the first one compiled.
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
    """metrics.jsonl without what a clock wrote."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if "second" not in k} for x in found]


def parameters(workdir):
    run = restore_run(workdir, "latest")
    return run.step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.variables)]


@pytest.fixture(scope="module")
def undisturbed(folders, tmp_path_factory):
    """A run that nothing interrupted, and how long its start and the rest took."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(folders, tmp_path_factory.mktemp("warm-up"), epochs=1))
    began = time.monotonic()
    process = start(folders, workdir)
    wait_until(lambda: written(workdir), process)
    first = time.monotonic() - began
    finish(process)
    return workdir, first, time.monotonic() - began - first


def test_a_run_explains_itself(undisturbed):
    workdir, *_ = undisturbed
    kept = {path.name for path in workdir.iterdir()}
    assert kept >= {"config.json", "metrics.jsonl", "checkpoints", "samples", "curves.png"}
    assert list((workdir / "tensorboard").glob("events.*"))
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["features"] == [8, 16] and config["config"]["recipe"] == "unet"
    assert set(config["data"]) == {"train", "validation", "test"} and "jax" in config["versions"]
    history = lines(workdir)
    assert [line["epoch"] for line in history] == list(range(1, EPOCHS + 1))
    article = {"loss", "accuracy", "iou_coef"}
    ours = {"dice_per_image", "iou_per_image"}
    assert set(history[0]) >= {p + k for p in ("", "val_") for k in article | ours}
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert Image.open(workdir / f"samples/epoch-{EPOCHS:04d}.png").size[0] == 3 * 32


def written(workdir):
    """The lines of metrics.jsonl that are whole."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def half_saved(workdir):
    return {path.name for path in (workdir / "checkpoints").glob("*tmp*")}


def wait_until(happened, process):
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(folders, undisturbed, tmp_path):
    straight, first, rest = undisturbed
    workdir, rng = tmp_path / "killed", random.Random(0)
    (workdir / "demo").mkdir(parents=True)  # another run inside of this one's folder
    (workdir / "demo" / "notes.txt").write_text("mine")
    moments = ["saving"] * 3 + ["starting"] * 3 + ["training"] * 4
    rng.shuffle(moments)
    for moment in moments:
        before, stale = written(workdir), half_saved(workdir)
        process = start(folders, workdir)
        if moment == "saving":
            wait_until(lambda stale=stale: half_saved(workdir) - stale, process)
        elif moment == "training":
            wait_until(lambda before=before: written(workdir) > before, process)
            time.sleep(rng.uniform(0, 1.5 * rest / EPOCHS))
        else:
            time.sleep(rng.uniform(0, first))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if moment == "saving" and not half_saved(workdir) - stale:
            moments.append(moment)  # the save was whole already
    assert 0 < written(workdir) < EPOCHS
    finish(start(folders, workdir))
    assert parameters(workdir) == parameters(straight)
    assert lines(workdir) == lines(straight)
    # A new run and a resumed one share the compiled step.
    assert len(list((folders / "compiled").glob("jit_train_step-*-cache"))) == 1
    assert (workdir / "demo" / "notes.txt").read_text() == "mine"


def test_signals_save_in_the_middle_of_an_epoch(folders, undisturbed, tmp_path):
    straight, *_ = undisturbed
    for number in (signal.SIGTERM, signal.SIGINT):
        before = written(tmp_path)
        process = start(folders, tmp_path)
        wait_until(lambda before=before: written(tmp_path) > before, process)
        process.send_signal(number)
        output = finish(process, 128 + number)
        assert f"{number.name}: the state is saved" in output and "Traceback" not in output
    assert "going on after step" in finish(start(folders, tmp_path))
    assert parameters(tmp_path) == parameters(straight)
    assert lines(tmp_path) == lines(straight)


def test_a_signal_in_an_epoch_is_obeyed_before_its_end(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "cache"))
    make = train.train.make_train_step

    def interrupted(*args, **options):
        step = make(*args, **options)

        def send(state, batch, key):
            if int(state.step) == 8:  # with 7 an epoch
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch, key)

        return send

    monkeypatch.setattr(train.train, "make_train_step", interrupted)
    assert train.main(arguments(folders, tmp_path)) == 128 + signal.SIGTERM
    assert parameters(tmp_path)[0] == 9 and len(lines(tmp_path)) == 1


@pytest.fixture
def short(folders, tmp_path, monkeypatch):
    """A run of one epoch in this very process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "cache"))
    assert train.main(arguments(folders, tmp_path / "run", epochs=1)) == 0
    return tmp_path / "run"


def test_what_changes_the_result_is_refused_and_more_epochs_are_welcome(folders, short, capsys):
    before = (short / "config.json").read_text()
    assert train.main(arguments(folders, short, learning_rate=0.5, seed=3)) == 1
    error = capsys.readouterr().err
    assert "learning_rate: 0.001 -> 0.5" in error and "seed: 0 -> 3" in error
    assert "recipe" not in error
    assert (short / "config.json").read_text() == before
    assert train.main(arguments(folders, short, epochs=2)) == 0
    assert [line["epoch"] for line in lines(short)] == [1, 2]


def test_a_run_keeps_the_network_that_its_recipe_stood_for(folders, short, capsys):
    assert evaluate.main(["--workdir", str(short)]) == 0
    then = json.loads((short / "evaluation-test.json").read_text())["loss"]
    config = json.loads((short / "config.json").read_text())
    config["model"]["group_size"] = 8  # as if another version had trained it
    (short / "config.json").write_text(json.dumps(config))
    assert train.main(arguments(folders, short, epochs=2)) == 1
    assert "group_size: 8 -> 1" in capsys.readouterr().err
    assert evaluate.main(["--workdir", str(short)]) == 0
    assert json.loads((short / "evaluation-test.json").read_text())["loss"] != then


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_files_of_something_else_are_not_written_over(folders, tmp_path, capsys, file):
    (tmp_path / file).write_text('{"mine": 1}\n')
    assert train.main(arguments(folders, tmp_path)) == 1
    assert "choose another --workdir" in capsys.readouterr().err
    assert (tmp_path / file).read_text() == '{"mine": 1}\n'


def test_a_history_without_its_checkpoints_is_not_written_over(folders, short, capsys):
    history = (short / "metrics.jsonl").read_text() * 3
    (short / "metrics.jsonl").write_text(history)
    shutil.rmtree(short / "checkpoints")
    assert train.main(arguments(folders, short)) == 1
    assert "metrics.jsonl has no checkpoint to go on from" in capsys.readouterr().err
    assert (short / "metrics.jsonl").read_text() == history


def test_tensorboard_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert train.event_writer(tmp_path, 0) is None


def test_the_article_learns_in_bfloat16(folders, tmp_path):
    other = {"recipe": "article", "dtype": "bfloat16"}
    assert train.main(arguments(folders, tmp_path, epochs=2, **other)) == 0
    history = lines(tmp_path)
    assert history[1]["loss"] < history[0]["loss"]


def test_other_data_is_refused_and_other_versions_are_warned_of(folders, short, tmp_path, capsys):
    other = tmp_path / "other"
    for part in ("images", "masks"):
        (other / part).mkdir(parents=True)
        for file in (folders / part).iterdir():
            if file.stem != "07":
                (other / part / file.name).write_bytes(file.read_bytes())
    assert train.main(arguments(other, short, epochs=2)) == 1
    assert "holds a run with other settings (train: " in capsys.readouterr().err
    config = json.loads((short / "config.json").read_text())
    config["versions"]["jax"] = "0.0.1"
    (short / "config.json").write_text(json.dumps(config))
    assert train.main(arguments(folders, short, epochs=1)) == 0
    assert "0.0.1" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(folders, tmp_path, capsys):
    assert train.main(arguments(folders, tmp_path, learning_rate=1e38)) == 1
    assert "the update norm of step 1 is inf" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())
    # nothing was kept of that run, so the workdir is free for another
    assert train.main(arguments(folders, tmp_path, epochs=1)) == 0


def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(
    folders, short, capsys, monkeypatch
):
    good = parameters(short)
    make = train.train.make_train_step

    def spoiled(*args, **options):
        step = make(*args, **options)

        def spoil(state, batch, key):
            state, figures = step(state, batch, key)
            return state, figures | {"loss": float("nan")}

        return spoil

    monkeypatch.setattr(train.train, "make_train_step", spoiled)
    assert train.main(arguments(folders, short, epochs=2)) == 1
    assert f"the loss of step {good[0] + 1} is nan" in capsys.readouterr().err
    assert parameters(short) == good and len(lines(short)) == 1


def test_a_workdir_in_use_is_refused(folders, undisturbed, capsys, monkeypatch):
    workdir, *_ = undisturbed
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "cache"))
    with train.locked(workdir):
        assert train.main(arguments(folders, workdir)) == 1
    assert "another process is training in" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"hello": 1}', "[]"])
def test_a_damaged_config_is_named(short, folders, capsys, content):
    (short / "config.json").write_text(content)
    assert train.main(arguments(folders, short)) == 1
    assert evaluate.main(["--workdir", str(short)]) == 1
    assert capsys.readouterr().err.count("config.json is damaged or not of a run") == 2


def test_a_finished_run_says_so(folders, short, capsys):
    assert train.main(arguments(folders, short, epochs=1)) == 0
    assert "all 1 epochs are done" in capsys.readouterr().out


def test_a_split_that_is_empty_is_named(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "07.png").write_bytes((folders / part / "07.png").read_bytes())
    assert train.main(arguments(tmp_path, tmp_path / "run")) == 1
    assert "split of the 1 pictures is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 33}, "image_size 33 is no multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"images": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_a_setting_that_cannot_work_is_named_and_leaves_nothing(
    folders, tmp_path, capsys, changes, words
):
    assert train.main(arguments(folders, tmp_path / "run", **changes)) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demonstration_reaches_its_score(tmp_path):
    make = ["make", "--dry-run", "--old-file=.venv/installed", f"BIN={Path(sys.executable).parent}"]
    root = PROGRAMS.parent
    commands = subprocess.check_output([*make, "demo"], cwd=root, text=True)
    commands = commands.replace("runs/demo", str(tmp_path))
    subprocess.run(["bash", "-e", "-c", commands], cwd=root, check=True)
    assert json.loads((tmp_path / "evaluation-test.json").read_text())["dice_per_image"] >= 0.85


def test_evaluation_needs_the_workdir_alone(undisturbed, capsys):
    workdir, *_ = undisturbed
    assert evaluate.main(["--workdir", str(workdir)]) == 0
    report = json.loads((workdir / "evaluation-test.json").read_text())
    low, high = report["dice_per_image_interval"]
    assert 0.5 < low < report["dice_per_image"] < high <= 1
    assert f"{report['dice_per_image']:.4f}" in capsys.readouterr().out
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
    assert Image.open(workdir / "evaluation-test.png").size == (3 * 32, 3 * 32)
    assert Image.open(workdir / "evaluation-test-reliability.png").format == "PNG"
    assert evaluate.main(["--workdir", str(workdir), "--flips"]) == 0
    flips = json.loads((workdir / "evaluation-test-flips.json").read_text())
    assert flips["flips"] and flips["dice_per_image"] != report["dice_per_image"]
    assert evaluate.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    assert json.loads((workdir / "evaluation-validation-latest.json").read_text())["n_images"] > 0
    # the figures of training, computed anew
    validation = lines(workdir)[-1]["val_dice_per_image"]
    again = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert again["dice_per_image"] == pytest.approx(validation, abs=1e-6)


def test_evaluation_of_other_folders_takes_all_of_them(folders, undisturbed):
    workdir, *_ = undisturbed
    others = ["--images", str(folders / "images"), "--masks", str(folders / "masks")]
    assert evaluate.main(["--workdir", str(workdir), *others]) == 0
    (report,) = workdir.glob("evaluation-folder-*-images.json")
    assert json.loads(report.read_text())["n_images"] == 60


def test_evaluation_without_a_run_is_an_error(tmp_path, capsys):
    assert evaluate.main(["--workdir", str(tmp_path)]) == 1
    assert "there is no run in this workdir" in capsys.readouterr().err


def test_prediction_of_files_of_any_mode_and_size(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    rng = np.random.default_rng(0)
    inputs = tmp_path / "in"
    inputs.mkdir()
    colour = Image.fromarray(rng.integers(0, 256, (45, 70, 3), np.uint8))
    for mode in ("L", "RGBA", "P", "CMYK"):
        colour.convert(mode).save(inputs / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.fromarray(rng.integers(0, 65536, (45, 70), np.uint16)).save(inputs / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(inputs / "turned.jpg", exif=turned)
    (inputs / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    command = ["--workdir", str(workdir), "--out", str(out), str(inputs)]
    assert predict.main(command) == 1
    captured = capsys.readouterr()
    assert "broken.png: not a picture" in captured.err and "6 of 7 pictures" in captured.out
    (inputs / "broken.png").unlink()
    assert predict.main(command) == 0
    for name in ("L", "RGBA", "P", "CMYK", "sixteen", "turned"):
        size = (45, 70) if name == "turned" else (70, 45)
        mask = Image.open(out / f"{name}-mask.png")
        assert mask.size == size and set(np.unique(mask)) <= {0, 255}
        assert Image.open(out / f"{name}-overlay.png").size == size


def test_prediction_finds_the_disc(folders, undisturbed, tmp_path):
    workdir, *_ = undisturbed
    file = folders / "images" / "07.png"
    assert predict.main(["--workdir", str(workdir), "--out", str(tmp_path), str(file)]) == 0
    found = np.asarray(Image.open(tmp_path / "07-mask.png")) > 127
    truth = np.asarray(Image.open(folders / "masks" / "07.png")) > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.5


def test_the_strong_recipe_learns_and_keeps_its_number_of_epochs(
    folders, tmp_path, capsys, monkeypatch
):
    make, steps = recipes.falling_adamw, set()

    def noted(rate, n):
        steps.add(n)
        return make(rate, n)

    monkeypatch.setattr(recipes, "falling_adamw", noted)
    settings = {"recipe": "strong", "learning_rate": 1e-2}
    run = arguments(folders, tmp_path / "run", epochs=20, **settings)
    assert train.main(run) == 0
    assert max(steps) == lines(tmp_path / "run")[-1]["step"]
    assert lines(tmp_path / "run")[-1]["val_dice_per_image"] > 0.5
    capsys.readouterr()
    assert train.main(arguments(folders, tmp_path / "run", epochs=21, **settings)) == 1
    assert "epochs: 20 -> 21" in capsys.readouterr().err
    out = tmp_path / "out"
    for flags in ([], ["--flips"]):
        words = ["--workdir", str(tmp_path / "run"), "--out", str(out / str(len(flags))), *flags]
        assert predict.main([*words, str(folders / "images" / "07.png")]) == 0
    found = [np.asarray(Image.open(out / each / "07-mask.png")) > 0 for each in "01"]
    assert 0 < found[0].mean() < 0.5 and (found[0] != found[1]).any()


def test_the_strong_recipe_goes_on_where_it_was_stopped(folders, tmp_path, monkeypatch):
    make, stops = train.train.make_train_step, []

    def interrupted(*args, **options):
        step = make(*args, **options)

        def send(state, batch, key):
            if int(state.step) in stops:
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch, key)

        return send

    def states(workdir):
        config, model, *_ = restore_run(workdir, "latest")
        abstract = recipes.abstract_state(recipes.make_recipe(config))
        with checkpoint.open_checkpoints(workdir / "checkpoints", read_only=True) as opened:
            state, _ = checkpoint.restore(opened, abstract)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

    monkeypatch.setattr(train.train, "make_train_step", interrupted)
    straight, stopped = (
        arguments(folders, tmp_path / name, recipe="strong", epochs=3)
        for name in ("straight", "stopped")
    )
    assert train.main(straight) == 0
    stops.append(10)  # in the second epoch, with 7 an epoch
    assert train.main(stopped) == 128 + signal.SIGTERM
    stops.clear()
    assert train.main(stopped) == 0
    assert states(tmp_path / "straight") == states(tmp_path / "stopped")
    assert lines(tmp_path / "straight") == lines(tmp_path / "stopped")


def test_the_ablation_trains_each_row_once_and_prints_the_table(
    folders, tmp_path, capsys, monkeypatch
):
    rows = ("strong", "BCE alone")
    monkeypatch.setattr(ablate, "ROWS", {name: ablate.ROWS[name] for name in rows})
    assert ablate.main(arguments(folders, tmp_path / "a", epochs=1)) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in rows)
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 2 and files[0].read_text() != files[1].read_text()
    times = [file.stat().st_mtime_ns for file in files]
    assert ablate.main(arguments(folders, tmp_path / "a", epochs=1)) == 0
    assert capsys.readouterr().out == table
    assert times == [file.stat().st_mtime_ns for file in files]
    assert ablate.main(arguments(folders, tmp_path / "a", epochs=1, seed=1)) == 0
    assert len([*(tmp_path / "a").iterdir()]) == 4


def test_the_data_efficiency_trains_on_the_share_of_the_images_for_as_many_steps(
    folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(data_efficiency, "RECIPES", ("strong",))
    monkeypatch.setattr(data_efficiency, "SHARES", (0.25, 1.0))
    seen, score, opened = [], data_efficiency.score, data_efficiency.open_study
    split = {}

    def remembered(*args, **kwargs):
        split.update(opened(*args, **kwargs))
        return split

    def noted(config, recipe, arrays, name):
        seen.append((config.epochs, arrays["train"]))
        return score(config, recipe, arrays, name)

    monkeypatch.setattr(data_efficiency, "score", noted)
    monkeypatch.setattr(data_efficiency, "open_study", remembered)
    assert data_efficiency.main(arguments(folders, tmp_path / "a", epochs=2)) == 0
    (some_epochs, few), (all_epochs, whole) = seen
    some, everything = few.name, whole.name
    batches = [-(-len(some) // 8), -(-len(everything) // 8)]
    assert 0 <= batches[0] * some_epochs - batches[1] * 2 < batches[0] and all_epochs == 2
    assert len(some) == round(len(everything) / 4) and some == everything[: len(some)]
    assert {*everything} == {*split["train"].name} and len(everything) == len({*everything})
    place = np.array([split["train"].name.index(name) for name in everything])
    for part in ("image", "mask"):
        original = getattr(split["train"], part)[place]
        assert (getattr(whole, part) == original).all()
        assert (getattr(few, part) == original[: len(some)]).all()
    table = capsys.readouterr().out
    assert all(f"\n| {n} | 0." in table for n in (len(some), len(everything)))
    assert (tmp_path / "a" / "data-efficiency.png").is_file()


@pytest.mark.parametrize("program", [ablate, data_efficiency])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init": "runs"}, "--init has no use here"),
        ({"recipe": "article"}, "--recipe has no use here"),
        ({"learning_rate": 1e30}, "strong.*is not finite"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused(
    folders, tmp_path, capsys, monkeypatch, program, changes, words
):
    monkeypatch.setattr(data_efficiency, "RECIPES", ("strong",))
    assert program.main(arguments(folders, tmp_path / "a", epochs=1, **changes)) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "a").exists()


def test_missing_weights_are_named_before_anything_is_trained(
    folders, tmp_path, capsys, monkeypatch
):
    def missing(variant):
        raise ModuleNotFoundError(f"no weights of {variant}")

    monkeypatch.setattr(ablate, "imagenet", missing)
    command = arguments(folders, tmp_path / "a")
    command = [*command[: command.index("--features")], "--encoder", "lite2"]
    assert data_efficiency.main(command) == 1
    assert "no weights of lite2" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_each_row_of_the_ablation_changes_one_thing(tmp_path):
    recipe = recipes.make_recipe(recipes.Config(tmp_path, recipe="strong"))
    changed = []
    for row in ablate.ROWS.values():
        pairs = zip(recipe._fields, recipe, row(recipe, 1e-3), strict=True)
        changed.append([field for field, before, after in pairs if before is not after])
    augment, model = ["augment"], ["model"]
    assert changed == [[], augment, augment, ["loss_fn"], model, model, ["tx"]]


def test_a_run_starts_from_the_parameters_of_another(undisturbed, folders, tmp_path, capsys):
    first, begun = tmp_path / "first", tmp_path / "begun"
    shutil.copytree(undisturbed[0], first)
    given = restore_run(first, "best").variables
    settings = {"init": first, "learning_rate": 1e-30}  # it moves no parameter
    assert train.main(arguments(folders, begun, epochs=1, **settings)) == 0
    found = restore_run(begun, "latest").variables
    for a, b in zip(*map(jax.tree.leaves, (given, found)), strict=True):
        np.testing.assert_array_equal(a, b)
    shutil.rmtree(first)  # it is not needed to go on
    assert train.main(arguments(folders, begun, epochs=2, **settings)) == 0
    assert len(lines(begun)) == 2
    capsys.readouterr()
    for changes, words in [
        ({"init": first}, "there is no run in this workdir"),
        ({"init": undisturbed[0], "recipe": "strong"}, "params/down0/Conv_2/bias is not in the"),
        ({"init": undisturbed[0], "recipe": "strong"}, "goes with --recipe unet --features 8 16:"),
    ]:
        assert train.main(arguments(folders, tmp_path / "other", **changes)) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "other" / "config.json").exists()


def test_an_exported_model_stands_for_its_run(undisturbed, folders, tmp_path, capsys):
    workdir, *_ = undisturbed
    out = tmp_path / "models" / "disc"
    assert export.main(["--workdir", str(workdir), "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"model.json", "weights.npz"}
    assert "/" not in json.dumps(json.loads((out / "model.json").read_text())["about"])
    ours, theirs = restore_run(out, "best"), restore_run(workdir, "best")
    assert (ours.step, ours.fingerprints) == (theirs.step, theirs.fingerprints)
    for name, flag, folder in (("a", "--workdir", workdir), ("b", "--model", out)):
        command = [flag, str(folder), "--out", str(tmp_path / name)]
        assert predict.main([*command, str(folders / "images")]) == 0
        pictures = ["--images", str(folders / "images"), "--masks", str(folders / "masks")]
        assert evaluate.main([*command, *pictures]) == 0
    scores, masks = [], []
    for name in ("a", "b"):
        (report,) = (tmp_path / name).glob("evaluation-*.json")
        scores.append(json.loads(report.read_text())["dice_per_image"])
        masks.append(
            np.stack([Image.open(x) for x in sorted((tmp_path / name).glob("*-mask.png"))])
        )
    assert (masks[0] != masks[1]).mean() < 1e-3 and abs(scores[0] - scores[1]) < 1e-3
    assert {file.name for file in out.iterdir()} == {"model.json", "weights.npz"}
    begun = tmp_path / "begun"
    assert train.main(arguments(folders, begun, init=out, epochs=1, learning_rate=1e-30)) == 0
    found = restore_run(begun, "latest").variables
    for a, b in zip(*map(jax.tree.leaves, (found, ours.variables)), strict=True):
        np.testing.assert_array_equal(a, b)
    for taken in (out, workdir):
        before = sorted(file.name for file in taken.iterdir())
        assert export.main(["--workdir", str(workdir), "--out", str(taken)]) == 1
        assert "choose another folder" in capsys.readouterr().err
        assert sorted(file.name for file in taken.iterdir()) == before
    assert evaluate.main(["--model", str(out), "--out", str(tmp_path)]) == 1
    assert "does not say where its pictures are" in capsys.readouterr().err


def test_an_exported_model_says_which_checkpoint_it_is(undisturbed, tmp_path):
    for which in ("best", "latest"):
        command = ["--workdir", str(undisturbed[0]), "--out", str(tmp_path / which)]
        assert export.main([*command, "--checkpoint", which]) == 0
        assert restore_run(tmp_path / which, "best").checkpoint == which
    file = tmp_path / "best" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"about": {"by": "another"}}))
    with pytest.raises(ValueError, match="is of another version or program"):
        restore_run(tmp_path / "best", "best")


def test_no_picture_is_written_over(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    for name in ("a.png", "a-mask.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    before = (tmp_path / "a-mask.png").read_bytes()
    command = ["--workdir", str(workdir), "--out", str(tmp_path), str(tmp_path)]
    assert predict.main(command) == 1
    assert "a-mask.png, of" in capsys.readouterr().err
    assert (tmp_path / "a-mask.png").read_bytes() == before


def test_a_threshold_that_is_no_probability_is_refused(tmp_path, capsys):
    command = ["--workdir", str(tmp_path), "--out", str(tmp_path), "--threshold", "1.5"]
    assert predict.main([*command, str(tmp_path)]) == 1
    assert "threshold is 1.5: it must be in [0, 1)" in capsys.readouterr().err


def test_two_pictures_with_one_name_are_refused(undisturbed, tmp_path, capsys):
    workdir, *_ = undisturbed
    for suffix in ("png", "jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}")
    out = tmp_path / "out"
    assert predict.main(["--workdir", str(workdir), "--out", str(out), str(tmp_path)]) == 1
    assert "is taken by" in capsys.readouterr().err and not out.exists()


def test_a_stream_trains_as_pictures_in_memory_do(folders, short, tmp_path):
    pytest.importorskip("grain")
    streamed = tmp_path / "streamed"
    assert train.main([*arguments(folders, streamed, epochs=1), "--stream"]) == 0
    assert parameters(streamed) == parameters(short) and lines(streamed) == lines(short)


def test_a_stream_without_grain_says_what_to_install(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert train.main([*arguments(folders, tmp_path / "run"), "--stream"]) == 1
    assert "pip install 'flax-unet[stream]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_was_compiled_is_found_again_and_a_damaged_entry_is_made_anew(tmp_path):
    program = (
        "import recipes, jax\n"
        "recipes.keep_compiled()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x * 2 + 1).lower(1.0).compile()\n"
    )
    surroundings = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    surroundings |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(PROGRAMS)}

    def compiled():
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
        (entry,) = tmp_path.glob("flax_unet/xla-*/jit__lambda-*-cache")
        return entry, done.stderr

    entry, silence = compiled()
    whole, written = entry.read_bytes(), entry.stat().st_mtime_ns
    assert compiled() == (entry, silence) and entry.stat().st_mtime_ns == written
    entry.write_bytes(whole[: len(whole) // 2])
    assert "Error reading persistent compilation cache entry" in compiled()[1]
    assert len(entry.read_bytes()) > len(whole) // 2
    assert "Error" not in compiled()[1]
