"""Write a run's best model for others: `flax-unet export --workdir runs/ --out models/NAME`.

predict, evaluate and train --init take such a folder wherever they take a workdir. For programs
without JAX there are --onnx FILE and --safetensors, for jax alone --stablehlo FILE; also of a model
that was exported as a folder.

examples:
  flax-unet export --workdir runs/mine --out models/mine
  flax-unet export --model strong --onnx strong.onnx
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flax_unet import images, onnx_file, pack, runs, safetensors_file, stablehlo_file
from flax_unet.formats import BINARY
from flax_unet_cli import program
from flax_unet_cli.calibrate import calibrate
from flax_unet_cli.model_path import ModelPath


@dataclass(frozen=True)
class Options:
    """Write the network, its parameters and its origin, in one form or in several."""

    workdir: Annotated[ModelPath, tyro.conf.arg(aliases=["--model"])]
    """Workdir of the run, folder of an exported model, or the name of a shipped one: pretrained or
    strong."""
    out: Path | None = None
    """Folder to create, with model.json and weights.npz."""
    safetensors: bool = False
    """Also write weights.safetensors into --out, float32, for PyTorch and others; pip install
    'flax-unet[safetensors]'."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""
    image_size: int | tuple[int, int] | None = None
    """Height and width to which the exported model resizes pictures; by default as in training. A
    smaller size is quicker; whether it is as exact, evaluate says on validation."""
    calibrate: bool = False
    """Divide the logits by the temperature that fits the run's validation pictures best, so that
    probabilities say how often they are right; masks keep all but a few pixels of an outline. The
    temperature and the calibration error are printed, and recorded in --out and --onnx."""
    onnx: Path | None = None
    """ONNX file to create: one graph for any batch, height and width; pip install
    'flax-unet[onnx]'. Its metadata say what the classes and the values of images are."""
    onnx_output: Literal["logits", "probabilities"] = "probabilities"
    """What the ONNX file computes."""
    onnx_input: Literal["uint8", "float"] | None = None
    """Values that the ONNX file takes: uint8 from 0 to 255, or float32 in [0, 1]. By default uint8
    if the model was trained on pictures of 8 bits whose black is 0 and white 255."""
    stablehlo: Path | None = None
    """StableHLO file to create, which jax alone loads, on a CPU, GPU or TPU; pip install
    'flax-unet[stablehlo]'. It takes and computes what an ONNX file does by default."""


def run(options: Options) -> None:
    files = [file for file in (options.onnx, options.stablehlo) if file is not None]
    if options.out is None and not files:
        raise ValueError("say what to write: --out FOLDER, --onnx FILE or --stablehlo FILE")
    if len({*files}) < len(files):
        raise ValueError(f"{files[0]} cannot be both ONNX and StableHLO: give two files")
    if options.out is None and options.safetensors:
        raise ValueError("--safetensors needs --out FOLDER")
    if options.out is not None:
        runs.check_no_run(options.out)
        for name in ("model.json", "weights.npz", "weights.safetensors", "LICENSE"):
            if (options.out / name).exists():
                raise FileExistsError(f"{options.out / name} exists: choose another folder")
        if options.safetensors:
            safetensors_file.import_save()  # refused before anything is made
        runs.check_writable(options.out)
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} exists: choose another file")
        runs.check_writable(file.parent)
    trained = runs.load_model(options.workdir, options.checkpoint)
    trained.network("export")  # refused before anything is made
    if trained.terms:
        print(f"the model was {trained.terms}")
    if options.image_size is not None:
        trained = at_size(trained, options.image_size)
    if options.calibrate:
        trained = calibrate(trained)
    # Made before anything is written, so that an error leaves nothing behind.
    makers = {options.onnx: onnx_bytes, options.stablehlo: stablehlo_bytes}
    contents = {file: makers[file](options, trained) for file in files}
    if options.out is not None:
        write_folder(options, options.out, trained)
    for file, content in contents.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(file, content)
        print_size(file, file)


def at_size(trained: runs.Trained, size: int | tuple[int, int]) -> runs.Trained:
    """The model with another size to which it resizes pictures; its `config` has both.

    Raises:
        ValueError: the network does not take this size, or resizes nothing.
    """
    if trained.settings.crop is not None:
        raise ValueError("--image-size: a model of crops takes pictures at their own size")
    settings = replace(trained.settings, image_size=size)
    runs.check_size(settings, trained.network("--image-size"))
    content = trained.config["settings"] | {"image_size": size}
    trained_at = trained.config.get("trained_at", trained.settings.image_size)
    config = trained.config | {"settings": content, "trained_at": trained_at}
    if "calibration" in config:
        config["calibration"] = {"temperature": config["calibration"]["temperature"]}
        print(
            "note: the temperature was fitted at another size; its error at this one is not known"
        )
    return trained._replace(settings=settings, config=config)


def write_folder(options: Options, folder: Path, trained: runs.Trained) -> None:
    about = copy.deepcopy(trained.config)
    about.pop("model", None)
    # Do not publish this machine's paths.
    paths = ("workdir", "kvasir_zip", "images", "masks", "split_file", "data_dir")
    about["places"] |= dict.fromkeys(paths)
    about["settings"]["init"] = None
    about |= {"step": trained.step, "checkpoint": trained.checkpoint}
    size = trained.settings.image_size
    packed = pack.Packed(trained.network("export"), trained.variables, size, about)
    pack.save(folder, packed)
    print_size(folder, folder / "weights.npz")
    if trained.terms:
        runs.write_atomically(folder / "LICENSE", f"The model was {trained.terms}.\n")
    if options.safetensors:
        safetensors_file.save(folder, packed)
        print_size(folder, folder / "weights.safetensors")


def onnx_bytes(options: Options, trained: runs.Trained) -> bytes:
    image_format, mask_format = trained.image_format, trained.mask_format or BINARY
    raw = image_format.raw
    if options.onnx_input is not None:
        if options.onnx_input == "uint8" and not raw:
            raise ValueError(f"--onnx-input uint8: the model takes images of {image_format}")
        raw = options.onnx_input == "uint8"
    # A model of crops takes pictures at their own size, in windows; others take them resized.
    crops, size = trained.settings.crop is not None, trained.settings.size
    about = {"class_names": mask_format.learned, "image_size": None if crops else size}
    about["window"] = size if crops else None
    about |= images.to_json(image_format)
    about |= {"terms": trained.terms} if trained.terms else {}
    about |= {k: v for k, v in trained.config.items() if k == "calibration"}
    made = onnx_file.to_onnx(
        trained.network("--onnx"),
        trained.variables,
        channels=image_format.channels,
        probabilities=options.onnx_output == "probabilities",
        raw=raw,
        metadata={name: json.dumps(value) for name, value in about.items()},
    )
    return made.SerializeToString()


def stablehlo_bytes(options: Options, trained: runs.Trained) -> bytes:
    image_format = trained.image_format
    return stablehlo_file.to_stablehlo(
        trained.model,
        trained.variables,
        channels=image_format.channels,
        raw=image_format.raw,
    )


def print_size(written: Path, file: Path) -> None:
    print(f"written: {written}, {file.stat().st_size / 1e6:.1f} MB")


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
