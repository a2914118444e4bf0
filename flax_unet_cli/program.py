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
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import jax
import tyro
from PIL import Image

from flax_unet import parallel

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
            it has a `quiet` that is set, only warnings and errors are printed.
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
    try:
        with _quiet() if getattr(flags, "quiet", False) else contextlib.nullcontext():
            return run(_absolute(flags)) or 0
    except KeyboardInterrupt:
        print("interrupted")
        return 128 + signal.SIGINT
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


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
