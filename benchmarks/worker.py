"""A framework in a process of its own, which works each time that the conductor asks for it.

A question is a line "KIND PRECISION BATCH TIMES", such as "step bfloat16 32 20"; the answer a line
of JSON: the seconds it took each time, and the peak memory so far. The kinds are

    step        a training step on a batch that is there
    infer       probabilities of a batch that is there
    epoch       steps over a shuffled set of uint8 pictures
    augmented   the same, and the pictures are changed at random

and the precisions float32, tf32 (where a GPU has it) and bfloat16.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

SIZE = 256


def pictures(n: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Discs on checkered ground: uint8 [n, size, size, 3], masks of 0 and 1 [n, size, size, 1]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 156, (n, size // 8, size // 8, 3), np.uint8)
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(0.3, 0.7, (n, 2, 1, 1)) * size
    radius = rng.uniform(0.1, 0.3, (n, 1, 1)) * size
    disc = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2)[..., None]
    image = coarse.repeat(8, 1).repeat(8, 2) + np.uint8(100) * disc
    return image.astype(np.uint8), disc.astype(np.uint8)


def serve(
    work: Callable[[str, str, int, int], object], peak: Callable[[], int] | None = None
) -> None:
    """Answer the questions on stdin until it ends.

    Args:
        work: does (kind, precision, batch, times), and returns when the results are there.
        peak: bytes; by default the process' largest resident set.
    """
    for line in sys.stdin:
        kind, precision, batch, times = line.split()
        began = time.perf_counter()
        work(kind, precision, int(batch), int(times))
        seconds = (time.perf_counter() - began) / int(times)
        most = peak() if peak else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = {"seconds": seconds, "peak_bytes": most, "clock": time.time()}
        print(json.dumps(answer), flush=True)
