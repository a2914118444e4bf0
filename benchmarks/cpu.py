"""Measure flax_unet beside Keras and PyTorch on this CPU: `python benchmarks/cpu.py --out FILE`.

The article's network, 11,707,729 parameters, at 256x256, dropout and Adam included. Each framework
has a process of its own and all of the cores; they are asked in turn, A B C C B A, so that a busy
machine slows them alike. Inference is asked of processes that do nothing else, as a program that
predicts: PyTorch's is quicker after a training step, for it keeps memory that it then needs not ask
for. Prints the tables of docs/benchmarks.md, writes all figures to FILE.
"""

import argparse
import platform
from pathlib import Path

from conductor import Peer, about, measure, ratio, ratios, save, table

IMAGES = 32
OURS = "flax_unet"
PEERS = {
    OURS: (["ours.py", str(IMAGES)], "float32"),
    "Keras, TensorFlow": (["keras_peer.py", str(IMAGES)], "float32"),
    "PyTorch": (["torch_peer.py", "eager", str(IMAGES)], "float32"),
    "PyTorch, compiled": (["torch_peer.py", "compile", str(IMAGES)], "float32"),
    "PyTorch, bfloat16": (["torch_peer.py", "eager", str(IMAGES)], "bfloat16"),
}
#: What is asked: a name, and the question without its precision.
INFERENCE = {"inference, batch 1": "infer {} 1 16", "inference, batch 8": "infer {} 8 4"}
TRAINING = {
    "training step, batch 8": "step {} 8 3",
    f"epoch, {IMAGES} images": "epoch {} 8 1",
    f"epoch, {IMAGES} images, augmented": "augmented {} 8 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    options = parser.parse_args()
    names = [OURS, *(name for name in options.peers if name != OURS)]

    def asked(question: str) -> dict[str, str]:
        return {name: question.format(PEERS[name][1]) for name in names}

    figures = {}
    peers = {name: Peer(PEERS[name][0]) for name in names}
    for task, question in INFERENCE.items():
        figures[task] = measure(peers, asked(question), options.rounds)
    for peer in peers.values():
        peer.end()
    starts, memory = {}, {}
    for name in names:  # one after the other: each has the machine for itself
        peers[name] = Peer(PEERS[name][0])
        starts[name] = [peers[name].first(f"step {PEERS[name][1]} 8 1")]
        memory[name] = [peers[name].peak / 1e6]
    figures |= {"cold start to the first step": starts, "peak memory after it, MB": memory}
    for task, question in TRAINING.items():
        figures[task] = measure(peers, asked(question), options.rounds)
    # Beside bare steps in the same minutes: does the input keep the step waiting?
    steps = IMAGES // 8
    waiting = {"bare": f"step float32 8 {steps}"}
    waiting |= {kind: f"{kind} float32 8 1" for kind in ("epoch", "augmented")}
    waits = measure(dict.fromkeys(waiting, peers[OURS]), waiting, options.rounds)
    save(options.out, figures | {"an epoch's wait": waits})
    print(about(), platform.processor() or platform.machine())
    print("\nseconds, median:\n\n" + table(figures))
    print("\nours / theirs, median of the rounds (range):\n\n" + ratios(figures, OURS))
    bare = [steps * seconds for seconds in waits["bare"]]
    for kind in ("epoch", "augmented"):
        print(f"{kind} / its bare steps: {ratio(waits[kind], bare)}")


if __name__ == "__main__":
    main()
