"""The wheel: what a user gets who has no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = """
    flax_unet/py.typed
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

site, data_dir = sys.argv[1:]
for package in (flax_unet, tfds_kvasir):
    assert Path(package.__file__).parent.parent == Path(site), package

info = tfds.builder("kvasir_seg", data_dir=data_dir).info
assert "Kvasir-SEG" in info.description
assert "@" in info.citation, info.citation

assert tfds.builder("synthetic_polyps", data_dir=data_dir).info.description
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel in it, as pip installs one of pure Python: unpacked.

    The build needs no network: Hatchling is one of the test extra's packages.
    """
    out, site = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(build, cwd=ROOT, check=True)
    [wheel] = out.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_wheel_has_the_packages_and_nothing_else(site):
    package, metadata, datasets = sorted(path.name for path in site.iterdir())
    assert (package, datasets) == ("flax_unet", "tfds_kvasir")
    assert metadata.startswith("flax_unet-") and metadata.endswith(".dist-info")
    assert (site / metadata / "licenses" / "LICENSE").is_file()
    assert [*site.rglob("*_test.py"), *site.rglob("dummy_data")] == []
    assert [name for name in FILES if not (site / name).is_file()] == []


def test_wheel_knows_its_datasets(site, tmp_path):
    path = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run(
        [sys.executable, "-c", USE, site, tmp_path / "data"], cwd=tmp_path, env=path, check=True
    )
