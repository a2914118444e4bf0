"""Ask workers in turn, and write down what they say; see worker.py."""

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
PACKAGES = "jax jaxlib flax optax keras tensorflow tensorflow-cpu torch torchvision".split()

#: {task: {name of the peer: one figure a round}}
Figures = dict[str, dict[str, list[float]]]


class Peer:
    """A worker in a process of its own; `peak` is the most memory that it has used, in bytes."""

    def __init__(self, command: list[str]):
        self.began, self.peak = time.time(), 0.0
        self.process = subprocess.Popen(
            [sys.executable, HERE / command[0], *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self, question: str) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # some libraries chat
                answer = json.loads(line)
                self.peak = answer["peak_bytes"]
                return answer
        raise SystemExit(f"{self.process.args} ended with code {self.process.wait()}")

    def ask(self, question: str) -> float:
        """The seconds that the work took each time."""
        return self._answer(question)["seconds"]

    def first(self, question: str) -> float:
        """The seconds from the start of the process to the end of the work."""
        return self._answer(question)["clock"] - self.began

    def end(self) -> None:
        self.process.communicate()


def measure(peers: dict[str, Peer], asked: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """{name: seconds in each round}, without what is compiled or started at the first time."""
    times: dict[str, list[float]] = {name: [] for name in asked}
    for name, question in asked.items():
        peers[name].ask(question)
    for i in range(rounds):
        for name in asked if i % 2 == 0 else reversed(asked):
            times[name].append(peers[name].ask(asked[name]))
        print({name: round(seconds[-1], 4) for name, seconds in times.items()}, flush=True)
    return times


def table(figures: Figures) -> str:
    """Markdown: the medians."""
    return _markdown(figures, lambda task, name: f"{statistics.median(figures[task][name]):.3g}")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Ours over theirs, round by round: median (lowest to highest)."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}"


def ratios(figures: Figures, ours: str) -> str:
    """Markdown: each `ratio` of ours."""

    def cell(task: str, name: str) -> str:
        return ratio(figures[task][ours], figures[task][name])

    return _markdown(figures, cell, without=ours)


def _markdown(figures: Figures, cell, without: str | None = None) -> str:
    names = [name for name in next(iter(figures.values())) if name != without]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for task, times in figures.items():
        rows.append([task, *(cell(task, name) if name in times else "" for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def about() -> str:
    """Date, machine and versions."""
    found = metadata.distributions()
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in found}
    versions = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    cores = f"{os.cpu_count()} cores"
    return ", ".join(
        [time.strftime("%Y-%m-%d"), cores, f"Python {platform.python_version()}", *versions]
    )


def save(file: Path, figures: object) -> None:
    """Write the figures as JSON, with date, machine and versions."""
    file.write_text(json.dumps({"about": about(), "figures": figures}, indent=1) + "\n")
