"""What all programs share: flags, what they say, the compilation cache, errors."""

import contextlib
import glob
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import jax
import tyro
from PIL import Image

from flax_unet import parallel, processes

T = TypeVar("T")


def main(
    options: type[T],
    run: Callable[[T], int | None],
    description: str | None,
    args: list[str] | None,
    *,
    unused: Collection[str] = (),
) -> int:
    """Run a program with its command line; return its exit code.

    Args:
        options: a dataclass whose fields are the flags; fields that are dataclasses add theirs. If
            it has a `quiet` that is set, only warnings and errors are printed. If it has a
            `several`, see `Several`, this may be one of several processes.
        run: returns the exit code, or None for 0.
        description: for --help.
        args: the command line; by default that of the process.
        unused: fields that are no flags of this program and keep their defaults.
    """
    config = tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff
    registry = _flags(unused)
    flags = tyro.cli(options, description=description, args=args, config=config, registry=registry)
    keep_compiled()
    # Orbax and its threads log the pages of their errors; ours say in a line what they mean.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _leave_out_closed_loops
    code = _run(run, flags)
    processes.leave(code)
    return code


def _run(run: Callable[[Any], int | None], flags: Any) -> int:
    """The exit code of a program, whose errors are printed."""
    try:
        if several := getattr(flags, "several", None):
            several.start()
        quiet = getattr(flags, "quiet", False) or processes.index() > 0  # the first one prints
        with _quiet() if quiet else contextlib.nullcontext():
            return run(_absolute(flags)) or 0
    except KeyboardInterrupt:
        print("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        if processes.is_of_others(error):
            processes.lost(error)
        if isinstance(error, ValueError | OSError | FloatingPointError | ModuleNotFoundError):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            first_line, *_ = str(error).split("\n")
            print(
                "error: there is too little memory: a smaller --batch-size, --image-size or "
                f"--window needs less ({first_line})",
                file=sys.stderr,
            )
        elif processes.count() == 1:
            raise
        else:
            traceback.print_exc()
        return 1


@dataclass(frozen=True)
class Several:
    """Flags of a program that several processes may run together; see docs/scaling.md."""

    distributed: bool = False
    """This is one of several processes, started by SLURM, Cloud TPU, GKE or Open MPI."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if the processes are started by hand."""
    processes: int | None = None
    """Number of processes, if they are started by hand; 1 for one that has nothing to do with the
    others that SLURM or Open MPI started."""
    process: int | None = None
    """Number of this process, from 0, if they are started by hand."""

    def start(self) -> None:
        """Become one of several processes, if the flags say so.

        Raises:
            ValueError: the flags contradict each other, or there are several processes without one.
            ConnectionError: the other processes do not answer.
        """
        by_hand = self.coordinator, self.processes, self.process
        if self.distributed and by_hand != (None, None, None):
            raise ValueError("--distributed finds the processes: leave out --coordinator, ...")
        if self.distributed or by_hand not in ((None, None, None), (None, 1, None)):
            processes.start(*by_hand)
        elif self.processes is None and (variable := processes.others_unasked()):
            raise ValueError(
                f"this is one of several processes ({variable}), and each would train alone: "
                "--processes 1 if that is meant; to train together, train has --distributed"
            )


def _flags(unused: Collection[str]) -> tyro.constructors.ConstructorRegistry:
    """How dataclasses become flags: without the unused ones, and without "(default: None)"."""
    registry, asked = tyro.constructors.ConstructorRegistry(), []

    @registry.struct_rule
    def _(info: tyro.constructors.StructTypeInfo):
        if asked or not is_dataclass(info.type):
            return None
        asked.append(info)  # so that this rule does not answer its own question
        spec: Any = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
        asked.pop()
        no_hint = tyro.conf.arg(help_behavior_hint="")
        fields = (
            replace(field, type=Annotated[field.type, no_hint])
            if field.default in (None, False, "", ())
            else field
            for field in spec.fields
            if field.name not in unused
        )
        return replace(spec, fields=tuple(fields))

    return registry


class _NoTerminal:
    """A stream that says that it is no terminal, so that no bar is shown on it."""

    def __init__(self, stream: Any):
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Print nothing but what goes to stderr, and no bars."""
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(cast(Any, _NoTerminal(sys.stderr))),
    ):
        yield


@contextlib.contextmanager
def task(text: str) -> Iterator[None]:
    """Say what is done before it is done, and how long it took if that was over 2 seconds.

    A loop over pictures in it has a bar on a terminal.
    """
    print(text, flush=True)
    start = time.monotonic()
    with parallel.bar(text):
        yield
    if (seconds := time.monotonic() - start) > 2:
        print(f"  took {seconds:.0f} s", flush=True)


def command(program: str, *words: str | Path) -> str:
    """The command line of another program, as this one was started, with relative paths."""
    this = Path(sys.argv[0])
    start, sibling = f"flax-unet {program}", this.with_name(f"{program}.py")
    if this.name != "__main__.py" and sibling.is_file():  # not so in a notebook
        found = shutil.which("python")
        same = found is not None and os.path.samefile(found, sys.executable)
        python = "python" if same else os.path.relpath(sys.executable)
        start = f"{shlex.quote(python)} {shlex.quote(str(sibling))}"
    here = Path.cwd()
    texts = (
        os.path.relpath(word) if isinstance(word, Path) and word.is_relative_to(here) else str(word)
        for word in words
    )
    return " ".join([start, *map(shlex.quote, texts)])


def _leave_out_closed_loops(unraisable: Any) -> None:
    """After a failed write TensorStore reports, once for each array, that nobody waits for it."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _absolute(flags: T) -> T:
    """The flags with absolute paths, so that a later program finds them from anywhere."""

    def absolute(value: Any) -> Any:
        if isinstance(value, Path):
            return value.expanduser().absolute()
        return _absolute(value) if is_dataclass(value) else value

    values = {name: absolute(value) for name, value in vars(flags).items()}
    return replace(flags, **values)  # type: ignore[type-var]


def cache_folder() -> Path:
    """Where decoded pictures and compiled XLA code are cached; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_unet"


def keep_compiled() -> None:
    """Turn on JAX's persistent compilation cache, in the cache folder.

    The environment variable JAX_COMPILATION_CACHE_DIR names another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # JAX's cache key ignores the CPU model, and home folders are shared between machines.
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
        features = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
        kind = hashlib.sha256("".join(features[:1] or text).encode()).hexdigest()[:16]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"xla-{kind}"))
    warnings.showwarning = _show_and_repair
    # What `pictures` refuses needs no warning of Pillow's before.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


_show_warning = warnings.showwarning
OURS = str(Path(__file__).parent.parent / "flax_unet")  # and flax_unet_cli


def _show_and_repair(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print our warnings in one line.

    Delete unreadable cache entries (left by a killed run): JAX never overwrites them.
    """
    if category is UserWarning and str(where[0]).startswith(OURS):
        print(f"warning: {message}", file=sys.stderr)
        return
    words = "Error reading persistent compilation cache entry for '([^']+)'"
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder and (match := re.match(words, str(message))):
        for entry in Path(folder).glob(f"{glob.escape(match[1])}-*"):
            entry.unlink(missing_ok=True)
    _show_warning(message, category, *where)
