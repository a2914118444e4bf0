"""Documents and their code blocks, which the tests run as a user would, with short trainings."""

import importlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
#: A fenced block: its language, what follows that, and the code.
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# A training is short: one epoch of a small network.
_SHORTEN = """
case "$*" in *--crop*) ;; *) set -- "$@" --image-size 32;; esac
case "$*" in *pretrained*) ;; *) set -- "$@" --features 8 16;; esac
set -- "$@" --epochs 1
"""
#: Stubs for the commands: nothing is installed, built or downloaded.
COMMANDS = {
    "python": f"""
case "$*" in *train.py*) {_SHORTEN} ;; esac
exec "{sys.executable}" "$@\"""",
    "flax-unet": f"""
case "$1" in train) {_SHORTEN} ;; esac
exec "{sys.executable}" -m flax_unet_cli "$@\"""",
    "make": f'exec "{shutil.which("make")}" --dry-run --directory "{ROOT}" "$@"',
    "pip": 'echo "$@" >> pip.log',
    # git clone URL FOLDER, in which make will not install anything
    "git": 'mkdir -p "$3/.venv/bin" && touch "$3/.venv/bin/activate"',
}

User = tuple[Path, dict[str, str]]


def blocks(file: Path, language: str) -> list[str]:
    """The code of a document's blocks in a language, in order."""
    return [code for name, _, code in FENCE.findall(file.read_text()) if name == language]


def prose(file: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", file.read_text())


def cases(codes: list[str]) -> list:
    """A parameter of a test for each block, named by its last line."""
    return [pytest.param(code, id=code.strip().splitlines()[-1][:50]) for code in codes]


def make_user(folder: Path) -> User:
    """A folder with the experiments and with pictures, and the environment of a user in it."""
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (folder / "models").mkdir()  # into which a block may export another one
    for name in ("pretrained", "strong"):
        (folder / "models" / name).symlink_to(ROOT / "models" / name)
    rng = np.random.default_rng(0)
    for name in ("my", "other"):
        for i in range(30):
            mask = np.zeros((32, 32), np.uint8)
            mask[i % 8 : 16, 4:20] = 255
            image = rng.integers(0, 128, (32, 32, 3), np.uint8) + mask[..., None] // 2
            save(folder / name / "images" / f"{i}.png", image)
            save(folder / name / "masks" / f"{i}.png", mask)
    for i in range(3):
        save(folder / "pictures" / f"{i}.png", rng.integers(0, 255, (40, 48, 3), np.uint8))
    (programs := folder / "bin").mkdir()
    for name, body in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(stat.S_IRWXU)
    path = f"{programs}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    return folder, env | {"TFDS_DATA_DIR": str(folder / "tfds")}


def save(file: Path, array: np.ndarray) -> None:
    """Write a picture, and the folders that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def run(command: list[str], user: User) -> str:
    """What a command of a user prints, which must succeed."""
    folder, env = user
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs_kvasir(code: str) -> bool:
    """Whether a block needs the archive of Kvasir-SEG."""
    trains = "train.py" in code or "flax-unet train" in code
    return "kvasir_seg" in code or (trains and "--dataset" not in code)


def check_flags(code: str) -> None:
    """Check that the flags of a block's commands exist, without running the commands."""
    for line in code.replace("\\\n", "").splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "flax-unet":
            module = importlib.import_module(f"flax_unet_cli.{words[0].replace('-', '_')}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "run", lambda options: 0)
                assert module.main(words[1:]) == 0, line


def skip_without_kvasir(code: str, user: User) -> None:
    """Name the archive to the user's programs if a block needs it, or skip the test."""
    if not needs_kvasir(code):
        return
    if "KVASIR_SEG_ZIP" not in os.environ:
        check_flags(code)
        pytest.skip("KVASIR_SEG_ZIP is not set to the archive")
    user[1]["KVASIR_SEG_ZIP"] = str(Path(os.environ["KVASIR_SEG_ZIP"]).resolve())
