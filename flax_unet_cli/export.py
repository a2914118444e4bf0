"""Write a run's best model as a small folder: `flax-unet export --workdir runs/ --out models/NAME`.

predict, evaluate and train --init take such a folder wherever they take a workdir.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flax_unet import pack, runs
from flax_unet_cli import program


@dataclass(frozen=True)
class Options:
    """Write model.json and weights.npz: the network, its parameters and its origin."""

    workdir: Path
    """Workdir of the run."""
    out: Path
    """Folder to create."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""


def run(options: Options) -> None:
    if (options.out / "config.json").exists():
        raise ValueError(f"{options.out} is the workdir of a run: choose another folder")
    runs.check_writable(options.out)
    trained = runs.load_model(options.workdir, options.checkpoint)
    about = runs.read_config(options.workdir)
    del about["model"]
    # Do not publish this machine's paths.
    paths = ("workdir", "kvasir_zip", "images", "masks", "split_file", "data_dir")
    about["places"] |= dict.fromkeys(paths)
    about["settings"]["init"] = None
    about |= {"step": trained.step, "checkpoint": trained.checkpoint}
    size = trained.settings.image_size
    pack.save(options.out, pack.Packed(trained.model, trained.variables, size, about))
    megabytes = (options.out / "weights.npz").stat().st_size / 1e6
    print(f"written: {options.out}, {megabytes:.1f} MB")


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
