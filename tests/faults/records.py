"""Damaged metrics.jsonl and config.json: what was recorded, a warning or a ValueError."""

import dataclasses
import json
import random
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_unet import checkpoint, runs
from flax_unet.runs import Places, Settings

from .damage import damaged, damaged_json
from .models import same_arrays
from .outcome import Outcome

ROWS = [{"epoch": i, "loss": i / 7, "seconds": 0.5} for i in (1, 2, 3, 4)]
SETTINGS = Settings(dataset="folder", features=(2, 4), image_size=16, epochs=3)


def run_history(n: int, seed: int) -> Outcome:
    """Read n damaged metrics.jsonl, with and without what the checkpoint has of it."""
    outcome, rng = Outcome(), random.Random(seed)
    sound = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with tempfile.TemporaryDirectory() as place:
        for _ in range(n):
            data = damaged_line(rng) if rng.random() < 0.2 else damaged([sound], rng)
            with outcome.attempt(data):
                check_history(Path(place, "metrics.jsonl"), data, rng.random() < 0.5)
    return outcome


def damaged_line(rng: random.Random) -> bytes:
    lines = [json.dumps(row).encode() for row in ROWS]
    at = rng.randrange(len(ROWS))
    lines[at] = damaged_json(ROWS[at], rng)
    return b"\n".join(lines) + b"\n"


def check_history(file: Path, data: bytes, saved: bool) -> None:
    file.write_bytes(data)
    found = [parsed(line) for line in data.decode(errors="replace").splitlines()[: len(ROWS)]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read = runs.read_history(file.parent, len(ROWS), ROWS if saved else None)
        except ValueError:
            assert not saved, "the checkpoint has it"
            assert file.read_bytes() == data, "refused, but written"
            assert [row.get("epoch") for row in found] != [1, 2, 3, 4], "refused, but sound"
            return
    # repr, since NaN is another value than itself.
    assert repr(read) == repr(ROWS if saved else found), "another history"
    assert bool(caught) == (saved and found != ROWS), "a warning too many or too few"
    assert [parsed(line) for line in file.read_text().splitlines()] == read or not saved
    assert list(file.parent.iterdir()) == [file], "half a file is left"


def parsed(line: str) -> dict:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def run_config(n: int, seed: int) -> Outcome:
    """Read n damaged config.json of a run with a checkpoint."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        workdir = Path(place)
        content, variables = make_run(workdir)
        sound = json.dumps(content).encode()
        for _ in range(n):
            some = rng.random()
            data = damaged_json(content, rng) if some < 0.5 else damaged([sound], rng)
            data = b"" if some > 0.98 else data
            (workdir / "config.json").write_bytes(data)
            with outcome.attempt(data, ValueError, OSError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an empty one is written again
                if rng.random() < 0.8:
                    check_config(workdir, content)
                else:
                    trained = runs.load_model(workdir)
                    assert same_arrays(trained.variables, variables), "other variables"
    return outcome


def check_config(workdir: Path, content: dict) -> None:
    """Who resumes this run resumes exactly this run, or is told the difference."""
    written, _ = runs.check_workdir(workdir, content)
    for section in (*runs.DETERMINES, "places"):
        assert written[section] == content[section], f"another run: {section}"


def make_run(workdir: Path) -> tuple[dict, dict]:
    """A run of one checkpoint, without a training: its config.json and its variables."""
    recipe = runs.recipe_of(SETTINGS)
    training = runs.build(SETTINGS, recipe, 20)
    fingerprints = {split: "0" * 64 for split in ("train", "validation", "test")}
    content = runs.to_json(SETTINGS, Places(workdir), recipe, fingerprints)
    (workdir / "config.json").write_text(json.dumps(content))
    state = runs.create_state(SETTINGS, recipe, training, jax.random.key(0))
    state = dataclasses.replace(state, step=jnp.int32(1))
    with checkpoint.open_checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoint.save(checkpoints, state, {"records": [], "config": content}, dice=0.5)
    return content, state.variables
