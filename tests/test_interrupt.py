"""Ctrl-C and SIGTERM end a program at once, in one line, until there are steps to save."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tfds_kvasir

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
TRAIN = EXPERIMENTS / "train.py"
FLAGS = "--dataset synthetic_polyps --image-size 32 --features 4 8 --epochs 500".split()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the data set."""
    folder = tmp_path_factory.mktemp("data")
    tfds_kvasir.sources("synthetic_polyps", data_dir=folder)
    return folder


def start(tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    places = ["--workdir", str(tmp_path / "run"), "--data-dir", str(data_dir)]
    command = [sys.executable, "-u", TRAIN, *places, *FLAGS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["opening synthetic_polyps", "compiling"])
def test_a_signal_before_the_first_step_ends_the_program(
    moment, number, tmp_path, monkeypatch, prepared
):
    data_dir = tmp_path / "data" if moment.startswith("opening") else prepared
    with start(tmp_path, monkeypatch, data_dir) as program:
        while moment not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(number)
        rest = program.communicate(timeout=30)[0].splitlines()
    assert program.returncode == 128 + number
    assert rest[-1] == "interrupted" and not any("Traceback" in line for line in rest)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_signal_after_it_saves_the_state_and_a_second_one_does_not_wait(
    tmp_path, monkeypatch, prepared
):
    with start(tmp_path, monkeypatch, prepared) as program:
        while "epoch 1/500" not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        rest = program.communicate(timeout=30)[0]
    assert program.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: the state is saved; run the same command again" in rest
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    with start(tmp_path, monkeypatch, prepared) as program:
        while "resuming after step" not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=30)
    assert program.returncode == 128 + signal.SIGINT


#: In place of Python: a process that says how many signals it gets within a second of the first.
STUB = """#!/usr/bin/env bash
[ "$1" = -c ] && exec "$REAL" "$@"
exec "$REAL" -uc '
import os, signal, time
numbers = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: numbers.append(number))
os.write(1, b"ready\\n")  # in one piece
for _ in range(3000):
    if not numbers:
        time.sleep(0.01)
time.sleep(1)
os.write(1, b"signals: %d\\n" % len(numbers))
raise SystemExit(128 + numbers[0])'
"""
#: Where SIGINT is ignored, as in a job of a script, no shell can trap it.
DEFAULT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_get_a_signal_once_and_are_waited_for(number, tmp_path):
    (stub := tmp_path / "python").write_text(STUB)
    stub.chmod(0o700)
    with subprocess.Popen(
        [sys.executable, "-c", DEFAULT, EXPERIMENTS / "two_processes.sh"],
        env=os.environ | {"PYTHON": str(stub), "REAL": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert [program.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        os.killpg(program.pid, number)  # as a terminal does
        rest = program.communicate(timeout=30)[0]
    assert rest.splitlines() == ["signals: 1"] * 2
    assert program.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
