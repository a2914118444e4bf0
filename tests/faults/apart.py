"""Runs a kind of fault in a process of its own, so that a crash is an outcome too."""

import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from . import KINDS
from .outcome import Outcome


def run(kind: str, number: int, seed: int) -> Outcome:
    """The outcome of so many inputs."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_silent, kind, number, seed).result()
        except BrokenProcessPool as error:
            reason = "the process crashed"
            return Outcome(0, Counter({reason: 1}), {reason: (b"", repr(error))})


def _silent(kind: str, number: int, seed: int) -> Outcome:
    # The decoders of TIFF and Orbax print a line or a page about each damaged file.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return KINDS[kind].run(number, seed)
