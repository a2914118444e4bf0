"""One function for many files, on all cores."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from flax_unet.pictures import DataError

S = TypeVar("S")
T = TypeVar("T")


def map_all(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """The results of a function, computed on all cores; errors are collected.

    Raises:
        DataError: some calls raised one; the message has those of all.
    """

    def call(item: S) -> tuple[T | None, DataError | None]:
        try:
            return function(item), None
        except DataError as error:
            return None, error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(call, items))
    errors = [error for _, error in pairs if error is not None]
    if len(errors) > 1:
        shown = "\n  ".join(str(error) for error in errors[:20])
        raise DataError(f"{len(errors)} pictures are unusable:\n  {shown}") from errors[0]
    if errors:
        raise errors[0]
    return [result for result, _ in pairs]  # type: ignore[misc]
