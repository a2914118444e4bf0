"""Trainings killed at any moment: once resumed, they end bit for bit like an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from flax_unet import runs

from .outcome import ROOT, Outcome

EPOCHS = 4


def run(n: int, seed: int) -> Outcome:
    """Kill n trainings, each once or several times."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        draw(root)
        straight, began = root / "straight", time.monotonic()
        finish(start(root, straight))
        seconds, expected = (time.monotonic() - began) / EPOCHS, ended(straight)
        for i in range(n):
            workdir, moments = root / str(i), []
            for _ in range(1 if n == 1 else rng.choice((1, 1, 2, 3))):
                moments.append((rng.randrange(EPOCHS), rng.uniform(0, seconds)))
            with outcome.attempt(f"killed (epochs, seconds later): {moments}", seconds=600):
                for epochs, later in sorted(moments):
                    kill(root, workdir, epochs, later)
                finish(start(root, workdir))
                assert ended(workdir) == expected, "another end"
                assert not list(workdir.rglob("*.part")), "half a file is left"
    return outcome


def draw(root: Path) -> None:
    """Twelve pictures of a bright square on noise, and their masks."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for i in range(12):
        top, left = rng.integers(2, 8, 2)
        mask = np.zeros((16, 16), np.uint8)
        mask[top : top + 6, left : left + 6] = 255
        image = rng.integers(0, 100, (16, 16, 3)) + mask[..., None] // 2
        Image.fromarray(image.astype(np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray(mask).save(root / f"masks/{i}.png")


def flags(root: Path, workdir: Path, epochs: int) -> list[Any]:
    """Of a training on the pictures in `root`."""
    return [
        *("--workdir", workdir, "--dataset", "folder", "--epochs", epochs, "--image-size", 16),
        *("--images", root / "images", "--masks", root / "masks"),
        *("--features", 2, 4, "--batch-size", 4),
    ]


def start(root: Path, workdir: Path) -> subprocess.Popen:
    # A restarted program finds what the first one compiled.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PLATFORMS": "cpu"}
    compiled |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(root)}
    return subprocess.Popen(
        [sys.executable, "-m", "flax_unet_cli", "train", *map(str, flags(root, workdir, EPOCHS))],
        cwd=ROOT,
        env=os.environ | compiled,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    try:
        output, _ = process.communicate()
    finally:  # also if the attempt takes too long
        process.kill()
    assert process.returncode == 0, output


def kill(root: Path, workdir: Path, epochs: int, later: float) -> None:
    """Kill a training so many seconds after it has done so many epochs, or after its start."""
    file, process = workdir / "metrics.jsonl", start(root, workdir)
    while process.poll() is None:
        if epochs == 0 or (file.exists() and file.read_bytes().count(b"\n") >= epochs):
            break
        time.sleep(0.001)
    time.sleep(later)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), output  # 0: it was faster


def ended(workdir: Path) -> tuple:
    """The step, the parameters, and the history without times."""
    trained = runs.load_model(workdir, "latest")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    history = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    leaves = jax.tree.leaves(trained.variables)
    return trained.step, [np.asarray(leaf).tobytes() for leaf in leaves], history
