"""Score a model on a split of its data set, or on the pictures in two folders.

Writes evaluation-WHAT.json, a report as report-WHAT.html, pictures of the best, median and worst
prediction, and a reliability diagram.

examples:
  flax-unet evaluate --workdir runs/mine --split validation
  flax-unet evaluate --model strong --images my/images --masks my/masks --out scores/
  flax-unet evaluate --workdir runs/mine --shifted
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from flax_unet import data, devices, draw, formats, images, metrics, negatives, runs, shifts, zoo
from flax_unet.draw import Panels
from flax_unet.evaluate import RATIOS, Scores, cost, counts_of, report, score
from flax_unet.folders import MaskFiles
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.pictures import DataError, resize_image, resize_mask
from flax_unet.predict import Ensemble
from flax_unet.report import report_html
from flax_unet_cli import program
from flax_unet_cli.model_path import ModelPath
from flax_unet_cli.sources import MaskFlags, RangeFlags, declared, open_sources, protocol, split_of

#: Tolerance of the surface Dice, in percent of the picture's diagonal.
TOLERANCE = 1.0
#: The predictions that are shown.
WORDS = "best", "median", "worst"


@dataclass(frozen=True)
class Options:
    """Flags of evaluate."""

    workdir: Annotated[ModelPath, tyro.conf.arg(aliases=["--model"])]
    """Workdir of the run, folder of a cross-validation or of an exported model, or the name of a
    shipped one: pretrained or strong."""
    out: Path | None = None
    """Folder for the report; by default the workdir."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of the data set that the run was trained on."""
    checkpoint: Literal["best", "latest"] | None = None
    """best (by validation Dice) or latest; by default best, but latest for --split validation."""
    images: Path | None = None
    """Folder of other images to score, all of them; needs --masks."""
    masks: Path | None = None
    """Folder of their masks, paired by name."""
    image_suffix: str = ""
    """End of the images' names that the masks' names lack."""
    mask_suffix: str = ""
    """End of the masks' names that the images' names lack."""
    mask_files: MaskFiles | None = None
    """One mask file per picture, class or instance; by default as in training."""
    meaning: Annotated[MaskFlags, tyro.conf.arg(name="masks")] = MaskFlags()
    ranges: Annotated[RangeFlags, tyro.conf.arg(name="pictures")] = RangeFlags()
    kvasir_zip: Path | None = None
    """The Kvasir-SEG archive, if it was moved."""
    data_dir: Path | None = None
    """Where TFDS stores prepared data sets, if they were moved."""
    flips: bool = False
    """Average the prediction over the 4 flips of each image, at 4 times the work; over the 2 flips
    left to right for a model trained with --upright."""
    window: int | tuple[int, int] | None = None
    """Predict the pictures at their own size, in overlapping windows of this height and width, in
    place of resizing them; by default if the model was trained on crops, of their size."""
    threshold: float = 0.5
    """Probability above which a pixel is of a class (one class or overlapping ones)."""
    shifted: bool = False
    """Also score the pictures as other endoscopes could have taken them: nine shifts of colour,
    sharpness, view and so on, for grey or colours of 8 bits. Ten times the work."""
    negatives: bool = False
    """Also count how often the model claims an object in parts of the pictures without one."""
    quiet: bool = False
    """Print warnings and errors only."""
    devices: int | None = None
    """Devices that share each batch; by default all."""


def open_split(
    options: Options, trained: runs.Trained
) -> tuple[Sequence[dict[str, Any]], str, str]:
    """The pictures to score, the name of the report, and the protocol."""
    settings, places = trained.settings, trained.places
    separate = trained.mask_format if places.mask_files == "class" else None
    names = () if separate is None else separate.names[1:]
    given = options.meaning.classes or names
    if (options.images is None) != (options.masks is None):
        raise DataError("give both --images and --masks, or neither")
    of_folders = options.mask_files, options.image_suffix, options.mask_suffix
    if options.images is None and any(of_folders):
        raise DataError("--mask-files, --image-suffix and --mask-suffix need --images and --masks")
    if options.images is not None and options.split != Options.split:
        raise DataError(f"--images has no splits: leave out --split {options.split}")
    if options.images is not None and options.masks is not None:
        source = data.FolderSource(
            options.images,
            options.masks,
            image_suffix=options.image_suffix,
            mask_suffix=options.mask_suffix,
            mask_files=(mask_files := options.mask_files or places.mask_files),
            classes=given if mask_files == "class" else (),
        )
        return source, f"folder-{options.images.parent.name}-{options.images.name}", "folder"
    if settings.dataset == "folder" and places.images is None:
        raise DataError(
            "an exported model does not record where its pictures are: score its run's workdir, or "
            "all pictures of two folders with --images and --masks"
        )
    if isinstance(trained.model, Ensemble) and options.split != "test":
        raise DataError(
            f"each picture of {options.split} was trained on by some of the folds: their scores on "
            "the others are in cross-validation.md; score all together with --split test or "
            "--images"
        )
    moved = {k: v for k in ("kvasir_zip", "data_dir") if (v := getattr(options, k)) is not None}
    sources = open_sources(settings, replace(places, **moved), names)
    source = split_of(settings, sources, options.split)
    return source, options.split, protocol(settings) or settings.dataset


def format_of(
    options: Options, trained: runs.Trained, source: Sequence[dict[str, Any]]
) -> MaskFormat:
    """What the values of the masks mean: as in training, unless they are other files.

    Raises:
        ValueError: it is not clear, or the classes are not the model's.
    """
    known = trained.mask_format
    if options.meaning != MaskFlags():
        if options.images is None:
            raise DataError("--classes, --foreground, --ignore and --mask-threshold need --images")
        separate = getattr(source, "mask_files", "one") == "class"
        overlapping = trained.model.overlapping and separate
        known = declared(replace(options.meaning, overlapping=overlapping), source)
    elif options.images is not None and (
        trained.settings.dataset != "folder"
        or options.mask_files not in (None, trained.places.mask_files)
    ):
        known = None  # files of another kind than in training
    found = known or declared(MaskFlags(), source)
    model = trained.model
    if (found.channels, found.overlapping) != (model.num_classes, model.overlapping):
        ours = _classes(found.channels, found.overlapping)
        theirs = _classes(model.num_classes, model.overlapping)
        raise DataError(f"the masks have {ours}, and the model {theirs}")
    if trained.mask_format is not None and found.names != (names := trained.mask_format.names):
        if sorted(found.names) == sorted(names):
            raise DataError(
                f"the model's classes are {' '.join(names)}, in this order: give --classes in it; "
                "which values they have, a JSON or CSV file says"
            )
        pairs = zip(found.learned, trained.mask_format.learned, strict=True)
        print("scored in this order: " + ", ".join(f"{ours} as {theirs}" for ours, theirs in pairs))
    return found


def _classes(n: int, overlapping: bool) -> str:
    if n == 1:
        return "one class against the background"
    return f"{n} {'overlapping' if overlapping else 'exclusive'} classes"


def show(content: dict[str, Any]) -> None:
    """Print what matters of a report."""
    own_size = content["own_size"]
    best = own_size.get("best_threshold")
    counted = {k: v for k, v in content["cost"].items() if v is not None}
    ensemble = f"ensemble of {len(content['ensemble'])}, " if "ensemble" in content else ""
    print(
        f"{content['protocol']}, {content['what']}: {content['n_images']} images, {ensemble}"
        f"{content['checkpoint']} checkpoint (step {content['step']}), "
        + (f"windows of {content['window']}" if content["window"] else "resized")
    )
    if lost := content["masks_that_lost_a_class"]:
        print(f"note: {lost} masks lost a class in resizing: see the scores at the own sizes")
    for name in ("dice_per_image", "iou_per_image"):
        print(f"  {name:<20}{content[name]:.4f}{_interval(*content[f'{name}_interval'])}")
    pooled = [f"{ratio.__name__}_pooled" for ratio in RATIOS]
    for name in ("precision_per_image", "recall_per_image", *pooled, "accuracy"):
        print(f"  {name:<20}{content[name]:.4f}")
    print("  at the pictures' own sizes (means per image; distances in % of the diagonal):")
    (show_classes if "by_class" in own_size else show_foreground)(own_size)
    print(f"    calibration error {own_size['calibration_error']:.4f}")
    if best and best["threshold"] != 0.5 and content["what"] == "validation":
        print(
            f"    dice at threshold {best['threshold']:g}: {best['dice']:.4f}, at 0.5: "
            f"{best['dice_at_half']:.4f}; 0.5 is used unless you say --threshold"
        )
    for name, value in counted.items():
        print(f"  {name:<20}{value:{',' if isinstance(value, int) else '.2f'}}")
    if shifted := content.get("shifted"):
        print("  dice_per_image of shifted pictures, their mean, and the drop to it:")
    for name, scores in (shifted or {}).items():
        interval = _interval(*scores["dice_per_image_interval"])
        print(f"    {name:<18}{scores['dice_per_image']:.4f}{interval}")
    if "negatives" in content:
        show_negatives(content["negatives"])


def _interval(low: float, high: float) -> str:
    """An interval as text; none of one image, or of equal ones."""
    return f"   95 % interval {low:.4f} to {high:.4f}" if low < high else ""


def show_foreground(own_size: dict[str, Any]) -> None:
    """Print the scores of one class."""
    for name, value in own_size["per_image"].items():
        print(f"    {name:<18}{value['mean']:.4f}{_interval(*value['interval'])}")
    for polyp, values in own_size["by_polyp_size"].items():
        if values["n_images"]:
            mean, n = values["per_image"]["dice"]["mean"], values["n_images"]
            print(f"    {'dice, ' + polyp:<18}{mean:.4f}   {n} images")


def show_negatives(scores: dict[str, Any]) -> None:
    """Print how often an object is claimed where none is."""
    print(
        f"  claims of an object in {scores['crops']} parts without one, by their area "
        f"({scores['pictures_without']} pictures have no such part):"
    )
    rows = {f"above {100 * float(k):g} %": v for k, v in scores["claims"].items()}
    for name, value in {**rows, "mean area": scores["claimed_area"]}.items():
        print(f"    {name:<18}{value['mean']:.4f}{_interval(*value['interval'])}")


def show_classes(own_size: dict[str, Any]) -> None:
    """Print the scores of several classes."""
    keys = [ratio.__name__ for ratio in RATIOS]
    means = {
        "mean": own_size["mean_of_classes"],
        "mean without background": own_size["mean_without_background"],
    }
    print(f"    {'of all pixels':<24}{''.join(f'{key:>11}' for key in keys)}   images with it")
    for name, values in own_size["by_class"].items():
        ratios = "".join(f"{values['pooled'][key]:>11.4f}" for key in keys)
        print(f"    {name[:23]:<24}{ratios}{values['n_images_with_it'] or 'in no mask':>17}")
    for name, values in means.items():
        if "background" in own_size["by_class"] or name == "mean":
            print(f"    {name:<24}{''.join(f'{values[key]:>11.4f}' for key in keys)}")


def stem_of(
    options: Options,
    trained: runs.Trained,
    what: str,
    window: tuple[int, int] | None,
    image_format: ImageFormat,
) -> str:
    """The name of the report without its suffix."""
    stem = f"evaluation-{what}" + ("" if trained.checkpoint == "best" else f"-{trained.checkpoint}")
    stem += "-flips" if options.flips else ""
    if options.window is not None and window is not None:
        stem += "-window-" + "x".join(map(str, window))
    stem += f"-threshold-{options.threshold:g}" if options.threshold != 0.5 else ""
    stem += "-ranged" if image_format != trained.image_format else ""
    stem += "-shifted" if options.shifted else ""
    return stem + ("-negatives" if options.negatives else "")


def check_replaced(file: Path, given: dict[str, Any]) -> None:
    """Compare a new report with the one that it would replace.

    Raises:
        ValueError: that one is of another model, of other pictures or masks, or they mean something
            else there.
    """
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError):
        return
    if any(old.get(name, value) != value for name, value in given.items()):
        raise ValueError(
            f"{file} is of another model, of other pictures or masks, or they mean something else "
            "there: choose another folder with --out, or remove it"
        )


def run(options: Options) -> None:
    """Score, print a table, write evaluation-WHAT.json and pictures."""
    on_validation = options.images is None and options.split == "validation"
    which = options.checkpoint or ("latest" if on_validation else "best")
    if options.out is None and options.workdir == zoo.shipped(options.workdir.name):
        raise ValueError("the folder of a shipped model is not for reports: add --out FOLDER")
    out = options.out or options.workdir
    runs.check_writable(out)
    trained = runs.load_model(options.workdir, which)
    settings = trained.settings
    source, what, protocol = open_split(options, trained)
    mesh = devices.make_mesh(options.devices)
    model, size = trained.predictor(
        flips=options.flips, window=options.window, progress=True, mesh=mesh
    )
    mask_format = format_of(options, trained, source)
    image_format = options.ranges.apply(trained.image_format)
    given = {
        "images": images.to_json(image_format),
        "masks": formats.to_json(mask_format),
        "fingerprint": data.fingerprint(source),
    }
    window = model.window if size is None else None
    stem = stem_of(options, trained, what, window, image_format)
    if options.out is not None:  # a folder that reports of several models may be written to
        given["model"] = str(options.workdir)
    check_replaced(out / f"{stem}.json", given)
    read: dict[str, Any] = {"mask_format": mask_format, "image_format": image_format}
    how = {"loss_fn": trained.loss_fn, "threshold": options.threshold, "tolerance": TOLERANCE}
    how |= {"batch_size": settings.batch_size, "mesh": mesh}
    scored = partial(score, model, trained.variables, size=size, **how)
    batches, sections = score_all(options, scored, source, **read)
    scores, counts, reliability = report(batches, mask_format.learned)
    content = {
        "what": what,
        "dataset": settings.dataset if options.images is None else str(options.images),
        "protocol": protocol,
        "split": options.split if options.images is None else None,
        "checkpoint": trained.checkpoint,
        "step": trained.step,
        "flips": options.flips,
        "threshold": options.threshold,
        "image_size": settings.image_size if size else None,
        "window": window,
        **given,
        "cost": cost(model, trained.variables, batches),
        "surface_dice_tolerance": TOLERANCE,
        **scores,
    }
    if "ensemble" in trained.config:
        content["ensemble"] = trained.config["ensemble"]
    content |= sections
    if trained.checkpoint == "best" and on_validation:
        print("note: the best checkpoint was chosen on these very images")
    if options.images is None and trained.fingerprints.get(what) != given["fingerprint"]:
        print("warning: these are not the pictures that the run was started with", file=sys.stderr)
    rows = scores["own_size"]["images"]  # of several classes the table says which are in no mask
    if mask_format.channels == 1 and not any(row["foreground_fraction"] for row in rows):
        print(
            f"warning: none of the {len(source)} masks has an object, of {mask_format}: if some "
            "do, say which values with --foreground",
            file=sys.stderr,
        )
    dice = metrics.dice(counts).mean(-1)
    order = np.argsort(-dice, kind="stable")
    chosen = [int(order[i]) for i in (0, len(source) // 2, -1)]
    shown = [f"{scores['own_size']['images'][i]['name']} (Dice {dice[i]:.3f})" for i in chosen]
    out.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(out / f"{stem}.json", json.dumps(content, indent=2) + "\n")
    captions = [f"{word}: {each}" for word, each in zip(WORDS, shown, strict=True)]
    drawn = partial(panels, batches, source, threshold=options.threshold, **read)
    sheet = {caption: drawn(i) for caption, i in zip(captions, chosen, strict=True)}
    several = mask_format.channels > 1
    draw.save_sheet(out / f"{stem}.png", sheet, mask_format.names if several else ())
    draw.save_reliability(out / f"{stem}-reliability.png", reliability)
    written = ".png and -reliability.png"
    if several and not mask_format.overlapping:
        matrix = np.array(scores["own_size"]["confusion_matrix"])
        draw.save_confusion(out / f"{stem}-confusion.png", matrix, mask_format.names)
        written = ".png, -confusion.png and -reliability.png"
    page = report_html(
        title=f"{settings.recipe} on {content['dataset']}, {what}",
        config=trained.config,
        history=read_lines(options.workdir / "metrics.jsonl"),
        evaluation=content,
        pictures={caption: np.concatenate(row, axis=1) for caption, row in sheet.items()},
        reliability=reliability,
    )
    report_file = out / f"{stem.replace('evaluation', 'report', 1)}.html"
    runs.write_atomically(report_file, page)
    show(content)
    print("  best, median, worst: " + ", ".join(shown))
    print(f"written: {out / stem}.json, {written}")
    print(f"the pictures: {(out / stem).as_uri()}.png")
    print(f"the report: {report_file.as_uri()}")


def score_all(
    options: Options,
    scored: Callable[..., Iterator[Scores]],
    source: Sequence[dict[str, Any]],
    mask_format: MaskFormat,
    image_format: ImageFormat,
) -> tuple[list[Scores], dict[str, Any]]:
    """The scores of the pictures, and the parts `shifted` and `negatives` of the report.

    Args:
        options: say which of the two are asked for.
        scored: `score` of a source, mask format and image format.
        source: the pictures.
        mask_format, image_format: what their values mean.
    """
    names = shifts.SHIFTS if options.shifted else ()
    shifted = {name: shifts.Shifted(source, name, mask_format, image_format) for name in names}
    parts = None
    if options.negatives:
        with program.task(f"looking for parts without an object in {len(source)} pictures"):
            parts = negatives.Negatives(source, mask_format, image_format)
    total = len(source) * (1 + len(shifted)) + len(parts or ())
    print(f"predicting {total} pictures, after compiling", flush=True)
    sections: dict[str, Any] = {}
    with tqdm(total=total, unit=" pictures", leave=False, disable=None) as bar:

        def shown(
            source: Any, mask_format: MaskFormat, image_format: ImageFormat = image_format
        ) -> Iterator[Scores]:
            for batch in scored(source, mask_format=mask_format, image_format=image_format):
                yield batch
                bar.update(len(batch.name))

        batches = list(shown(source, mask_format))
        if shifted:
            counts = {name: counts_of(shown(x, x.mask_format)) for name, x in shifted.items()}
            sections["shifted"] = shifts.summary(counts_of(batches), counts)
        if parts is not None:
            claims = counts_of(shown(parts, parts.mask_format, parts.image_format))
            sections["negatives"] = negatives.summary(parts, claims)
    return batches, sections


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, which a training may be writing; [] if there is no file."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    needed = {"epoch", "loss", "val_loss", "dice_per_image", "val_dice_per_image"}
    return [line for line in map(runs.parse_line, lines) if needed <= line.keys()]


def panels(
    batches: list[Scores],
    source: Sequence[dict[str, Any]],
    i: int,
    *,
    threshold: float,
    **read: Any,
) -> Panels:
    """The panels of picture i, from the picture and its mask at their own size."""
    batch, row = batches[i // (size := len(batches[0].name))], i % size
    image, mask = data.decode_pair(source[i], **read)
    prediction = batch.prediction[row]
    if prediction.dtype == np.uint8:
        prediction = resize_mask(prediction, mask.shape[:2])
    else:
        prediction = resize_image(prediction.astype(np.float32), mask.shape[:2])
    return draw.panels(image, prediction, mask, threshold=threshold)


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
