"""A fault campaign: many damaged files and odd arrays, and what the library makes of them.

`KINDS` lists the kinds of fault. Each is a function of a number of inputs and a seed. `make faults`
runs all of them in long form, tests/test_faults.py in short form. An input is held if the result is
the right one bit for bit, or an error that the documentation names. It is lost if it ends in
another error or a wrong result, takes 30 seconds or 1.5 GB of memory, or leaves half a file.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from . import (
    arrays,
    cache,
    checkpoints,
    fuzz,
    kills,
    lost,
    models,
    pictures,
    records,
    torch_files,
    zips,
)
from .outcome import Outcome


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        run: the campaign, of a number of inputs and a seed.
        few, many: inputs of the short and of the long form.
    """

    run: Callable[[int, int], Outcome]
    few: int
    many: int


KINDS = {
    "training runs killed": Kind(kills.run, 1, 12),
    "one of two processes killed": Kind(lost.run, 1, 10),
    "exported models": Kind(models.run, 60, 3_000),
    "checkpoints": Kind(checkpoints.run, 15, 600),
    "config.json": Kind(records.run_config, 60, 3_000),
    "zips of Kvasir-SEG": Kind(zips.run, 40, 2_400),
    "images of any kind": Kind(arrays.run_images, 300, 12_000),
    "masks of any kind": Kind(arrays.run_masks, 300, 12_000),
    "sizes": Kind(arrays.run_sizes, 200, 12_000),
    "cached pictures": Kind(cache.run, 300, 12_000),
    "picture files": Kind(pictures.run, 3_000, 120_000),
    "PyTorch files": Kind(torch_files.run, 2_000, 60_000),
    "metrics.jsonl": Kind(records.run_history, 500, 30_000),
}
if find_spec("atheris"):  # of which there are wheels for Linux
    KINDS |= {
        "picture files, by coverage": Kind(fuzz.run_pictures, 1_000, 600_000),
        "PyTorch files, by coverage": Kind(fuzz.run_torch_files, 1_000, 600_000),
    }
