"""Shared by the workers of time_to_dice.py: the data, the clock, and the quality.

Each worker is a separate process that prints lines of JSON: one when its training begins, and one
after each epoch.
"""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEVELS = (0.60, 0.70, 0.75, 0.80)
NEWEST = 0.2  # weight of the newest value in the moving average


class Pictures(NamedTuple):
    """Images, uint8 [N, H, W, 3], and masks of 0 and 1, uint8 [N, H, W, 1]."""

    image: np.ndarray
    mask: np.ndarray


def read(file: str) -> tuple[Pictures, Pictures]:
    """The training and the validation pictures that time_to_dice.py has written."""
    with np.load(Path(file)) as arrays:
        train, validation = (
            Pictures(arrays[f"{split}_image"], arrays[f"{split}_mask"])
            for split in ("train", "validation")
        )
    return train, validation


def dice(probability: np.ndarray, mask: np.ndarray) -> float:
    """Dice of each image at threshold 0.5, averaged over the images."""
    predicted, true = probability > 0.5, mask > 0
    both = (predicted & true).sum((1, 2, 3))
    total = predicted.sum((1, 2, 3)) + true.sum((1, 2, 3))
    return float(np.mean((2 * both + (total == 0)) / (total + (total == 0))))


def smooth(values: list[float]) -> list[float]:
    """The exponential moving average, which starts at the first value."""
    averages = values[:1]
    for value in values[1:]:
        averages.append((1 - NEWEST) * averages[-1] + NEWEST * value)
    return averages


def cpu_seconds() -> float:
    """User and system time of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def all_cpu_seconds() -> float:
    """CPU time of all programs on this machine, and what its host has taken from it (Linux)."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, interrupts, soft, stolen, *_ = map(
            int, file.readline().split()[1:]
        )
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def clocks() -> np.ndarray:
    """Wall-clock time, CPU time of this process, and of all others."""
    own = cpu_seconds()
    return np.array([time.perf_counter(), own, all_cpu_seconds() - own])


def train(
    epochs: Iterator[float],
    predict: Callable[[np.ndarray], np.ndarray],
    validation: Pictures,
    minutes: float,
) -> None:
    """Train until the smoothed Dice reaches the highest level, or the time is up.

    Args:
        epochs: trains for an epoch whenever its next value, the mean loss, is asked for.
        predict: uint8 images [N, H, W, 3] to probabilities [N, H, W, 1].
        validation: what the Dice is measured on.
        minutes: wall-clock time of the training, without that of the validation.
    """
    say(began=time.time(), cpu_seconds=cpu_seconds())
    scores, spent = [], np.zeros(3)
    while spent[0] < 60 * minutes:
        start = clocks()
        loss = next(epochs, None)
        if loss is None:
            break
        trained = clocks()
        spent += trained - start
        scores.append(dice(predict(validation.image), validation.mask))
        say(
            epoch=len(scores),
            train_seconds=spent[0],
            train_cpu_seconds=spent[1],
            others_cpu_seconds=spent[2],
            validation_seconds=time.perf_counter() - trained[0],
            loss=loss,
            dice=scores[-1],
        )
        assert np.isfinite(loss), "the loss is not finite"
        if smooth(scores)[-1] >= max(LEVELS):
            break


def say(**content: float) -> None:
    print(json.dumps(content), flush=True)
