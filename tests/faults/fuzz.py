"""Fuzzing by atheris: inputs that reach new branches of a reader are kept and damaged further.

`run_pictures` and `run_torch_files` start this file as a program, because libFuzzer never returns.
"""

import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from PIL import GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from flax_unet import formats, images, torch_file
from flax_unet import pictures as readers
from flax_unet.pictures import DataError

from . import pictures, torch_files
from .outcome import ROOT, Outcome

FORMATS = [*pictures.FORMATS, *pictures.MASKS]
PLUGINS = GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin


def read_picture(data: bytes) -> None:
    """The first byte chooses the format, the others are the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = FORMATS[data[0] % len(FORMATS)] if data else FORMATS[0]
        if chosen in pictures.MASKS:
            pictures.check_mask(data[1:], chosen)
        else:
            pictures.check_image(data[1:], chosen, None)


def read_torch_file(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        torch_files.check(torch_file.read_tensors(file.name), data)


def picture_corpus() -> list[bytes]:
    return [bytes([i]) + data for data in pictures.corpus() for i in range(len(FORMATS))]


def torch_corpus() -> list[bytes]:
    return [torch_files.content(), torch_files.content(huge=True)]


#: {name: (function of the input, its documented error, first inputs, instrumented modules)}
TARGETS = {
    "pictures": (read_picture, DataError, picture_corpus, (readers, images, formats, *PLUGINS)),
    "torch files": (read_torch_file, ValueError, torch_corpus, (torch_file,)),
}


def _run(target: str, n: int, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        result, corpus = Path(place, "outcome"), Path(place, "corpus")
        corpus.mkdir()
        for i, data in enumerate(TARGETS[target][2]()):
            (corpus / str(i)).write_bytes(data)
        command = [sys.executable, "-m", "tests.faults.fuzz", target, str(n), str(seed), place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not result.exists():
            raise RuntimeError(f"the fuzzer ended with {done.returncode}: {done.stderr[-2000:]}")
        return Outcome(**pickle.loads(result.read_bytes()))


run_pictures, run_torch_files = partial(_run, "pictures"), partial(_run, "torch files")


def main(target: str, n: str, seed: str, place: str) -> None:
    """Try n inputs and write the outcome into a folder; this ends the process."""
    import atheris

    read, error, _, modules = TARGETS[target]
    for module in modules:
        for function in _functions(module):
            atheris.instrument_func(function)
    outcome = Outcome()

    def try_input(data: bytes) -> None:
        with outcome.attempt(data, error):
            read(data)
        if outcome.tried == int(n):
            Path(place, "outcome").write_bytes(pickle.dumps(vars(outcome)))
            os._exit(0)

    # libFuzzer's own limits are off: an attempt has some.
    limits = ["-timeout=0", "-rss_limit_mb=0", "-max_len=65536", f"-seed={int(seed) + 1}"]
    atheris.Setup([target, *limits, str(Path(place, "corpus"))], try_input)
    atheris.Fuzz()


def _functions(module: ModuleType) -> list[Callable]:
    """The functions of a module, and the methods of its classes."""
    owners = [module, *(x for x in vars(module).values() if inspect.isclass(x))]
    found = [f for owner in owners for f in vars(owner).values() if inspect.isfunction(f)]
    return [f for f in found if f.__module__ == module.__name__]


if __name__ == "__main__":
    main(*sys.argv[1:])
