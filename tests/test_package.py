"""The wheel, which is all that a user without a checkout has; and what imports what."""

import ast
import graphlib
import os
import pydoc
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_unet
from flax_unet.model import UNet
from flax_unet.runs import load_model

ROOT = Path(__file__).parent.parent
FILES = """
    flax_unet/py.typed
    flax_unet/models/LICENSE
    flax_unet/models/pretrained/README.md
    flax_unet/models/strong/README.md
    flax_unet_cli/__main__.py
    flax_unet_cli/serve.html
    tfds_kvasir/kvasir_seg/README.md
    tfds_kvasir/kvasir_seg/TAGS.txt
    tfds_kvasir/kvasir_seg/CITATIONS.bib
    tfds_kvasir/kvasir_seg/checksums.tsv
    tfds_kvasir/kvasir_seg/splits.json
    tfds_kvasir/synthetic_polyps/README.md
    tfds_kvasir/synthetic_polyps/TAGS.txt
""".split()

USE = """
import sys
from pathlib import Path

import flax_unet.model
import tensorflow_datasets as tfds
import tfds_kvasir
from flax_unet_cli import ablate, data_efficiency, evaluate, export, predict, train

site, data_dir = sys.argv[1:]
ours = "flax_unet", "flax_unet_cli", "tfds_kvasir"
files = {name: Path(m.__file__) for name, m in sys.modules.items() if getattr(m, "__file__", None)}
for name, file in files.items():
    if name.split(".")[0] in ours:
        assert Path(site) in file.parents, file
    elif file.is_absolute():  # nothing is imported from a checkout
        assert {Path(p) for p in (sys.prefix, sys.base_prefix)} & {*file.parents}, file

info = tfds.builder("kvasir_seg", data_dir=data_dir).info
assert "Kvasir-SEG" in info.description
assert "@" in info.citation, info.citation

assert tfds.builder("synthetic_polyps", data_dir=data_dir).info.description
"""

LOAD = """
import sys

import flax_unet
import jax

leaves = jax.device_get(jax.tree.leaves(flax_unet.load_model(sys.argv[1]).variables))
print(*sorted(abs(leaf.astype(float)).sum().item() for leaf in leaves))
"""


# The wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel, which is how pip installs a package of pure Python.

    The wheel is made from the sdist, so that the sdist has all that it needs. The build needs no
    network, because the test extra includes Hatchling.
    """
    out, site = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", out, "--target"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True)
    [sdist] = out.iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    subprocess.run([*build, "wheel"], cwd=out / sdist.name.removesuffix(".tar.gz"), check=True)
    [wheel] = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") and wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture
def python(site, tmp_path):
    """Runs Python with the wheel, in an empty folder, and returns the output."""
    folder = tmp_path / "user"
    folder.mkdir()

    def run(*words):
        command = [sys.executable, *map(str, words)]
        env = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_wheel_has_the_packages_and_nothing_else(site):
    *packages, datasets = sorted(path.name for path in site.iterdir())
    library, metadata, programs = packages
    assert (library, programs, datasets) == ("flax_unet", "flax_unet_cli", "tfds_kvasir")
    assert metadata == f"flax_unet-{flax_unet.__version__}.dist-info"
    for license in ("LICENSE", "models/LICENSE"):
        assert (site / metadata / "licenses" / license).read_text() == (ROOT / license).read_text()
    fields = (site / metadata / "METADATA").read_text().splitlines()
    assert "License-Expression: Apache-2.0 AND LicenseRef-Kvasir-SEG" in fields
    assert [*site.rglob("*_test.py"), *site.rglob("dummy_data")] == []
    assert [name for name in FILES if not (site / name).is_file()] == []
    for package in (library, programs, datasets):
        sources = {file.relative_to(ROOT) for file in (ROOT / package).glob("*.py")}
        assert {file.relative_to(site) for file in (site / package).glob("*.py")} == sources
    entry_points = ConfigParser()
    entry_points.read(site / metadata / "entry_points.txt")
    assert {**entry_points["console_scripts"]} == {"flax-unet": "flax_unet_cli.__main__:main"}


def test_wheel_is_what_is_imported_and_knows_its_datasets(site, python, tmp_path):
    python("-c", USE, site, tmp_path / "data")


@pytest.mark.parametrize("name", ["pretrained", "strong"])
def test_a_shipped_model_loads_by_its_name_from_the_wheel_alone(python, name):
    arrays = np.load(ROOT / "models" / name / "weights.npz")
    expected = sorted(abs(arrays[key].astype(float)).sum() for key in arrays)
    sums = [float(word) for word in python("-c", LOAD, name).split()]
    np.testing.assert_allclose(sums, expected, rtol=1e-12)


def test_programs_take_the_name_of_a_shipped_model(python, tmp_path):
    python("-m", "flax_unet_cli", "export", "--model", "strong", "--out", "model")
    written = np.load(tmp_path / "user" / "model" / "weights.npz")
    arrays = np.load(ROOT / "models" / "strong" / "weights.npz")
    assert {*written} == {*arrays}
    assert all((written[name] == arrays[name]).all() for name in arrays)


def test_programs_run_from_the_wheel_alone(python, tmp_path):
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    for i in range(30):
        mask = np.zeros((16, 16), np.uint8)
        mask[i % 8 :, 4:12] = 255
        image = rng.integers(0, 128, (16, 16, 3), np.uint8) + mask[..., None] // 2
        Image.fromarray(image).save(data / "images" / f"{i}.png")
        Image.fromarray(mask).save(data / "masks" / f"{i}.png")
    program = "-m", "flax_unet_cli"
    folders = "--dataset", "folder", "--images", data / "images", "--masks", data / "masks"
    small = "--image-size", "16", "--features", "2", "4", "--epochs", "1"
    assert "epoch 1/1" in python(*program, "train", "--workdir", "run", *folders, *small)
    assert "dice_per_image" in python(*program, "evaluate", "--workdir", "run")
    python(*program, "export", "--workdir", "run", "--out", "model")
    python(*program, "predict", "--model", "model", "--out", "out", data / "images" / "0.png")
    user = tmp_path / "user"
    assert {path.name for path in user.iterdir()} == {"run", "model", "out"}
    assert (user / "run" / "evaluation-test.json").is_file()
    assert Image.open(user / "out" / "0-mask.png").size == (16, 16)


# The map


def test_the_package_imports_nothing_beyond_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import flax_unet; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    names = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "flax_unet" in names and {*names} - sys.stdlib_module_names == {"flax_unet"}


def test_the_network_and_load_model_are_attributes_of_the_package():
    assert flax_unet.UNet is UNet and flax_unet.load_model is load_model
    with pytest.raises(AttributeError, match="module 'flax_unet' has no attribute 'Unet'"):
        flax_unet.Unet  # noqa: B018


def test_every_module_is_in_the_map():
    modules = sorted(file.stem for file in (ROOT / "flax_unet").glob("*.py"))
    assert flax_unet.__doc__ is not None
    named = re.findall(r"^    (\w+) +\S", flax_unet.__doc__, re.MULTILINE)
    assert sorted(["__init__", *named]) == modules


def test_help_of_the_network_begins_with_our_text():
    text = pydoc.render_doc(UNet, renderer=pydoc.plaintext)
    signature, *paragraphs = re.split(r"\n \| *\n", text)
    assert re.search(r"UNet\(\s*(\|\s*)?features: ", signature)
    attributes = next(i for i, text in enumerate(paragraphs) if "Attributes:" in text)
    assert paragraphs[0].startswith(" |  A U-Net: ") and "features: " in paragraphs[attributes]
    assert not any("Module" in text for text in paragraphs[:attributes])


# What imports what


def imports(file):
    """The absolute names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


MODULES = {
    file.stem: imports(file)
    for file in (ROOT / "flax_unet").glob("*.py")
    if file.stem != "__init__"
}
#: {module of flax_unet: the modules of flax_unet that it imports}
GRAPH = {
    module: {other for other in MODULES if f"flax_unet.{other}" in names}
    for module, names in MODULES.items()
}


def below(module):
    """A module, and all of flax_unet that it needs."""
    return {module}.union(*map(below, GRAPH[module]))


def users(package):
    return {m for m, names in MODULES.items() if package in {name.split(".")[0] for name in names}}


def test_imports_form_no_cycle():
    order = [*graphlib.TopologicalSorter(GRAPH).static_order()]
    assert {*order} == MODULES.keys() and order.index("model") < order.index("runs")


@pytest.mark.parametrize("module", ["model", "losses", "metrics"])
def test_network_losses_and_metrics_need_no_pictures_and_no_files(module):
    assert not below(module) & {"data", "pictures", "checkpoint", "runs", "augment"}
    assert not below(module) & (users("PIL") | users("orbax"))


def test_network_losses_and_metrics_load_neither_pillow_nor_orbax():
    code = (
        "import sys; import flax_unet.model, flax_unet.losses, flax_unet.metrics; "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    names = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "flax" in names and not {"PIL", "orbax", "tensorflow_datasets"} & {*names}


def test_only_checkpoint_imports_orbax():
    assert users("orbax") == {"checkpoint"}


@pytest.mark.parametrize("package", ["flax_unet_cli", "experiments", "tfds_kvasir", "tests"])
def test_the_library_imports_neither_programs_nor_datasets(package):
    assert users(package) == set()


def test_the_datasets_import_neither_library_nor_programs():
    for file in (ROOT / "tfds_kvasir").rglob("*.py"):
        packages = {name.split(".")[0] for name in imports(file)}
        assert not packages & {"flax_unet", "flax_unet_cli", "experiments"}, file


def is_sys_path(node):
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"


def test_nothing_changes_where_python_looks_for_modules():
    folders = "flax_unet flax_unet_cli tfds_kvasir experiments benchmarks docs tests".split()
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            changed = []
            if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
                changed = getattr(node, "targets", [getattr(node, "target", None)])
                changed = [part for target in changed for part in ast.walk(target)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                changed = [node.func.value]  # such as sys.path.insert
            assert not any(map(is_sys_path, changed)), f"{file}:{node.lineno}"
