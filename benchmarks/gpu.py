"""Compare flax_unet with PyTorch on this GPU: `python benchmarks/gpu.py --out FILE`.

Needs jax, flax, optax, numpy, scipy, pillow, torch and albumentations, and no network access. The
network is the tutorial's at 256x256, dropout and Adam included; the frameworks are measured in turn
as in cpu.py. Prints images per second, the operations and memory traffic of a step as fractions of
this card's measured peak, and the time of the tutorial's 100 epochs; writes all results to FILE.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the frameworks share the card

from conductor import Results, Worker, about, measure, save, table  # noqa: E402

IMAGES, EPOCHS = 603, 100  # the tutorial's
STEPS, ROUNDS = 20, 5
PEERS = {
    "flax_unet": ["ours.py", str(IMAGES)],
    "PyTorch, compiled": ["torch_peer.py", "compile", str(IMAGES)],
}
TASKS = [
    *(("step", p, b) for p in ("bfloat16", "tf32", "float32") for b in (8, 32, 128)),
    *(("epoch", "bfloat16", b) for b in (8, 128)),
    *(("augmented", "bfloat16", b) for b in (8, 128)),
]


def measured_peaks() -> dict[str, float]:
    """Measured peak of this card: TFLOP/s of a large matrix product, TB/s of a large copy."""
    import jax
    import jax.numpy as jnp

    def seconds(work, *arrays) -> float:
        jax.block_until_ready(work(*arrays))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(10):
                result = work(*arrays)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / 10)
        return statistics.median(times)

    peaks, n = {}, 8192
    for name, dtype, precision in (
        ("float32", "float32", "highest"),
        ("tf32", "float32", "default"),
        ("bfloat16", "bfloat16", "default"),
    ):
        a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in (0, 1))
        product = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
        peaks[f"{name} TFLOP/s"] = 2 * n**3 / seconds(product, a, b) / 1e12
    x = jax.random.normal(jax.random.key(0), (2**28,))
    peaks["TB/s"] = 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x) / 1e12
    return peaks


def step_cost(precision: str) -> dict[str, float]:
    """XLA's cost estimate of a step on 32 images: TFLOP, and TB read and written."""
    import jax
    import ours

    from flax_unet import data, losses, train

    state = ours.initial_state(precision)
    batch = next(data.batches(ours.arrays(32), 32))
    step = train.make_train_step(ours.network(precision), ours.TX, losses.bce)
    bytes_accessed = step.trace(state, batch, ours.KEY).lower().compile().cost_analysis()
    # For a GPU the convolutions are calls of cuDNN, whose operations XLA does not know.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        state, batch = jax.device_get((state, batch))
        flops = step.trace(state, batch, ours.KEY).lower().cost_analysis()
    return {"TFLOP": flops["flops"] / 1e12, "TB": bytes_accessed["bytes accessed"] / 1e12}


def rates(end: float) -> Results:
    """Images per second in each of TASKS, for as many tasks as start before the time `end`."""
    workers = {name: Worker(command) for name, command in PEERS.items()}
    results: Results = {}
    for kind, precision, batch in TASKS:
        if time.time() > end:
            print(f"no time left for {kind} {precision} {batch} and the tasks after it")
            break
        times, images = (STEPS, batch) if kind == "step" else (1, IMAGES)
        requests = dict.fromkeys(workers, f"{kind} {precision} {batch} {times}")
        seconds = measure(workers, requests, ROUNDS)
        task = f"{kind}, {precision}, batch {batch}"
        results[task] = {name: [images / s for s in values] for name, values in seconds.items()}
    for worker in workers.values():
        worker.end()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="time for the comparison")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"images per second": rates(time.time() + 60 * options.minutes)}
    save(options.out, results)
    print(about(), "\n\nimages per second, median:\n\n" + table(results["images per second"]))

    tutorial = Worker(PEERS["flax_unet"])
    results["tutorial, s"] = tutorial.first(f"epoch bfloat16 8 {EPOCHS}")
    print(f"\n{EPOCHS} epochs of {IMAGES} images from a cold start: {results['tutorial, s']:.1f} s")
    tutorial.end()
    results["peaks"] = peaks = measured_peaks()
    print("measured peak:", {name: round(value, 2) for name, value in peaks.items()})
    for precision in ("float32", "tf32", "bfloat16"):
        ours = results["images per second"].get(f"step, {precision}, batch 32")
        if ours is None:
            continue
        seconds = 32 / statistics.median(ours["flax_unet"])
        results[f"step, {precision}"] = cost = step_cost(precision)
        compute = cost["TFLOP"] / seconds / peaks[f"{precision} TFLOP/s"]
        memory = cost["TB"] / seconds / peaks["TB/s"]
        print(f"{precision}, batch 32: {compute:.0%} of peak TFLOP/s, {memory:.0%} of peak TB/s")
    save(options.out, results)


if __name__ == "__main__":
    main()
