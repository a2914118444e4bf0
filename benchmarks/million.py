"""How soon a training on 1,000,000 streamed pictures starts: `python benchmarks/million.py`.

Each picture is drawn and encoded when it is asked for. A training is started, and once more as if
it went on in the middle of its epoch. Seconds are from the start of this program, or of the second
training, to its first step. Most of them go into compiling the step, which a second run of this
program finds compiled, like `flax-unet train`.
"""

import io
import itertools
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

BEGAN = time.perf_counter()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from PIL import Image  # noqa: E402

from flax_unet import UNet, data, losses, train  # noqa: E402
from flax_unet.fit import fit  # noqa: E402
from flax_unet.formats import BINARY  # noqa: E402
from flax_unet.images import RGB  # noqa: E402
from flax_unet_cli import program  # noqa: E402

N, SIDE, BATCH, STEPS = 1_000_000, 96, 8, 100


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


class Discs(Sequence):
    """A bright disc on noise in each picture."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        y, x = np.mgrid[:SIDE, :SIDE] - rng.integers(20, SIDE - 20, (2, 1, 1))
        mask = (y**2 + x**2 < 15**2).astype(np.uint8)
        image = rng.integers(0, 100, (SIDE, SIDE, 3)) + 100 * mask[..., None]
        return {"name": str(i), "image": encode(image.astype(np.uint8)), "mask": encode(mask)}


def run(began: float, done: int) -> None:
    """Train for some steps, from the middle of an epoch if some are done, and print when."""
    model, tx, times = UNet(features=(16, 32, 64)), optax.adam(1e-3), []
    state = train.create_train_state(model, tx, jax.random.key(0), (1, SIDE, SIDE, 3))
    state = replace(state, step=jnp.asarray(done, jnp.int32))
    record = {"loss": 0.7, "update_norm": 0.1, "iou_coef": 0.1, "confusion": [[1] * BATCH] * 4}
    stream = partial(data.stream, Discs(), SIDE, BATCH, mask_format=BINARY, image_format=RGB)
    epochs = fit(
        *(model, tx, losses.bce, state, N, stream),
        key=jax.random.key(1),
        seed=0,
        epochs=1,
        batch_size=BATCH,
        records=list(itertools.repeat(record, done)),
        on_step=lambda *_: times.append(time.perf_counter()),
        stop=lambda: len(times) >= STEPS,
    )
    for _ in epochs:
        pass
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rate = BATCH * (len(times) - 1) / (times[-1] - times[0])
    print(
        f"from step {done:,}: the first step after {times[0] - began:.1f} s, {rate:.0f} images a "
        f"second, at most {gigabytes:.2f} GB",
        flush=True,
    )


program.keep_compiled()
run(BEGAN, 0)
run(time.perf_counter(), 100_000)
