"""Ctrl-C and SIGTERM end a program at once, in one line, until there are steps to save."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parent.parent / "experiments" / "train.py"
FLAGS = "--dataset synthetic_polyps --image-size 32 --features 4 8 --epochs 500".split()


def start(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    places = ["--workdir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "-u", TRAIN, *places, *FLAGS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["opening synthetic_polyps", "compiling"])
def test_a_signal_before_the_first_step_ends_the_program(moment, number, tmp_path, monkeypatch):
    with start(tmp_path, monkeypatch) as program:
        while moment not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(number)
        rest = program.communicate(timeout=30)[0].splitlines()
    assert program.returncode == 128 + number
    assert rest[-1] == "interrupted" and not any("Traceback" in line for line in rest)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_signal_after_it_saves_the_state_and_a_second_one_does_not_wait(tmp_path, monkeypatch):
    with start(tmp_path, monkeypatch) as program:
        while "epoch 1/500" not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        rest = program.communicate(timeout=30)[0]
    assert program.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: the state is saved; run the same command again" in rest
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    with start(tmp_path, monkeypatch) as program:
        while "resuming after step" not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=30)
    assert program.returncode == 128 + signal.SIGINT
