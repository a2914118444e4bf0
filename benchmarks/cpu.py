"""Compare flax_unet with Keras and PyTorch on this CPU: `python benchmarks/cpu.py --out FILE`.

The network is the tutorial's (11,707,729 parameters) at 256x256, dropout and Adam included. Each
framework has a separate process and uses all cores. They are measured in turn, A B C C B A, so that
a busy machine slows all of them alike. Inference is measured in processes that do nothing else, as
in a program that predicts: PyTorch's inference is faster after a training step, because it reuses
the memory of that step. ONNX Runtime and OpenVINO compute the network that `flax_unet.onnx_file`
wrote. Prints the tables of docs/benchmarks.md and writes all results to FILE; `--only inference`
leaves training out.
"""

import argparse
import platform
from pathlib import Path

from conductor import Results, Worker, about, measure, ratio, ratios, save, table

IMAGES = 32
OURS = "flax_unet"
PEERS = {
    OURS: (["ours.py", str(IMAGES)], "float32"),
    "Keras, TensorFlow": (["keras_peer.py", str(IMAGES)], "float32"),
    "PyTorch": (["torch_peer.py", "eager", str(IMAGES)], "float32"),
    "PyTorch, compiled": (["torch_peer.py", "compile", str(IMAGES)], "float32"),
    "PyTorch, bfloat16": (["torch_peer.py", "eager", str(IMAGES)], "bfloat16"),
}
ONNX = "ONNX Runtime"
#: Peers that cannot train.
PREDICTORS = {
    ONNX: (["onnx_peer.py", "onnxruntime"], "float32"),
    "OpenVINO": (["onnx_peer.py", "openvino"], "float32"),
    "OpenVINO, default": (["onnx_peer.py", "openvino"], "default"),
}
ALL = PEERS | PREDICTORS
STEPS = IMAGES // 8  # of an epoch
#: {task: the request, without its precision}
INFERENCE = {"inference, batch 1": "infer {} 1 16", "inference, batch 8": "infer {} 8 4"}
TRAINING = {
    "training step, batch 8": "step {} 8 3",
    f"epoch, {IMAGES} images": "epoch {} 8 1",
    f"epoch, {IMAGES} images, augmented": "augmented {} 8 1",
}


def requests(names: list[str], template: str) -> dict[str, str]:
    return {name: template.format(ALL[name][1]) for name in names}


def inference(names: list[str], rounds: int) -> Results:
    workers = {name: Worker(ALL[name][0]) for name in names}
    results = {
        task: measure(workers, requests(names, template), rounds)
        for task, template in INFERENCE.items()
    }
    for worker in workers.values():
        worker.end()
    return results


def training(names: list[str], rounds: int) -> tuple[Results, Results]:
    """The times of all frameworks, and what an epoch and classes add to our steps."""
    workers, starts, memory = {}, {}, {}
    for name in names:  # one after the other, each alone on the machine
        workers[name] = Worker(PEERS[name][0])
        starts[name] = [workers[name].first(f"step {PEERS[name][1]} 8 1")]
        memory[name] = [workers[name].peak / 1e6]
    results = {"cold start to the first step": starts, "peak memory after it, MB": memory}
    for task, template in TRAINING.items():
        results[task] = measure(workers, requests(names, template), rounds)
    # Is training input-bound, and what do 11 classes cost? Compare an epoch, and steps with
    # classes, with steps on a batch in memory, alternating.
    kinds = {"bare": f"step float32 8 {STEPS}", "classes": f"classes float32 8 {STEPS}"}
    kinds |= {kind: f"{kind} float32 8 1" for kind in ("epoch", "augmented")}
    times = measure(dict.fromkeys(kinds, workers[OURS]), kinds, rounds)
    return results, {"epochs and bare steps": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--only", choices=("inference", "training"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = [OURS, *(name for name in options.peers if name != OURS)]
    results, steps = {}, {}
    if options.only != "training":
        results |= inference(names, options.rounds)
    if options.only != "inference":
        trained, steps = training([name for name in names if name in PEERS], options.rounds)
        results |= trained
    save(options.out, results | steps)
    print(about(), platform.processor() or platform.machine())
    print("\nseconds, median:\n\n" + table(results))
    print("\nours / theirs, median of the rounds (range):\n\n" + ratios(results, OURS))
    if options.only != "training" and ONNX in names:
        predicted = {task: results[task] for task in INFERENCE}
        print(f"\n{ONNX} / others:\n\n" + ratios(predicted, ONNX))
    for times in steps.values():
        bare = [STEPS * seconds for seconds in times["bare"]]
        for kind in ("epoch", "augmented"):
            print(f"{kind} / its bare steps: {ratio(times[kind], bare)}")
        print(f"step with 11 classes / with one: {ratio(times['classes'], times['bare'])}")


if __name__ == "__main__":
    main()
