"""What a mesh of one device costs a training step: `python benchmarks/mesh.py`.

Steps of the same network with a mesh of one device and without a mesh, in turn, on batches whose
rows are gathered from a resident data set, as in training. Each network has a line that is printed
again from time to time, so that a run that is stopped has a result, too. The time is that of a
clock, and that of all threads of this process, which other processes disturb less.
"""

import time

import jax
import numpy as np
import optax
from jax.sharding import AxisType

from flax_unet import UNet, data, devices, losses, train


def report(rounds: int, without: np.ndarray, within: np.ndarray) -> None:
    """Print the medians of seconds [rounds, 2], by the clock and of the threads, and of ratios."""
    for i, kind in enumerate(("clock", "threads")):
        a, b = 1e3 * np.median(without[:, i]), 1e3 * np.median(within[:, i])
        low, middle, high = np.percentile(within[:, i] / without[:, i], (25, 50, 75))
        spread = f"{middle:.3f}, quartiles {low:.3f} and {high:.3f}"
        print(
            f"  {rounds} rounds, {kind}: {a:.2f} ms, with mesh {b:.2f} ms, ratio {spread}",
            flush=True,
        )


#: By name: channels per level, side of the images, batch size, steps of a round, rounds.
CASES = {"small": ((8, 16, 32), 32, 8, 5, 80), "large": ((16, 32, 64, 128), 96, 8, 1, 40)}

mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
rng, key, tx = np.random.default_rng(0), jax.random.key(1), optax.adam(1e-3)
for name, (features, side, size, steps, rounds) in CASES.items():
    image = rng.integers(0, 255, (4 * size, side, side, 3), np.uint8)
    mask = rng.integers(0, 2, (4 * size, side, side, 1), np.uint8)
    arrays = data.Arrays(image, mask, [str(i) for i in range(4 * size)], "")
    model = UNet(features=features, norm="batch")
    runs, seconds = {}, {None: [], mesh: []}
    for place in seconds:
        state = train.create_train_state(model, tx, jax.random.key(0), (1, side, side, 3))
        step = train.make_train_step(model, tx, losses.bce, mesh=place)
        batches = list(data.batches(data.to_device(arrays, place), size))
        state = devices.replicate(state, place)
        for batch in batches:  # the first one compiles
            state, _ = step(state, batch, key)
        runs[place] = jax.block_until_ready(state), step, batches
    print(f"{name}: UNet{features}, {size} images of {side}x{side}, {steps} steps a round")
    for i in range(rounds):
        for place in (None, mesh) if i % 2 else (mesh, None):
            state, step, batches = runs[place]
            began = time.perf_counter(), time.process_time()
            for j in range(steps):
                state, _ = step(state, batches[j % len(batches)], key)
            jax.block_until_ready(state)
            ended = time.perf_counter(), time.process_time()
            seconds[place].append([(b - a) / steps for a, b in zip(began, ended, strict=True)])
            runs[place] = state, step, batches
        if (i + 1) % (rounds // 8) == 0:
            report(i + 1, np.array(seconds[None]), np.array(seconds[mesh]))
print(f"jax {jax.__version__}, {jax.devices()}")
