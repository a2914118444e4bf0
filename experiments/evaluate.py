"""Score a run's model: `python experiments/evaluate.py --workdir runs/`."""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from recipes import (
    Config,
    absolute,
    cache_folder,
    draw_panels,
    keep_compiled,
    make_recipe,
    open_sources,
    restore_run,
    split_of,
    write_atomically,
)
from tqdm import tqdm

from flax_unet import boundary, data, draw, metrics, predict


@dataclass(frozen=True)
class Options:
    """Score the model of a workdir on a split of its data set, or on pictures in two folders."""

    workdir: Annotated[Path, tyro.conf.arg(aliases=["--model"])]
    """Folder of the run, or of an exported model."""
    out: Path | None = None
    """Folder for the report; by default the workdir."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of the data set that the run was trained on."""
    checkpoint: Literal["best", "latest"] | None = None
    """best by validation Dice; by default so, but latest where the split is validation."""
    images: Path | None = None
    """Folder of images to score instead, all of them, with --masks."""
    masks: Path | None = None
    """Folder of their masks, paired by stem."""
    kvasir_zip: Path | None = None
    """The Kvasir-SEG archive, if it is not where it was."""
    data_dir: Path | None = None
    """Where TFDS keeps prepared datasets, if it is not where it was."""
    flips: bool = False
    """Predict the mean over each picture and its mirror images: four times the work."""


RATIOS = (metrics.dice, metrics.iou, metrics.precision, metrics.recall)
#: Polyps by the share of the picture that they cover: from the first to below the second.
POLYPS = {"none": (0, 1e-9), "small": (1e-9, 0.05), "medium": (0.05, 0.2), "large": (0.2, 1.01)}
#: Of the normalised surface Dice, in percent of the picture's diagonal.
TOLERANCE = 1.0


def score(proba: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Counts and figures of one picture; its distances are in percent of its diagonal.

    Args:
        proba: [H, W] in [0, 1].
        true: bool [H, W].
    """
    found, percent = proba > 0.5, 100 / np.hypot(*true.shape)
    pixels = (found & true, found & ~true, ~found & true, ~found & ~true)
    counts = metrics.Confusion(*(int(x.sum()) for x in pixels))
    distances = boundary.distances(found, true)
    return {
        "share": float(true.mean()),
        **counts._asdict(),
        **{ratio.__name__: float(ratio(counts)) for ratio in RATIOS},
        "hd95": percent * boundary.hd95(distances),
        "assd": percent * boundary.assd(distances),
        "surface_dice": boundary.surface_dice(distances, TOLERANCE / percent),
    }


def means(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Of some pictures: {figure: its mean and the 95 % interval of that}, and the pooled ratios."""
    if not scores:
        return {"n_images": 0}
    keys = [*(ratio.__name__ for ratio in RATIOS), "hd95", "assd", "surface_dice"]
    columns = {key: np.array([each[key] for each in scores]) for key in keys}
    counts = (sum(each[key] for each in scores) for key in metrics.Confusion._fields)
    total = metrics.Confusion(*counts)
    return {
        "n_images": len(scores),
        "per_image": {
            key: {"mean": float(x.mean()), "interval": metrics.bootstrap_interval(x)}
            for key, x in columns.items()
        },
        "pooled": {ratio.__name__: float(ratio(total)) for ratio in RATIOS},
    }


def score_pictures(
    model: Any, variables: Any, source: Sequence[dict[str, Any]], size: int
) -> tuple[dict[str, Any], metrics.Reliability]:
    """The report on pictures at their own sizes, and the reliability of their probabilities."""
    scores, counts = [], []
    for i in tqdm(range(len(source)), unit="picture", leave=False):
        image, mask = data.decode_pair(source[i])
        proba = predict.predict_picture(model, variables, image, size)[..., 0]
        true = np.asarray(mask) > 127
        scores.append({"name": source[i]["name"], **score(proba, true)})
        counts.append(metrics.reliability(proba, true))
    reliability = metrics.Reliability(*(np.sum(x, 0) for x in zip(*counts, strict=True)))
    by_size = {
        polyp: means([each for each in scores if low <= each["share"] < high])
        for polyp, (low, high) in POLYPS.items()
    }
    report = {
        **means(scores),
        "by_polyp_size": by_size,
        "calibration_error": metrics.calibration_error(reliability),
        "images": scores,
    }
    return report, reliability


def cost(model: Any, variables: Any, image: np.ndarray) -> dict[str, float | None]:
    """Parameters, GFLOP a picture as XLA counts them, and pictures a second on this machine.

    Args:
        model, variables: as `flax_unet.predict` takes them.
        image: a batch, uint8 [B, H, W, 3].
    """
    shapes = jax.eval_shape(lambda v, x: (v, data.as_float(x)), variables, image)
    try:  # only of a CPU's program does JAX count the work before it is compiled
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            counted = jax.jit(model.apply).lower(*shapes).cost_analysis() or {}
        flop = counted.get("flops")
    except (RuntimeError, NotImplementedError):  # JAX_PLATFORMS may leave the CPU out
        flop = None
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(predict.predict_proba(model, variables, image))
        seconds.append(time.perf_counter() - began)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "gflop_per_image": flop and flop / len(image) / 1e9,
        "images_per_second": len(image) / statistics.median(seconds[1:]),  # the first compiles
    }


def open_split(options: Options, config: Config) -> tuple[Sequence[dict[str, Any]], str, str]:
    """The pictures to score, what the report is named for, and the protocol."""
    if (options.images is None) != (options.masks is None):
        raise data.DataError("--images and --masks go together")
    if options.images is not None and options.masks is not None:
        source = data.FolderSource(options.images, options.masks)
        return source, f"folder-{options.images.parent.name}-{options.images.name}", "folder"
    if config.dataset == "folder" and config.images is None:
        raise data.DataError(
            "an exported model does not say where its pictures are: score its run's workdir, or "
            "all pictures of two folders with --images and --masks"
        )
    given = {k: v for k in ("kvasir_zip", "data_dir") if (v := getattr(options, k)) is not None}
    config = replace(config, **given)
    protocol = config.protocol if config.dataset == "kvasir_seg" else config.dataset
    return split_of(config, open_sources(config), options.split), options.split, protocol


def show(report: dict[str, Any]) -> None:
    """Print what matters of a report."""
    own_size = report["own_size"]
    print(
        f"{report['protocol']}, {report['what']}: {report['n_images']} images, "
        f"{report['checkpoint']} checkpoint (step {report['step']})"
    )
    for key in ("dice_per_image", "iou_per_image"):
        low, high = report[f"{key}_interval"]
        print(f"  {key:<20}{report[key]:.4f}   95 % interval {low:.4f} to {high:.4f}")
    pooled = [f"{ratio.__name__}_pooled" for ratio in RATIOS]
    for key in ("precision_per_image", "recall_per_image", *pooled, "accuracy"):
        print(f"  {key:<20}{report[key]:.4f}")
    print("  at their own sizes, mean over the images (distances in % of the diagonal):")
    for key, value in own_size["per_image"].items():
        low, high = value["interval"]
        print(f"    {key:<18}{value['mean']:.4f}   95 % interval {low:.4f} to {high:.4f}")
    for polyp, values in own_size["by_polyp_size"].items():
        if values["n_images"]:
            mean, n = values["per_image"]["dice"]["mean"], values["n_images"]
            print(f"    {'dice, ' + polyp:<18}{mean:.4f}   {n} images")
    print(f"    calibration error {own_size['calibration_error']:.4f}")
    for key, value in report["cost"].items():
        if value is not None:
            print(f"  {key:<20}{value:{',' if isinstance(value, int) else '.2f'}}")


def run(options: Options) -> None:
    """Score, print a table, write evaluation-WHAT.json and .png."""
    on_validation = options.images is None and options.split == "validation"
    which = options.checkpoint or ("latest" if on_validation else "best")
    config, model, variables, step, fingerprints, which = restore_run(options.workdir, which)
    source, what, protocol = open_split(options, config)
    cache = cache_folder() if options.images is None else None
    arrays = data.load(source, config.image_size, cache=cache)
    model = predict.Mirrored(model) if options.flips else model
    figures, counts = predict.evaluate(
        model,
        variables,
        arrays,
        batch_size=config.batch_size,
        loss_fn=make_recipe(config).loss_fn,
    )
    dice, iou = metrics.dice(counts).mean(-1), metrics.iou(counts).mean(-1)
    own_size, reliability = score_pictures(model, variables, source, config.image_size)
    report = {
        "what": what,
        "dataset": config.dataset if options.images is None else str(options.images),
        "protocol": protocol,
        "split": options.split if options.images is None else None,
        "checkpoint": which,
        "step": step,
        "flips": options.flips,
        "image_size": config.image_size,
        **figures,
        "dice_per_image_interval": metrics.bootstrap_interval(dice),
        "iou_per_image_interval": metrics.bootstrap_interval(iou),
        "fingerprint": arrays.fingerprint,
        "cost": cost(model, variables, np.asarray(arrays.image[: config.batch_size])),
        "polyp_sizes": POLYPS,
        "surface_dice_tolerance": TOLERANCE,
        "own_size": own_size,
    }

    if which == "best" and on_validation:
        print("note: the best checkpoint was chosen on these very images")
    if options.images is None and fingerprints.get(what) != arrays.fingerprint:
        print("warning: these are not the pictures that the run had when it began")
    show(report)
    order = np.argsort(-dice, kind="stable")
    chosen = [int(order[i]) for i in (0, len(order) // 2, -1)]
    names = [f"{arrays.name[i]} (Dice {dice[i]:.3f})" for i in chosen]
    print("  best, median, worst: " + ", ".join(names))

    stem = f"evaluation-{what}" + ("" if which == "best" else f"-{which}")
    stem += "-flips" if options.flips else ""
    out = options.out or options.workdir
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{stem}.json", json.dumps(report, indent=2) + "\n")
    draw_panels(out / f"{stem}.png", model, variables, arrays, chosen)
    draw.save_reliability(out / f"{stem}-reliability.png", reliability)
    print(f"written: {out / stem}.json, .png and -reliability.png")


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
