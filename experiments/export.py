"""Write a run's best model as a small folder.

    python experiments/export.py --workdir runs/ --out models/NAME

predict.py, evaluate.py and train.py --init take it as they take a workdir.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from recipes import PATHS, absolute, read_json, restore_run

from flax_unet import pack


@dataclass(frozen=True)
class Options:
    """Write model.json and weights.npz: the network, its parameters, where it comes from."""

    workdir: Path
    """Folder of the run."""
    out: Path
    """Folder to be made."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""


def run(options: Options) -> None:
    if (options.out / "config.json").exists():
        raise ValueError(f"{options.out} is the workdir of a run: choose another folder")
    stored, found = read_json(options.workdir), restore_run(options.workdir, options.checkpoint)
    # Where things lay on this machine is nobody's business.
    stored["free"] |= dict.fromkeys(PATHS)
    stored["config"]["init"] = None
    about = {key: value for key, value in stored.items() if key != "model"}
    about |= {"step": found.step, "checkpoint": found.checkpoint}
    packed = pack.Packed(found.model, found.variables, found.config.image_size, about)
    pack.save(options.out, packed)
    size = (options.out / "weights.npz").stat().st_size
    print(f"written: {options.out}, {size / 1e6:.1f} MB")


def main(args: list[str] | None = None) -> int:
    options = absolute(tyro.cli(Options, description=__doc__, args=args))
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
