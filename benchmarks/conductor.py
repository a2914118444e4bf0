"""Runs worker processes in turn and records their times; for the protocol see worker.py."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = (
    "jax jaxlib flax optax keras tensorflow tensorflow-cpu torch torchvision "
    "segmentation-models-pytorch timm albumentations onnxruntime openvino"
).split()

#: {task: {name of the worker: one value per round}}
Results = dict[str, dict[str, list[float]]]


class Worker:
    """A worker process; `peak` is its peak memory so far, in bytes."""

    def __init__(self, command: list[str]):
        self.start, self.peak = time.time(), 0.0
        self.process = subprocess.Popen(
            [sys.executable, HERE / command[0], *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self, request: str) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # skip messages of libraries
                answer = json.loads(line)
                self.peak = answer["peak_bytes"]
                return answer
        raise SystemExit(f"{self.process.args} exited with code {self.process.wait()}")

    def ask(self, request: str) -> float:
        """Seconds per repetition of the work."""
        return self._answer(request)["seconds"]

    def first(self, request: str) -> float:
        """Seconds from the start of the process to the end of the work."""
        return self._answer(request)["clock"] - self.start

    def end(self) -> None:
        self.process.communicate()


def measure(
    workers: dict[str, Worker], requests: dict[str, str], rounds: int
) -> dict[str, list[float]]:
    """{name: seconds in each round}, after a first request that compiles and starts everything."""
    times: dict[str, list[float]] = {name: [] for name in requests}
    for name, request in requests.items():
        workers[name].ask(request)
    for i in range(rounds):
        for name in requests if i % 2 == 0 else reversed(requests):
            times[name].append(workers[name].ask(requests[name]))
        print({name: round(seconds[-1], 4) for name, seconds in times.items()}, flush=True)
    return times


def table(results: Results) -> str:
    """A Markdown table of the medians."""
    return _markdown(results, lambda task, name: f"{statistics.median(results[task][name]):.3g}")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Our time divided by theirs in each round: median (lowest to highest)."""
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{spread}"


def ratios(results: Results, ours: str) -> str:
    """A Markdown table of the `ratio` of our time to that of every other worker."""

    def cell(task: str, name: str) -> str:
        return ratio(results[task][ours], results[task][name])

    return _markdown(results, cell, without=ours)


def _markdown(results: Results, cell, without: str | None = None) -> str:
    names = [name for name in next(iter(results.values())) if name != without]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for task, times in results.items():
        rows.append([task, *(cell(task, name) if name in times else "" for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def about() -> str:
    """Date, machine and package versions."""
    packages = metadata.distributions()
    installed = {p.metadata["Name"].lower().replace("_", "-"): p.version for p in packages}
    versions = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    cores = f"{os.cpu_count()} cores"
    return ", ".join(
        [time.strftime("%Y-%m-%d"), cores, f"Python {platform.python_version()}", *versions]
    )


def save(file: Path, results: object) -> None:
    """Write the results as JSON, with date, machine and package versions."""
    file.write_text(json.dumps({"about": about(), "results": results}, indent=1) + "\n")
