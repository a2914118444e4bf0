"""notebooks/colab.ipynb runs from top to bottom on a CPU, and jupytext makes it from colab.py."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SCRIPT, NOTEBOOK = FOLDER / "colab.py", FOLDER / "colab.ipynb"


def cell(beginning):
    """The source of the code cell in which a line begins with this text."""
    cells = [x.source for x in jupytext.read(SCRIPT).cells if x.cell_type == "code"]
    (source,) = [x for x in cells if re.search(f"^{re.escape(beginning)}", x, re.MULTILINE)]
    return source


def test_it_is_made_from_the_script():
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    ours, theirs = ([(x.cell_type, x.source) for x in n.cells] for n in (script, notebook))
    assert ours == theirs, "make notebook writes colab.ipynb again"
    back, text = jupytext.writes(notebook, fmt="py:percent"), SCRIPT.read_text()
    assert back.split("# ---\n")[2:] == text.split("# ---\n")[2:]  # after the header


def test_it_has_no_outputs_and_nothing_of_a_machine():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["metadata"].keys() == {"accelerator", "colab", "jupytext", "kernelspec"}
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "name": "python3"}
    assert "version" not in str(notebook["metadata"])
    for content in notebook["cells"]:
        assert content["metadata"] == {}
        if content["cell_type"] == "code":
            assert content["outputs"] == [] and content["execution_count"] is None
    assert not re.search("/(root|home|tmp|Users|work)/", NOTEBOOK.read_text())


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The executed cells by the first line of their code, and the folder in which they ran."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = jupytext.read(SCRIPT)
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | environment)  # raises the error of a cell that fails
    return {x.source: x.outputs for x in notebook.cells if x.cell_type == "code"}, folder


def text_of(outputs):
    return "".join(x.text for x in outputs if x.output_type == "stream")


def pictures_in(outputs):
    return sum("image/png" in x.get("data", {}) for x in outputs)


def test_every_cell_with_pictures_shows_one(executed):
    cells, _ = executed
    showing = [x for x in cells if re.search(r"^(show\(|display\.Image|with live_)", x, re.M)]
    assert len(showing) == 7
    for source in showing:
        assert pictures_in(cells[source]) == 1, source


def test_it_runs_on_the_packages_that_are_there(executed):
    cells, _ = executed
    assert f"'jax': '{jax.__version__}'" in text_of(cells[cell("before = versions()")])
    assert "Change runtime type" in text_of(cells[cell("print(jax.devices())")])


def test_its_runs_are_ordinary_and_good(executed):
    cells, folder = executed
    for name, at_least in {"synthetic_polyps": 0.7, "synthetic_cells": 0.6}.items():
        workdir = folder / "runs" / name
        assert json.loads((workdir / "evaluation-test.json").read_text())["dice_pooled"] > at_least
        assert (workdir / "config.json").exists() and (workdir / "checkpoints").is_dir()
    assert (folder / "runs.zip").exists()
    assert len(list((folder / "runs" / "own-masks").glob("*-mask.png"))) == 3
    assert not (folder / "runs" / "own").exists()  # --dry-run writes nothing


def test_it_resumes_bit_for_bit(executed):
    cells, _ = executed
    stopped = text_of(cells[cell("def press_stop")])
    assert "SIGINT: the state is saved" in stopped and "resuming after step" in stopped
    assert "equal bit for bit: True" in text_of(cells[cell('run(f"train --workdir {whole}')])


def test_a_program_that_fails_stops_it(tmp_path, capfd):
    scope = {"Path": Path}
    exec(cell("def run"), scope)
    with pytest.raises(RuntimeError, match="flax-unet train failed.* exit code 1"):
        scope["run"](f"train --workdir {tmp_path}/run --dataset nothing")
    assert "there is no data set 'nothing'" in capfd.readouterr().err
    with pytest.raises(SystemExit):  # of a flag that does not exist
        scope["run"](f"train --workdir {tmp_path}/run --nothing")


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """A stand-in for google.colab; the list of what was called."""
    called: list[str] = []

    def upload():
        called.append("upload")
        return {"an upload.zip": b""}

    module = SimpleNamespace(
        files=SimpleNamespace(upload=upload),
        drive=SimpleNamespace(mount=lambda where: called.append(f"mount {where}")),
    )
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVASIR_SEG_ZIP", "")
    return called


@pytest.mark.parametrize(
    ("data", "save", "calls", "zip_file", "runs"),
    [
        ("synthetic_polyps", False, [], "", "runs"),
        ("kvasir_seg", False, [], "", "runs"),
        ("upload", False, ["upload"], "{cwd}/an upload.zip", "runs"),
        (
            "drive",
            False,
            ["mount /content/drive"],
            "/content/drive/MyDrive/kvasir-seg.zip",
            "runs",
        ),
        (
            "synthetic_polyps",
            True,
            ["mount /content/drive"],
            "",
            "/content/drive/MyDrive/flax-unet",
        ),
    ],
)
def test_where_colab_users_get_the_data(colab, tmp_path, data, save, calls, zip_file, runs):
    assert data in cell("DATA =").partition("@param")[2]
    scope = {"DATA": data, "SAVE_IN_DRIVE": save}
    exec(cell("RUNS ="), scope)
    assert colab == calls and scope["RUNS"] == Path(runs)
    assert os.environ["KVASIR_SEG_ZIP"] == zip_file.format(cwd=tmp_path)
