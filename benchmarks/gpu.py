"""Measure flax_unet beside PyTorch on this GPU: `python benchmarks/gpu.py --out FILE`; 8 minutes.

Needs jax, flax, optax, numpy, scipy, pillow, torch and albumentations, and no network. The
article's network at 256x256, dropout and Adam included, asked in turn as in cpu.py. Prints images a
second, what XLA counts of a step against what this card was measured to do, and the time of the
tutorial's 100 epochs; writes all figures to FILE.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the frameworks share the card

from conductor import Figures, Peer, about, measure, save, table  # noqa: E402

IMAGES, EPOCHS = 603, 100  # the tutorial's
STEPS, ROUNDS = 20, 5
PEERS = {
    "flax_unet": ["ours.py", str(IMAGES)],
    "PyTorch, compiled": ["torch_peer.py", "compile", str(IMAGES)],
}
QUESTIONS = [
    *(("step", p, b) for p in ("bfloat16", "tf32", "float32") for b in (8, 32, 128)),
    *(("epoch", "bfloat16", b) for b in (8, 128)),
    *(("augmented", "bfloat16", b) for b in (8, 128)),
]


def ceilings() -> dict[str, float]:
    """What this card can do: TFLOP/s of a large matrix product, TB/s of a large copy."""
    import jax
    import jax.numpy as jnp

    def seconds(work, *arrays) -> float:
        jax.block_until_ready(work(*arrays))
        found = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(10):
                result = work(*arrays)
            jax.block_until_ready(result)
            found.append((time.perf_counter() - began) / 10)
        return statistics.median(found)

    found, n = {}, 8192
    for name, dtype, precision in (
        ("float32", "float32", "highest"),
        ("tf32", "float32", "default"),
        ("bfloat16", "bfloat16", "default"),
    ):
        a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
        product = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
        found[f"{name} TFLOP/s"] = 2 * n**3 / seconds(product, a, b) / 1e12
    x = jax.random.normal(jax.random.key(0), (2**28,))
    found["TB/s"] = 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x) / 1e12
    return found


def counted(precision: str) -> dict[str, float]:
    """What XLA counts for a step of 32 images: TFLOP, and TB read and written."""
    import jax
    import ours

    from flax_unet import data, losses, train

    model = ours.network(precision)
    create = jax.jit(train.create_train_state, static_argnums=(0, 1, 3))
    state = create(model, ours.TX, jax.random.key(0), (1, 256, 256, 3))
    batch = next(data.batches(ours.arrays(32), 32))
    step = train.make_train_step(model, ours.TX, losses.bce)
    cost = step.trace(state, batch, ours.KEY).lower().compile().cost_analysis()
    return {"TFLOP": cost["flops"] / 1e12, "TB": cost["bytes accessed"] / 1e12}


def rates(end: float) -> Figures:
    """Images a second of each question, as many questions as can be asked until a time."""
    peers = {name: Peer(command) for name, command in PEERS.items()}
    found: Figures = {}
    for kind, precision, batch in QUESTIONS:
        if time.time() > end:
            print(f"no time left for {kind} {precision} {batch} and what follows")
            break
        times, images = (STEPS, batch) if kind == "step" else (1, IMAGES)
        asked = dict.fromkeys(peers, f"{kind} {precision} {batch} {times}")
        seconds = measure(peers, asked, ROUNDS)
        task = f"{kind}, {precision}, batch {batch}"
        found[task] = {name: [images / s for s in each] for name, each in seconds.items()}
    for peer in peers.values():
        peer.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="for the comparison")
    options = parser.parse_args()
    figures: dict[str, Any] = {"images a second": rates(time.time() + 60 * options.minutes)}
    save(options.out, figures)
    print(about(), "\n\nimages a second, median:\n\n" + table(figures["images a second"]))

    tutorial = Peer(PEERS["flax_unet"])
    figures["tutorial, s"] = tutorial.first(f"epoch bfloat16 8 {EPOCHS}")
    print(f"\n{EPOCHS} epochs of {IMAGES} images from a cold start: {figures['tutorial, s']:.1f} s")
    tutorial.end()
    figures["ceilings"] = most = ceilings()
    print("this card:", {name: round(value, 2) for name, value in most.items()})
    for precision in ("float32", "tf32", "bfloat16"):
        ours = figures["images a second"].get(f"step, {precision}, batch 32")
        if ours is None:
            continue
        seconds = 32 / statistics.median(ours["flax_unet"])
        figures[f"step, {precision}"] = count = counted(precision)
        arithmetic = count["TFLOP"] / seconds / most[f"{precision} TFLOP/s"]
        traffic = count["TB"] / seconds / most["TB/s"]
        print(f"{precision}, batch 32: {arithmetic:.0%} of the products, {traffic:.0%} of the copy")
    save(options.out, figures)


if __name__ == "__main__":
    main()
