"""The worked examples of CONTRIBUTING.md, applied to a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n# (.*?)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The packages with the examples in them, and nothing else."""
    folder = tmp_path_factory.mktemp("project")
    for package in ("flax_unet", "flax_unet_cli", "tfds_kvasir"):
        shutil.copytree(ROOT / package, folder / package)
    places = {"in RECIPES": "RECIPES = {\n", "with the other imports": "import tensorflow_datasets"}
    for where, code in BLOCKS:
        path, _, place = where.partition(", ")
        file = folder / path
        if place:
            text, anchor = file.read_text(), places[place]
            assert text.count(anchor) == 1
            # after the opening of the table, before the other imports
            new = anchor + code if place == "in RECIPES" else code + anchor
            file.write_text(text.replace(anchor, new))
        else:
            file.parent.mkdir()
            (file.parent / "__init__.py").touch()
            (file.parent / "README.md").write_text("Squares.\n")
            file.write_text(code)
    return folder


def test_a_new_recipe_trains_on_a_new_data_set(project, tmp_path):
    assert len(BLOCKS) == 3
    env = os.environ | {"PYTHONPATH": str(project), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    flags = "--recipe small --dataset squares --image-size 32 --epochs 15 --learning-rate 0.02"
    train = f"train --workdir run --data-dir data {flags}"
    for command in (train, "evaluate --workdir run", "export --workdir run --out model"):
        program = [sys.executable, "-m", "flax_unet_cli", *command.split()]
        done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "evaluation-test.json").read_text())["dice_pooled"] > 0.8
