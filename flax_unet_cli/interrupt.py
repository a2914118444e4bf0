"""Ctrl-C and SIGTERM from the first instruction on: this module imports nothing that takes long."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = signal.SIGINT, signal.SIGTERM
#: Set while there are steps to save: the first signal is then collected, and only a second one ends
#: the program at once.
unsaved = threading.Event()


def watch() -> None:
    """From now on a signal ends the program with a line, also in the middle of a compilation.

    Python runs its handlers between two instructions of the main thread, which may wait for XLA for
    a minute. A thread that is woken up by the signal itself does not.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(readable,), daemon=True).start()


def _wait(readable: int) -> None:
    collected = 0
    while number := os.read(readable, 1)[0]:
        if number not in SIGNALS:
            continue
        if not unsaved.is_set() or collected:
            os.write(1, b"\ninterrupted\n")  # nothing that another thread may have locked
            os._exit(128 + number)
        collected += 1


@contextlib.contextmanager
def signals_collected() -> Iterator[list[int]]:
    """Collect signals in a list instead of exiting; a second one exits."""
    signals: list[int] = []

    def collect(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signals.append(number)

    before = {number: signal.signal(number, collect) for number in SIGNALS}
    try:
        yield signals
    finally:
        unsaved.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
