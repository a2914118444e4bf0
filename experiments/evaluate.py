"""Score a run's model: `python experiments/evaluate.py --workdir runs/`."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from recipes import (
    Config,
    absolute,
    draw_panels,
    keep_compiled,
    load_split,
    make_recipe,
    open_sources,
    restore_run,
    write_atomically,
)

from flax_unet import data, metrics, predict


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
    """The pictures to score, what the report is named for, and the protocol."""
    if (options.images is None) != (options.masks is None):
        raise data.DataError("--images and --masks go together")
    if options.images is not None and options.masks is not None:
        source = data.FolderSource(options.images, options.masks)
        what = f"folder-{options.images.parent.name}-{options.images.name}"
        return data.load(source, config.image_size), what, "folder"
    given = {k: v for k in ("kvasir_zip", "data_dir") if (v := getattr(options, k)) is not None}
    config = replace(config, **given)
    protocol = config.protocol if config.dataset == "kvasir_seg" else config.dataset
    return load_split(config, open_sources(config), options.split), options.split, protocol


def run(options: Options) -> None:
    """Score, print a table, write evaluation-WHAT.json and .png to the workdir."""
    on_validation = options.images is None and options.split == "validation"
    which = options.checkpoint or ("latest" if on_validation else "best")
    config, model, variables, step, fingerprints = restore_run(options.workdir, which)
    arrays, what, protocol = load_arrays(options, config)
    figures, counts = predict.evaluate(
        model,
        variables,
        arrays,
        batch_size=config.batch_size,
        loss_fn=make_recipe(config).loss_fn,
    )
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

    print(f"{protocol}, {what}: {figures['n_images']} images, {which} checkpoint (step {step})")
    if which == "best" and on_validation:
        print("note: the best checkpoint was chosen on these very images")
    if options.images is None and fingerprints.get(what) != arrays.fingerprint:
        print("warning: these are not the pictures that the run had when it began")
    for key in ("dice_per_image", "iou_per_image"):
        low, high = report[f"{key}_interval"]
        print(f"  {key:<18}{figures[key]:.4f}   95 % interval {low:.4f} to {high:.4f}")
    for key in ("dice_pooled", "iou_pooled", "precision_pooled", "recall_pooled", "accuracy"):
        print(f"  {key:<18}{figures[key]:.4f}")
    order = np.argsort(-dice, kind="stable")
    chosen = [int(order[i]) for i in (0, len(order) // 2, -1)]
    names = [f"{arrays.name[i]} (Dice {dice[i]:.3f})" for i in chosen]
    print("  best, median, worst: " + ", ".join(names))

    stem = f"evaluation-{what}" + ("" if which == "best" else f"-{which}")
    write_atomically(options.workdir / f"{stem}.json", json.dumps(report, indent=2) + "\n")
    draw_panels(options.workdir / f"{stem}.png", model, variables, arrays, chosen)
    print(f"written: {options.workdir / stem}.json and .png")


def main(args: list[str] | None = None) -> int:
    options = absolute(tyro.cli(Options, description=__doc__, args=args))
    keep_compiled()
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
