"""What the programs print: help, progress, the line of an epoch, the next commands."""

import gc
import importlib
import io
import json
import re
import shlex
import sys
import time

import drawn
import jax
import pytest
from PIL import Image

from flax_unet import parallel
from flax_unet_cli import __main__, ablate, data_efficiency, program, train

MODULES = {name: importlib.import_module(f"flax_unet_cli.{name}") for name in __main__.PROGRAMS}


def help_of(name, capsys):
    with pytest.raises(SystemExit) as end:
        MODULES[name].main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_help_has_examples_and_no_none(name, capsys, monkeypatch):
    text = help_of(name, capsys)
    assert "None" not in text and re.search(r"examples?:\n  flax-unet", text)
    commands = re.findall(r"^  flax-unet (\S+) (.*)$", text, re.M)
    if name == "info":  # reads its flags itself
        return
    ran = []
    monkeypatch.setattr(MODULES[name], "run", ran.append)
    for other, words in commands:
        assert other.replace("-", "_") == name
        assert MODULES[name].main(shlex.split(words)) == 0  # the flags exist
    assert len(ran) == len(commands) > 0


def test_help_of_training_is_grouped(capsys):
    groups = re.findall(r"^\W+(\w* ?options) \W+$", help_of("train", capsys), re.M)
    names = "data training masks pictures processes".split()
    assert groups == ["options", *(f"{x} options" for x in names)]


@pytest.mark.parametrize("study", [ablate, data_efficiency])
@pytest.mark.parametrize("flag", ["--recipe", "--stream", "--crop", "--classes", "--dry-run"])
def test_studies_have_no_flags_that_they_cannot_use(study, flag, capsys):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    assert flag not in capsys.readouterr().out.replace("--recipe pretrained", "")
    with pytest.raises(SystemExit):
        study.main(["--workdir", "a", flag, "1"])
    assert f"Unrecognized options: {flag}" in capsys.readouterr().err


def history(dice):
    return [
        {"epoch": i + 1, "loss": 0.25, "val_loss": 1234.5, "val_dice_pooled": each}
        for i, each in enumerate(dice)
    ]


def test_the_line_of_an_epoch():
    ends = [0.0, 100.0, 110.0, 130.0]  # the first epoch compiles
    line = train.epoch_line(history([0.5, 0.7, 0.6]), "dice_pooled", 100, ends)
    assert line == (
        "epoch 3/100  val dice 0.6000  loss 0.2500  val loss 1234.5000  00:20, 24:15 left"
    )  # 97 epochs of 15 s
    line = train.epoch_line(history([0.5, 0.7]), "dice_pooled", 1000, [0.0, 90_000.0, 180_000.0])
    assert "val dice 0.7000 (best)" in line and "24945:00:00 left"[-5:] in line
    assert len(line) <= 100
    assert train.epoch_line(history([0.5]), "dice_pooled", 1, [0.0, 7.0]).endswith("  00:07")


@pytest.fixture
def folders(tmp_path):
    return drawn.discs(tmp_path, 20, 32)


def test_a_training_says_what_it_does_and_what_is_next(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(sys, "argv", ["flax-unet train"])
    flags = "--workdir run --dataset folder --images images --masks masks --features 4 8"
    flags = [*flags.split(), "--image-size", "32", "--epochs", "2"]
    gc.collect()  # what Orbax left of other tests' damaged checkpoints says so on stderr
    capsys.readouterr()
    assert train.main(flags) == 0
    output, error = capsys.readouterr()
    assert error == ""  # no bar, since this is no terminal
    places = [
        output.index(words)
        for words in (
            "opening folder",
            "looking at 16 training pictures",
            "looking at 20 masks",
            "loading 16 pictures of train",
            "loading 2 pictures of validation",
            "warning: validation has only 2 of the pictures",
            "warning: test has only 2 of the pictures",
            "compiling",
            "compiled in",
            "epoch 1/2  val dice 0.",
            "epoch 2/2  val dice 0.",
            "next:",
        )
    ]
    assert places == sorted(places)
    assert max(map(len, output[places[5] :].splitlines())) <= 100
    lines = [json.loads(line) for line in (folders / "run" / "metrics.jsonl").open()]
    assert f"val dice {lines[1]['val_dice_per_image']:.4f}" in output
    *_, evaluation, prediction, export = output.splitlines()
    for command, name, rest in (
        (evaluation, "evaluate", []),
        (prediction.replace("PICTURES", "images"), "predict", []),
        (export, "export", []),
    ):
        words = shlex.split(command)
        assert words[:4] == ["flax-unet", name, "--workdir", "run"]
        assert MODULES[name].main(words[2:] + rest) == 0
    assert (folders / "run-model" / "model.json").exists()
    assert (folders / "predictions" / "00-mask.png").exists()


def test_quiet_prints_warnings_and_errors_only(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run, images, masks = (str(folders / x) for x in ("run", "images", "masks"))
    flags = ["--workdir", run, "--dataset", "folder", "--images", images, "--masks", masks]
    flags += "--image-size 32 --features 4 8 --epochs 1 --quiet".split()
    assert train.main(flags) == 0
    assert MODULES["evaluate"].main(["--workdir", run, "--quiet"]) == 0
    out = str(folders / "out")
    assert MODULES["predict"].main(["--workdir", run, "--quiet", "--out", out, images]) == 0
    assert capsys.readouterr() == ("", "")
    Image.open(folders / "images" / "01.png").save(folders / "images" / "double.png")
    Image.open(folders / "masks" / "01.png").save(folders / "masks" / "double.png")
    assert train.main(flags) == 1
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("error: ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
    ],
)
def test_too_little_memory_is_one_line(error, tmp_path, monkeypatch, capsys):
    def run(options):
        raise error

    monkeypatch.setattr(train, "run", run)
    assert train.main(["--workdir", str(tmp_path)]) == 1
    line = "error: there is too little memory: a smaller --batch-size, --image-size or --window "
    first = str(error).partition("\n")[0]
    assert capsys.readouterr().err == f"{line}needs less ({first})\n"


def test_a_loop_over_pictures_has_a_bar_on_a_terminal(monkeypatch, capsys):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with program.task("loading 30 pictures"):
            results = parallel.map_all(lambda i: time.sleep(0.1) or i, range(30))
        assert results == list(range(30))
        assert ("loading 30 pictures: " in stream.getvalue()) == shown
        assert capsys.readouterr().out.startswith("loading 30 pictures\n")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    parallel.map_all(lambda i: time.sleep(0.1), range(30))  # in a library there is none
    assert terminal.getvalue() == ""


def test_a_task_says_how_long_it_took(capsys, monkeypatch):
    times = iter([0.0, 1.9, 0.0, 61.2])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    for expected in ("short\n", "long\n  took 61 s\n"):
        with program.task(expected.split()[0]):
            pass
        assert capsys.readouterr().out == expected


def test_the_next_command_has_the_python_that_has_the_packages(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate.py").touch()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert program.command("evaluate") == ".venv/bin/python evaluate.py"


@pytest.mark.parametrize(
    ("this", "expected"),
    [
        ("flax-unet train", "flax-unet export --out 'a b'"),
        ("experiments/train.py", "python experiments/export.py --out 'a b'"),
        ("some where/train.py", "python 'some where/export.py' --out 'a b'"),
        ("flax_unet_cli/__main__.py", "flax-unet export --out 'a b'"),
        ("ipykernel_launcher.py", "flax-unet export --out 'a b'"),
    ],
)
def test_the_next_command_is_one_that_works(this, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program.shutil, "which", lambda name: sys.executable)
    for folder in ("experiments", "some where", "flax_unet_cli"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "export.py").touch()
    monkeypatch.setattr(sys, "argv", [this])
    assert program.command("export", "--out", tmp_path / "a b") == expected


def test_the_obvious_command_says_first_how_long_it_takes(tmp_path, capsys):
    flags = ["--workdir", str(tmp_path / "run"), "--data-dir", str(tmp_path)]
    assert train.main([*flags, "--kvasir-zip", str(tmp_path / "no.zip")]) == 1
    assert capsys.readouterr().out.startswith(
        "note: 100 epochs of recipe unet take 7.2 hours on 2 CPU cores; --recipe pretrained"
    )
