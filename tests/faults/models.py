"""Damaged exported models: what was saved, or a ValueError; no code in them is run."""

import io
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_unet import pack
from flax_unet.model import UNet

from .damage import damaged, damaged_json
from .outcome import Outcome


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def run(n: int, seed: int) -> Outcome:
    """Load n models of which one file is damaged."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder, trace = Path(place, "model"), Path(place, "trace")
        pack.save(folder, model())
        sound, files = pack.load(folder), ("model.json", "weights.npz")
        whole = {name: (folder / name).read_bytes() for name in files}
        content = json.loads(whole["model.json"])
        sources = {
            "model.json": [whole["model.json"]],
            "weights.npz": [whole["weights.npz"], hostile(folder / "weights.npz", trace)],
        }
        for _ in range(n):
            name = rng.choice(files)
            if name == "model.json" and rng.random() < 0.5:
                data = damaged_json(content, rng)
            else:
                data = damaged(sources[name], rng)
            (folder / name).write_bytes(data)
            with outcome.attempt(data, ValueError):
                try:
                    check(pack.load(folder), sound)
                finally:
                    assert not trace.exists(), "the model ran code"
            (folder / name).write_bytes(whole[name])
    return outcome


def model() -> pack.Packed:
    net = UNet(features=(2, 4), norm="batch")
    image, rng = jnp.zeros((1, net.stride, net.stride, 3)), np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), image)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return pack.Packed(net, variables, (16, 32), {"step": 7, "data": {"train": "0" * 8}})


def check(loaded: pack.Packed, sound: pack.Packed) -> None:
    assert loaded.model == sound.model, "another model"
    assert (loaded.image_size, loaded.about) == (sound.image_size, sound.about), "other words"
    assert same_arrays(loaded.variables, sound.variables), "other weights"


def same_arrays(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    return all((x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()) for x, y in pairs)


def hostile(weights: Path, trace: Path) -> bytes:
    """The weights, with one array that is a pickle."""
    arrays = dict(np.load(weights))
    arrays[next(iter(arrays))] = np.array([Bomb(trace)], object)
    np.savez(stream := io.BytesIO(), **arrays)
    return stream.getvalue()
