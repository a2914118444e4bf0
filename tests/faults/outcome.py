"""Counts what inputs do: held is the right result or a documented error, lost is all else."""

import contextlib
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 30  # for one input
MEMORY = 1_500_000_000  # bytes by which one input may raise the peak
ROOT = Path(__file__).parents[2]


class TooLong(BaseException):
    """Not an Exception, so that no code under test takes it for an error of its input."""


@dataclass
class Outcome:
    """Of a number of inputs.

    Attributes:
        held: how many had the right result or a documented error.
        lost: how many had not, by what happened and where.
        examples: the smallest lost input of each, and the whole error.
    """

    held: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return self.held + self.lost.total()

    def __add__(self, other: "Outcome") -> "Outcome":
        held, lost = self.held + other.held, self.lost + other.lost
        return Outcome(held, lost, other.examples | self.examples)

    @contextlib.contextmanager
    def attempt(
        self, case: bytes | str, *allowed: type[Exception], seconds: float = SECONDS
    ) -> Iterator[None]:
        """Count one input, by how the block ends.

        Args:
            case: the input, or what describes it.
            allowed: the documented errors.
            seconds: that it may take.
        """
        before, began = _peak(), time.monotonic()
        try:
            with _limited(seconds):
                yield
            error = None
        except allowed:
            error = None
        except (Exception, TooLong) as caught:
            error = caught
        if error is None and time.monotonic() - began > seconds:  # in C, where no signal arrives
            error = TooLong(f"more than {seconds} seconds")
        if error is None and _peak() - before > MEMORY:
            error = MemoryError(f"more than {MEMORY / 1e9} GB")
        if error is None:
            self.held += 1
        else:
            self._lose(error, case.encode() if isinstance(case, str) else case)

    def _lose(self, error: BaseException, case: bytes) -> None:
        reason = f"{type(error).__name__}{_place(error)}"
        self.lost[reason] += 1
        if reason not in self.examples or len(case) < len(self.examples[reason][0]):
            text = "".join(traceback.format_exception(error))
            self.examples[reason] = case, text


def _place(error: BaseException) -> str:
    """Where an error left the project's code: the innermost line of it."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and ".venv" not in file.parts:
            return f" in {file.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return ""


def _peak() -> int:
    """The most bytes that this process ever had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_) -> None:
        raise TooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
