"""Shared by the workers: each runs one framework in a separate process, driven by conductor.py.

A request is a line "KIND PRECISION BATCH TIMES", such as "step bfloat16 32 20". The answer is a
line of JSON: the seconds per repetition, the peak memory so far, and the time of day. The kinds are

    step        a training step on a batch already in memory
    infer       probabilities of a batch already in memory
    epoch       steps over a shuffled set of uint8 images
    augmented   the same, with random augmentation
    classes     a training step with 11 exclusive classes (ours.py only)

and the precisions are float32, tf32 (on GPUs that have it) and bfloat16.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

SIZE = 256


def images(n: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Discs on checkered ground, uint8 [n, size, size, 3]; masks of 0 and 1 [n, size, size, 1]."""
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
    """Answer the requests on stdin until it is closed.

    Args:
        work: performs (kind, precision, batch, times), and returns once the results are computed.
        peak: returns the peak memory in bytes; by default, the largest resident set of the process.
    """
    for line in sys.stdin:
        kind, precision, batch, times = line.split()
        start = time.perf_counter()
        work(kind, precision, int(batch), int(times))
        seconds = (time.perf_counter() - start) / int(times)
        peak_bytes = peak() if peak else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = {"seconds": seconds, "peak_bytes": peak_bytes, "clock": time.time()}
        print(json.dumps(answer), flush=True)
