"""One function for many files, on all cores of all processes."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

from flax_unet import processes
from flax_unet.pictures import DataError

S = TypeVar("S")
T = TypeVar("T")


#: Errors that are listed; the others are counted.
SHOWN = 5

_LABEL: ContextVar[str | None] = ContextVar("label", default=None)


@contextlib.contextmanager
def bar(label: str) -> Iterator[None]:
    """Meanwhile `map_all` shows a bar with this label, on a terminal, after a second."""
    token = _LABEL.set(label)
    try:
        yield
    finally:
        _LABEL.reset(token)


def map_all(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """The results of a function, computed on all cores; errors are collected.

    Of several processes each computes a part, and all get all results, see `processes.each`.

    Raises:
        DataError: some calls raised one; the message has the first ones, and how many there are.
    """
    n = processes.count()
    if n == 1:
        pairs = _map(function, items)
    else:
        shares = processes.each(lambda: _map(function, items[processes.index() :: n]))
        pairs = [shares[i % n][i // n] for i in range(len(items))]
    errors = [error for _, error in pairs if error is not None]
    if len(errors) > 1:
        shown = "\n  ".join(str(error) for error in errors[:SHOWN])
        more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise DataError(f"{len(errors)} pictures are unusable:\n  {shown}{more}") from errors[0]
    if errors:
        raise errors[0]
    return [result for result, _ in pairs]  # type: ignore[misc]


def _map(function: Callable[[S], T], items: Sequence[S]) -> list[tuple[T | None, DataError | None]]:

    def call(item: S) -> tuple[T | None, DataError | None]:
        try:
            return function(item), None
        except DataError as error:
            return None, error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(
            pool.map(call, items),
            desc=(label := _LABEL.get()),
            total=len(items),
            delay=1,
            leave=False,
            disable=None if label else True,  # None: only on a terminal
        )
        return list(results)
