"""What a mesh of one device costs: `python benchmarks/mesh.py`.

Steps of the same network with a mesh over one device and without a mesh, in turn, on batches whose
rows are gathered from a resident data set, as in training.
"""

import statistics
import time

import jax
import numpy as np
import optax
from jax.sharding import AxisType

from flax_unet import UNet, data, devices, losses, train

ROUNDS, STEPS, SIZE = 15, 10, 96

mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
rng = np.random.default_rng(0)
image = rng.integers(0, 255, (64, SIZE, SIZE, 3), np.uint8)
mask = rng.integers(0, 2, (64, SIZE, SIZE, 1), np.uint8)
arrays = data.Arrays(image, mask, [str(i) for i in range(64)], "")
model, tx, key = UNet(features=(16, 32, 64), norm="batch"), optax.adam(1e-3), jax.random.key(1)

runs = {}
for place in (None, mesh):
    state = train.create_train_state(model, tx, jax.random.key(0), (1, SIZE, SIZE, 3))
    state = devices.replicate(state, place)
    step = train.make_train_step(model, tx, losses.bce, mesh=place)
    batches = list(data.batches(data.to_device(arrays, place), 8))
    state, _ = step(state, batches[0], key)
    runs[place] = [state, step, batches]

seconds = {place: [] for place in runs}
for _ in range(ROUNDS):
    for place, (state, step, batches) in runs.items():
        began = time.perf_counter()
        for i in range(STEPS):
            state, _ = step(state, batches[i % len(batches)], key)
        jax.block_until_ready(state)
        seconds[place].append((time.perf_counter() - began) / STEPS)
        runs[place][0] = state
ratios = sorted(a / b for a, b in zip(seconds[mesh], seconds[None], strict=True))
without, within = (1e3 * statistics.median(seconds[place]) for place in (None, mesh))
low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
print(f"without {without:.1f} ms, with {within:.1f} ms")
print(f"ratio {middle:.3f} ({low:.3f} to {high:.3f}), {ROUNDS} rounds of {STEPS} steps")
