"""Score a run's model: `python experiments/evaluate.py --workdir runs/`."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from recipes import Config, load_split, restore_run, write_atomically

from flax_unet import data, draw, metrics, predict
from flax_unet.model import UNet


@dataclass(frozen=True)
class Options:
    """Score the model of a workdir on a split of its data set, or on pictures in two folders."""

    workdir: Path
    """Folder of the run."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of the data set that the run was trained on."""
    checkpoint: Literal["best", "latest"] | None = None
    """best by validation Dice; by default so, but latest where the split is validation."""
    images: Path | None = None
    """Folder of images to score instead, with --masks."""
    masks: Path | None = None
    """Folder of their masks, paired by stem."""
    kvasir_zip: Path | None = None
    """The Kvasir-SEG archive, if it is not where it was."""
    data_dir: Path | None = None
    """Where TFDS keeps prepared datasets, if it is not where it was."""


def load_arrays(options: Options, config: Config) -> tuple[data.Arrays, str, str]:
    """The pictures to score, and what they are: the file name's part and the protocol."""
    if (options.images is None) != (options.masks is None):
        raise data.DataError("--images and --masks go together")
    if options.images is not None and options.masks is not None:
        source = data.FolderSource(options.images, options.masks)
        return data.load(source, config.image_size), options.images.resolve().name, "folder"
    given = {k: v for k in ("kvasir_zip", "data_dir") if (v := getattr(options, k)) is not None}
    protocol = config.protocol if config.dataset == "kvasir_seg" else config.dataset
    return load_split(replace(config, **given), options.split), options.split, protocol


def draw_sheet(
    file: Path, model: UNet, variables: Any, arrays: data.Arrays, dice: np.ndarray
) -> list[str]:
    """Write the panels of the best, the median and the worst prediction; return their names."""
    order = np.argsort(-dice, kind="stable")
    chosen = order[[0, len(order) // 2, -1]]
    proba = np.asarray(predict.predict_proba(model, variables, arrays.image[chosen]))[..., 0]
    masks = arrays.mask[chosen, ..., 0]
    draw.save_sheet(file, [draw.panels(*each) for each in zip(arrays.image[chosen], proba, masks)])  # noqa: B905
    return [f"{arrays.name[i]} (Dice {dice[i]:.3f})" for i in chosen]


def run(options: Options) -> None:
    """Score, print a table, write evaluation-WHAT.json and .png to the workdir."""
    on_validation = options.images is None and options.split == "validation"
    which = options.checkpoint or ("latest" if on_validation else "best")
    config, model, variables, step = restore_run(options.workdir, which)
    arrays, what, protocol = load_arrays(options, config)
    figures, counts = predict.evaluate(model, variables, arrays, batch_size=config.batch_size)
    dice, iou = metrics.dice(counts).mean(-1), metrics.iou(counts).mean(-1)
    report = {
        "what": what,
        "dataset": config.dataset if options.images is None else str(options.images),
        "protocol": protocol,
        "split": options.split if options.images is None else None,
        "checkpoint": which,
        "step": step,
        "image_size": config.image_size,
        **figures,
        "dice_per_image_interval": metrics.bootstrap_interval(dice),
        "iou_per_image_interval": metrics.bootstrap_interval(iou),
        "fingerprint": arrays.fingerprint,
    }
    stem = f"evaluation-{what}" + ("" if which == "best" else f"-{which}")
    write_atomically(options.workdir / f"{stem}.json", json.dumps(report, indent=2) + "\n")
    names = draw_sheet(options.workdir / f"{stem}.png", model, variables, arrays, dice)

    print(f"{protocol}, {what}: {figures['n_images']} images, {which} checkpoint (step {step})")
    if which == "best" and on_validation:
        print("note: the best checkpoint was chosen on these very images")
    for key in ("dice_per_image", "iou_per_image"):
        low, high = report[f"{key}_interval"]
        print(f"  {key:<18}{figures[key]:.4f}   95 % interval {low:.4f} to {high:.4f}")
    for key in ("dice_pooled", "iou_pooled", "precision_pooled", "recall_pooled", "accuracy"):
        print(f"  {key:<18}{figures[key]:.4f}")
    print("  best, median, worst: " + ", ".join(names))
    print(f"written: {options.workdir / stem}.json and .png")


def main(args: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=args)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
