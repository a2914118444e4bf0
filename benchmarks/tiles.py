"""Prediction of a large picture in windows: memory, and speed beside that of plain batches.

    python benchmarks/tiles.py --side 10000

Peak memory is that of the process beyond the picture, its probabilities and the program itself with
one compiled window. Pixels per second count what the network computes, so pixels in the overlap
count several times; windows and plain batches have the same shape, and alternate.
"""

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import tyro

from flax_unet import runs, tiles
from flax_unet.predict import Tiled, predict_proba


@dataclass
class Flags:
    model: Path = Path("models/strong")
    side: int = 10_000
    """Height and width of the picture."""
    part: int = 1500
    """Height and width of the part on which the speed is compared."""
    rounds: int = 5


def peak() -> float:
    """GiB of this process so far, at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def seconds(model, variables, image) -> float:
    began = time.perf_counter()
    np.asarray(predict_proba(model, variables, image))
    return time.perf_counter() - began


def main(flags: Flags) -> None:
    trained = runs.load_model(flags.model)
    network, variables, size = trained.model, trained.variables, trained.settings.size
    tiled = Tiled(network, size, progress=True)
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (tiled.batch_size, *size, 3), np.uint8)
    part = rng.integers(0, 256, (flags.part, flags.part, 3), np.uint8)
    for model, image in ((network, batch), (tiled, part)):
        seconds(model, variables, image)
    windows = prod(
        len(
            tiles.starts(
                flags.part, side, side // 2 // network.stride * network.stride, network.stride
            )
        )
        for side in size
    )
    ratios = []
    for _ in range(flags.rounds):
        in_windows = windows / seconds(tiled, variables, part)
        plain = [
            len(batch) / seconds(network, variables, batch) for _ in range(windows // len(batch))
        ]
        alone = statistics.mean(plain)
        ratios.append(in_windows / alone)
        print(f"windows per second: {in_windows:.2f} in a picture, {alone:.2f} in plain batches")
    print(
        f"ratio of speeds: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    before = peak()
    picture = rng.integers(0, 256, (flags.side, flags.side, 3), np.uint8)
    took = seconds(tiled, variables, picture)
    result = 4 * network.num_classes * flags.side**2
    beyond = peak() - before - (picture.nbytes + result) / 2**30
    print(
        f"{flags.side} x {flags.side}: {took:.0f} s, {before:.2f} GiB before, {beyond:.2f} beyond"
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
