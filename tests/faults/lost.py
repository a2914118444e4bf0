"""One of two processes is killed: the other ends soon and names it, and a restart loses nothing."""

import random
import subprocess
import tempfile
import time
from pathlib import Path

from . import several
from .kills import draw, ended, flags
from .outcome import Outcome

EPOCHS = 30
#: What process 0 prints once both know each other.
JOINED = "split over 2 devices of 2 processes"
#: Seconds in which the other process must have ended.
LIMIT = 60


def run(n: int, seed: int) -> Outcome:
    """Kill one of two processes n times, each fifth time while both save their parts of the state.

    The other moments are any since they know each other: one that never comes is waited for.
    """
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        draw(root)
        with start(root, root / "straight") as straight:
            straight.until(lambda: JOINED in straight.outputs[0])
            began = time.monotonic()
            assert straight.wait() == [0, 0], straight.outputs
        seconds, expected = time.monotonic() - began, ended(root / "straight")
        for i in range(n):
            killed, later = rng.randrange(2), None if i % 5 == 0 else rng.uniform(0, seconds)
            when = "while saving" if later is None else f"{later:.1f} s later"
            with outcome.attempt(f"process {killed} killed {when}", seconds=600):
                kill(root, root / str(i), killed, later)
                with start(root, root / str(i)) as again:
                    assert again.wait() == [0, 0], again.outputs
                assert ended(root / str(i)) == expected, "another end"
    return outcome


def start(root: Path, workdir: Path) -> several.Several:
    wide = "--features", 8, 32, "--fsdp"  # some arrays are split over the processes
    return several.train(2, 1, *flags(root, workdir, EPOCHS), *wide)


def kill(root: Path, workdir: Path, killed: int, later: float | None) -> None:
    """Kill one so many seconds after both have joined, or while a checkpoint is being written."""

    def saving() -> bool:
        return any((workdir / "checkpoints").glob("*tmp*"))

    with start(root, workdir) as both:
        both.until(lambda: JOINED in both.outputs[0])
        if later is None:
            both.until(saving)
        else:
            time.sleep(later)
        both.processes[killed].kill()
        began, other = time.monotonic(), both.processes[1 - killed]
        try:
            other.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the other does not end: {both.outputs[1 - killed]}") from None
        seconds = time.monotonic() - began
    output = both.outputs[1 - killed]
    print(f"process {killed} killed, {later} s later: the other ended after {seconds:.1f} s")
    if other.returncode == 0:  # it was faster
        return
    # JAX itself ends a process if process 0 is lost, or while it waits for another in C++.
    jaxs = "leader task" if killed == 0 else f"stopped sending heartbeats):\n{killed}\n"
    assert f"process {killed} of 2" in output or jaxs in output, output
