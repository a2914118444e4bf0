"""flax-unet info: right, private, and never the victim of what it reports."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import flax
import jax
import numpy as np
import pytest

import flax_unet
from flax_unet_cli import info, program

ROOT = Path(__file__).parent.parent
EXPORTED = ROOT / "tests" / "golden" / "run-0.1.0" / "exported"


@pytest.fixture
def quick(monkeypatch):
    """No processes are started."""
    monkeypatch.setattr(info, "answer", lambda *_, **__: "")


@pytest.fixture
def run(tmp_path):
    """A workdir with all that the report reads."""
    folder = tmp_path / "run"
    for step in ("9", "10", "damaged-8"):
        (folder / "checkpoints" / step).mkdir(parents=True)
    content = {
        "settings": {"recipe": "strong", "crop": None, "seed": 0, "upright": False},
        "model": {"num_classes": 1, "features": [4, 8]},
        "masks": {"names": ["background", "polyp"]},
        "images": {"channels": 3},
        "device": "1 x tpu v9",
        "versions": {"jax": "0.0.1", "numpy": np.__version__},
        "summary": {"train": {"pictures": 77}, "others": {"test": 5}},
    }
    (folder / "config.json").write_text(json.dumps(content))
    dice = {"val_dice_per_image": [0.25, 0.75, 0.5], "val_dice_pooled": [0.9, 0.1, 0.2]}
    lines = [
        {"epoch": i + 1, "step": 3 * i + 4} | {name: values[i] for name, values in dice.items()}
        for i in range(3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def parts(text):
    """{label: text without line breaks}, of a report whose form is checked."""
    lines = text.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 100
    found = {}
    for line in lines:
        label, words = line[: info.INDENT].strip(), line[info.INDENT :]
        if label:
            found[label] = words
        else:
            found[[*found][-1]] += " " + words
    return found


def test_versions_and_devices_are_those_of_this_process(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert info.main([]) == 0
    found = parts(capsys.readouterr().out)
    assert found["flax-unet"].startswith(flax_unet.__version__)
    assert found["python"].startswith(platform.python_version())
    for package in (jax, flax, np):
        assert f"{package.__name__} {package.__version__}" in found["packages"].split(", ")
    assert re.match(r"\d+ x cpu cpu", found["devices"])
    assert "onnx" in found["extras"].split("; ")[0] and "errors" not in found["extras"]


def test_the_cache_is_that_of_the_programs(quick, capsys):
    folder = program.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "some").write_bytes(bytes(3_000_000))
    info.main([])
    n = sum(file.is_file() for file in folder.rglob("*"))
    assert re.search(
        rf"{folder.name}, \d+ MB in {n} files", parts(capsys.readouterr().out)["cache"]
    )


def test_a_run_is_described(quick, run, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(run.parent))
    info.main([f"--workdir=~/{run.name}"])
    found = parts(capsys.readouterr().out)
    assert found["settings"] == "recipe=strong seed=0"
    assert "77 pictures" in found["data"] and '"polyp"' in found["data"]
    assert found["made with"] == "1 x tpu v9; jax=0.0.1"
    assert found["steps"] == "checkpoints of steps 9, 10; also damaged-8"
    scores = "val_dice_per_image 0.5000, best 0.7500 in epoch 2"
    assert found["epochs"] == f"3 done, at step 10; {scores}"


@pytest.mark.parametrize("changed", [{"crop": 64}, {"num_classes": 3}])
def test_the_best_is_what_the_checkpoints_are_chosen_by(quick, run, capsys, changed):
    content = json.loads((run / "config.json").read_text())
    for section in ("settings", "model"):
        content[section] |= {k: v for k, v in changed.items() if k in content[section]}
    (run / "config.json").write_text(json.dumps(content))
    info.main(["--workdir", str(run)])
    assert "val_dice_pooled 0.2000, best 0.9000 in epoch 1" in capsys.readouterr().out


def test_the_best_epoch_is_one_that_was_saved(quick, run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1]["saved"] = False
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info.main(["--workdir", str(run)])
    found = parts(capsys.readouterr().out)["epochs"]
    assert found.endswith("best 0.5000 in epoch 3")


def test_a_cross_validation_is_named(quick, tmp_path, capsys):
    (tmp_path / "cross-validation.json").write_text("{}")
    info.main(["--workdir", str(tmp_path)])
    found = parts(capsys.readouterr().out)
    assert "a cross-validation: name one of its folds" in found["workdir"]
    assert not [label for label, text in found.items() if "error" in text]


def test_an_exported_model_is_described(quick, capsys):
    info.main(["--workdir", str(EXPORTED)])
    found = parts(capsys.readouterr().out)
    assert "features=" in found["network"] and "recipe=" in found["settings"]
    assert not [label for label, text in found.items() if "error" in text]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": 7, "model": []}', None])
@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "checkpoints"])
def test_what_is_damaged_is_reported_in_its_place(quick, run, capsys, file, content):
    if file == "checkpoints":
        shutil.rmtree(run / file)
    if content is None:
        (run / file).unlink(missing_ok=True)
    else:
        (run / file).write_text(content)
    assert info.main(["--workdir", str(run)]) == 0
    found = parts(capsys.readouterr().out)
    about = {"config.json": "settings", "metrics.jsonl": "epochs", "checkpoints": "steps"}
    for label in {*about.values()} - {about[file]}:
        assert "error" not in found[label]
    empty_history = file == "metrics.jsonl" and content == ""
    assert ("error" in found[about[file]]) != empty_history
    assert found["flax-unet"].startswith(flax_unet.__version__)


# What the report is there for


@pytest.mark.parametrize(
    ("code", "words", "patience"),
    [
        ("import os; os.abort()", "error: ended by SIGABRT", 60),
        ("raise RuntimeError('no TPU')", "RuntimeError: no TPU", 60),
        ("import time; time.sleep(600)", "error: no answer in 0.5 seconds", 0.5),
    ],
)
def test_devices_that_crash_fail_or_hang(monkeypatch, code, words, patience):
    monkeypatch.setattr(info, "PATIENCE", patience)
    assert words in info.answer(code)


def test_jax_and_extras_that_cannot_be_imported(tmp_path):
    for name in ("jax", "grain"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "flax_unet_cli", "info"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    found = parts(done.stdout)
    assert "ImportError: jax is broken" in found["devices"]
    assert "grain: ImportError: grain is broken" in found["extras"]
    assert "JAX_PLATFORMS=cpu" in found["environment"]


def test_neither_the_home_folder_nor_the_name_is_printed(monkeypatch, run, capsys):
    home = run.parent / "people" / "alicia"
    home.mkdir(parents=True)
    run.rename(home / "run")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alicia")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={home}. --xla_x=/scratch/alicia/y")
    monkeypatch.setattr(info, "DEVICES", f"raise OSError('user alicia, {home}/libtpu.so')")
    info.main(["--workdir", str(home / "run")])
    found = parts(text := capsys.readouterr().out)
    assert "alicia" not in text and str(home) not in text
    assert (found["workdir"], found["cache"]) == ("~/run", "~/cache/flax_unet, empty")
    assert "XLA_FLAGS=--xla_dump_to=~. --xla_x=/scratch/USER/y" in found["environment"]
    assert "user USER, ~/libtpu.so" in found["devices"]


def test_a_name_within_a_word_is_left(monkeypatch):
    monkeypatch.setenv("USER", "al")
    monkeypatch.setenv("HOME", "/home/al")
    assert info.private("/home/al/x /home/alice val al") == "~/x /home/alice val USER"


def test_long_flags_do_not_make_a_long_report(quick, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--xla_flag_{i}=true" for i in range(1000)))
    info.main([])
    parts(capsys.readouterr().out)


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, modules in info.EXTRAS.items():
        named = [re.split("[=<>;]", text)[0] for text in project["optional-dependencies"][extra]]
        assert {name.replace("-", "_") for name in named} == {*modules}
