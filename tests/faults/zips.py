"""Damaged zips of Kvasir-SEG: the same examples, or a ValueError and nothing left behind."""

import random
import tempfile
from pathlib import Path

import tfds_kvasir
from tfds_kvasir.kvasir_seg.dummy_data.draw import draw_zip
from tfds_kvasir.kvasir_seg.kvasir_seg_dataset_builder import Protocol

from .damage import damaged
from .outcome import Outcome

PROTOCOL = Protocol(name="faults", splits={"train": ["disc", "pair"], "test": ["flat"]})


def run(n: int, seed: int) -> Outcome:
    """Prepare the data set from n damaged zips."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "kvasir-seg.zip")
        draw_zip(file, size=(8, 10))
        whole = file.read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            sound = prepare(file, Path(folder))
        for _ in range(n):
            data = damaged([whole], rng)
            file.write_bytes(data)
            with tempfile.TemporaryDirectory() as folder, outcome.attempt(data):
                check(file, Path(folder), sound)
                assert list(Path(place).iterdir()) == [file], "written outside data_dir"
    return outcome


def prepare(file: Path, folder: Path) -> dict[str, list[dict]]:
    opened = tfds_kvasir.sources("kvasir_seg", PROTOCOL, data_dir=folder, kvasir_zip=file)
    return {split: list(source) for split, source in opened.items()}


def check(file: Path, folder: Path, sound: dict[str, list[dict]]) -> None:
    try:
        found = prepare(file, folder)
    except ValueError as error:
        assert str(file) in str(error), f"does not name the zip: {error}"
        for pattern in ("*1.0.0*", "*incomplete*", "*record*"):
            assert not list(folder.rglob(pattern)), "something half-made is left"
        return
    assert found == sound, "other examples"
