"""Runs the fault campaign in long form and prints a table: `python -m tests.faults`."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tyro

from . import KINDS, apart
from .outcome import Outcome


@dataclass
class Flags:
    """Many damaged files and odd arrays, and what the library makes of them."""

    only: list[str] = field(default_factory=lambda: list(KINDS))
    """Kinds of fault."""
    scale: float = 1.0
    """Fraction of the inputs of the long form."""
    seed: int = 0
    """Other seeds give other inputs."""
    jobs: int = 2
    """Processes at a time."""
    keep: Path = Path("runs/faults")
    """Folder for the smallest lost input of each reason."""


def main(flags: Flags) -> int:
    with ThreadPoolExecutor(flags.jobs) as pool:
        results = list(pool.map(partial(_timed, flags), flags.only))
    print("| kind | tried | held | lost | seconds |\n|---|---:|---:|---:|---:|")
    for kind, (outcome, seconds) in zip(flags.only, results, strict=True):
        print(_row(kind, outcome, seconds))
    total = sum((outcome for outcome, _ in results), Outcome())
    print(_row("all", total, sum(seconds for _, seconds in results)))
    for kind, (outcome, _) in zip(flags.only, results, strict=True):
        for i, (reason, number) in enumerate(outcome.lost.most_common()):
            case, error = outcome.examples[reason]
            file = flags.keep / f"{kind.replace(' ', '-')}-{i}.lost"
            flags.keep.mkdir(parents=True, exist_ok=True)
            file.write_bytes(case)
            file.with_suffix(".txt").write_text(error)
            print(f"\n{kind}: {number} x {reason}; the smallest input is {file}")
    return min(total.lost.total(), 1)


def _row(kind: str, outcome: Outcome, seconds: float) -> str:
    numbers = f"{outcome.tried:,} | {outcome.held:,} | {outcome.lost.total():,}"
    return f"| {kind} | {numbers} | {seconds:.0f} |"


def _timed(flags: Flags, kind: str) -> tuple[Outcome, float]:
    """The outcome of a kind, and the seconds that it took."""
    began = time.monotonic()
    outcome = apart.run(kind, max(1, round(flags.scale * KINDS[kind].many)), flags.seed)
    return outcome, time.monotonic() - began


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(tyro.cli(Flags)))
