"""Every code block of README.md runs: Python unchanged, commands with short trainings."""

import re
import sys
import tomllib

import pytest
from documents import ROOT, blocks, cases, make_user, run, skip_without_kvasir

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    return make_user(tmp_path_factory.mktemp("user"))


@pytest.mark.parametrize("code", cases(blocks(README, "python")))
def test_python(code, user):
    skip_without_kvasir(code, user)
    output = run([sys.executable, "-c", code], user)
    if "Dice" in code:
        assert float(output.split()[-1]) > 0.3


@pytest.mark.parametrize("code", cases(blocks(README, "bash")))
def test_commands(code, user):
    skip_without_kvasir(code, user)
    run(["bash", "-e", "-c", code], user)
    for out in re.findall(r"predict .*--out (\S+)", code):
        assert (user[0] / out / "0-mask.png").exists()
    if "evaluate" in code:
        (workdir,) = set(re.findall(r"evaluate --workdir (\S+)", code))
        assert list((user[0] / workdir).glob("evaluation-*.json"))


def test_it_is_short_and_names_extras_that_exist():
    text = README.read_text()
    assert len(text.splitlines()) < 180
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = set(re.findall(r'pip install "\.\[(\w+)\]', text))
    assert named and named <= set(extras) and {"cuda12", "cuda13", "tpu"} <= set(extras)
