"""Damaged caches of decoded pictures: always the right arrays, and a sound cache afterwards."""

import random
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from flax_unet import data

from .damage import damaged
from .outcome import Outcome
from .pictures import encoded

SIZE = 48  # more than zipfile reads at a time


def run(n: int, seed: int) -> Outcome:
    """Load n times from a damaged cache."""
    outcome, rng, pictures = Outcome(), random.Random(seed), source()
    sound = data.load(pictures, SIZE)
    formats = sound.mask_format, sound.image_format
    with tempfile.TemporaryDirectory() as place:
        data.load(pictures, SIZE, *formats, cache=place)
        (file,) = Path(place).iterdir()
        whole = file.read_bytes()
        for _ in range(n):
            content = damaged([whole], rng)
            file.write_bytes(content)
            with outcome.attempt(content), warnings.catch_warnings():
                warnings.simplefilter("error")
                for _ in range(2):  # the second time what the first one wrote, if it did
                    check(data.load(pictures, SIZE, *formats, cache=place), sound)
                assert list(Path(place).iterdir()) == [file], "half a file is left"
    return outcome


def check(loaded: data.Arrays, sound: data.Arrays) -> None:
    for x, y in ((loaded.image, sound.image), (loaded.mask, sound.mask)):
        assert x.shape == y.shape and x.dtype == y.dtype, f"shape {x.shape}, type {x.dtype}"
        assert (np.asarray(x) == y).all(), "other pixels"
    assert loaded.name == sound.name, "other names"
    assert list(loaded.facts) == list(sound.facts), "other facts"


def source() -> list[dict]:
    rng, found = np.random.default_rng(0), []
    for i in range(2):
        image = Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8))
        mask = Image.fromarray(rng.integers(0, 2, (10, 12), np.uint8))
        pair = {"image": encoded(image, "PNG"), "mask": encoded(mask, "PNG")}
        found.append({"name": f"picture {i}"} | pair)
    return found
