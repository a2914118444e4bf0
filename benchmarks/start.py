"""Measure start-up, decoding and memory: `python benchmarks/start.py`; five minutes.

Compile time of a training step of the tutorial's network, with and without the compilation cache of
an earlier start; pictures decoded and resized per second, by `flax_unet.data.load` and by PyTorch's
DataLoader with Pillow, in turn; and the memory of a process that trains at 1024x1024 with batch 1.
"""

import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from conductor import ratio
from PIL import Image
from worker import images

PICTURES, SIDE, SIZE, ROUNDS = 200, 600, 256, 7


def compile_step(size: int, batch: int) -> tuple[Callable[[], object], float]:
    """A function that takes a training step of the tutorial's network, and its compile time."""
    import jax
    import optax

    from flax_unet import losses, train
    from flax_unet.model import ARTICLE

    tx, key = optax.adam(1e-3), jax.random.key(0)
    state = train.create_train_state(ARTICLE, tx, key, (1, size, size, 3))
    image, mask = images(batch, size)
    arrays = {"image": image, "mask": mask, "weight": np.ones(batch, np.float32)}
    start = time.perf_counter()
    step = train.make_train_step(ARTICLE, tx, losses.bce).lower(state, arrays, key).compile()
    seconds = time.perf_counter() - start

    def take() -> None:
        nonlocal state
        state, metrics = step(state, arrays, key)
        jax.block_until_ready(metrics)

    return take, seconds


def compile_seconds() -> float:
    return compile_step(256, 8)[1]


def peak_gib() -> float:
    """Peak memory of this process after three steps, in GiB."""
    take, _ = compile_step(1024, 1)
    for _ in range(3):
        take()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def child(function: Callable[[], float], cache: str = "") -> float:
    """The value that a function of this file returns in a new process."""
    caching = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    environment = os.environ | (caching if cache else {})
    command = [sys.executable, __file__, function.__name__]
    return float(
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    )


def make_source() -> list[dict[str, Any]]:
    """Synthetic pictures: images as JPEG and their masks as PNG."""

    def encode(array: Any, kind: str) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, kind)
        return stream.getvalue()

    pairs = zip(*images(PICTURES, SIDE), strict=True)
    return [
        {"name": str(i), "image": encode(image, "jpeg"), "mask": encode(255 * mask[..., 0], "png")}
        for i, (image, mask) in enumerate(pairs)
    ]


def ours(source: Sequence[dict[str, Any]]) -> None:
    from flax_unet import data

    data.load(source, SIZE)


def pytorch_loader(source: Sequence[dict[str, Any]]) -> None:
    from torch.utils.data import DataLoader, Dataset

    class Pairs(Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
            image = Image.open(io.BytesIO(source[i]["image"])).convert("RGB")
            mask = Image.open(io.BytesIO(source[i]["mask"])).convert("L")
            bilinear, box = Image.Resampling.BILINEAR, Image.Resampling.BOX
            return (
                np.array(image.resize((SIZE, SIZE), bilinear)),
                np.array(mask.resize((SIZE, SIZE), box)) > 127,
            )

    for _ in DataLoader(Pairs(), 8, num_workers=os.cpu_count() or 1):
        pass


def rate(load: Callable[[Sequence[dict[str, Any]]], None], source: list[dict[str, Any]]) -> float:
    start = time.perf_counter()
    load(source)
    return len(source) / (time.perf_counter() - start)


def main() -> None:
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # unless `child` sets it
    with tempfile.TemporaryDirectory() as folder:
        cold, cached = [], []
        child(compile_seconds, folder)
        for _ in range(ROUNDS):
            cold.append(child(compile_seconds))
            cached.append(child(compile_seconds, folder))
    print(f"compile, s: cold {statistics.median(cold):.1f} ({min(cold):.1f} to {max(cold):.1f})")
    print(f"from the cache: {statistics.median(cached):.1f} ({min(cached):.1f}-{max(cached):.1f})")
    source = make_source()
    rates = {load: [] for load in (ours, pytorch_loader)}
    for i in range(ROUNDS):
        for load in (ours, pytorch_loader) if i % 2 == 0 else (pytorch_loader, ours):
            rates[load].append(rate(load, source))
    for load, values in rates.items():
        print(f"{load.__name__}: {statistics.median(values):.0f} pictures per second")
    print(f"ours / pytorch_loader: {ratio(rates[ours], rates[pytorch_loader])}")
    print(f"memory at 1024x1024, batch 1: {child(peak_gib):.2f} GiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(globals()[sys.argv[1]]())
    else:
        main()
