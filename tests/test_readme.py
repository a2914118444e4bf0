"""Every code block of README.md runs: Python unchanged, commands with short trainings."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]

# Stubs for the commands: the programs run for one epoch of a small network, nothing is installed.
SHORT = "--image-size 32 --epochs 1"
COMMANDS = {
    "python": f"""
case "$*" in
  *--recipe*) set -- "$@" {SHORT};;
  *train.py*) set -- "$@" {SHORT} --features 8 16;;
esac
exec "{sys.executable}" "$@\"""",
    "make": f'exec "{shutil.which("make")}" --dry-run --directory "{ROOT}" "$@"',
    "pip": 'echo "$@" >> pip.log',
    "git": 'mkdir "$3"',  # git clone URL FOLDER
}


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with the experiments and with pictures, and a user's environment."""
    tmp_path = tmp_path_factory.mktemp("user")
    for folder in ("experiments", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    rng = np.random.default_rng(0)
    for folder in ("my", "other"):
        for part in ("images", "masks"):
            (tmp_path / folder / part).mkdir(parents=True)
        for i in range(30):
            mask = np.zeros((32, 32), np.uint8)
            mask[i % 8 : 16, 4:20] = 255
            image = rng.integers(0, 128, (32, 32, 3), np.uint8) + mask[..., None] // 2
            Image.fromarray(image).save(tmp_path / folder / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / folder / "masks" / f"{i}.png")
    shutil.copytree(tmp_path / "my" / "images", tmp_path / "pictures")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(stat.S_IRWXU)
    path = f"{programs}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    env["TFDS_DATA_DIR"] = str(tmp_path / "tfds")
    return tmp_path, env


def run(command, user):
    folder, env = user
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs_kvasir(code):
    return "kvasir_seg" in code or ("train.py" in code and "--dataset" not in code)


def cases(blocks):
    return [pytest.param(code, id=code.strip().splitlines()[-1][:50]) for code in blocks]


@pytest.mark.parametrize("code", cases(PYTHON))
def test_python(code, user):
    if needs_kvasir(code) and "KVASIR_SEG_ZIP" not in os.environ:
        pytest.skip("KVASIR_SEG_ZIP is not set to the archive")
    output = run([sys.executable, "-c", code], user)
    if "Dice" in code:
        assert float(output.split()[-1]) > 0.3


@pytest.mark.parametrize("code", cases(SHELL))
def test_commands(code, user):
    folder, env = user
    if needs_kvasir(code):
        if "KVASIR_SEG_ZIP" not in os.environ:
            pytest.skip("KVASIR_SEG_ZIP is not set to the archive")
        if not (folder / "kvasir-seg.zip").exists():
            (folder / "kvasir-seg.zip").symlink_to(Path(os.environ["KVASIR_SEG_ZIP"]).resolve())
    run(["bash", "-e", "-c", code], user)
    if "predict.py" in code:
        (out,) = re.findall(r"--out (\S+)", code)
        assert (folder / out / "0-mask.png").exists()
    if "evaluate.py" in code:
        assert list(folder.glob("runs/**/evaluation-*.json"))


def test_the_extras_it_names_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = set(re.findall(r'pip install "\.\[(\w+)\]', (ROOT / "README.md").read_text()))
    assert named and named <= set(extras) and {"cuda12", "cuda13", "tpu"} <= set(extras)
