"""Train a run for each of K folds, and score each picture by the run that did not see it.

Folds are made of the training and the validation pictures, and keep the pictures of a --group
together. WORKDIR/fold-0, fold-1, ... are ordinary runs, as `flax-unet train --fold I K` trains
them, also on several machines; run this program again to resume, or to make the table. The last
state of each run is scored, not the best one, which was chosen on the very fold.

The table is printed, and written as cross-validation.md and .json. The test pictures are not looked
at: WORKDIR is then a model, the ensemble of the folds, which evaluate and predict take. It has the
best state of each, or with --checkpoint latest that of the table.

example:
  flax-unet cross-validate --workdir runs/folds --folds 5 --recipe strong --image-size 96
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_unet import checkpoint, metrics, runs
from flax_unet_cli import evaluate, program, train

#: Scores of the table, per image: means over classes if there are several.
SCORES = "dice", "iou"
UNUSED = "fold", "distributed", "coordinator", "process"


@dataclass(frozen=True)
class Options(train.Options):
    """Flags of cross-validate: those of train."""

    folds: int = 5
    """Number of folds, 2 or more."""


def run(options: Options) -> int:
    """Train what is missing, score all folds, and write the table.

    Raises:
        ValueError, OSError: a setting or the data is unusable, or a fold is of another run.
    """
    workdir = options.places.workdir
    if options.folds < 2:
        raise ValueError(f"--folds is {options.folds}: it must be 2 or more")
    if (workdir / "config.json").exists() or (workdir / "model.json").exists():
        raise ValueError(f"{workdir} holds a run or a model: choose another --workdir")
    init = options.settings.init
    if init is not None:
        train.warn(f"if {init} was trained on these pictures, the scores of the folds are too high")
    folds = [workdir / f"fold-{i}" for i in range(options.folds)]
    check_alike([fold for fold in folds if checkpoint.exists(fold / "checkpoints")])
    for i, fold in enumerate(folds):
        print(f"fold {i} of {len(folds)}: {fold}")
        settings = replace(options.settings, fold=(i, len(folds)))
        places = replace(options.places, workdir=fold)
        if code := train.complete(replace(options, settings=settings, places=places)):
            return code
        if not options.dry_run:
            check_alike(folds[: i + 1])
    if options.dry_run:
        return 0
    epochs = {runs.recorded_config(fold)["settings"]["epochs"] for fold in folds}
    if len(epochs) > 1:
        raise ValueError(
            f"the folds in {workdir} were trained for {min(epochs)} to {max(epochs)} epochs: give "
            f"--epochs {max(epochs)}"
        )
    for fold in folds:
        evaluate.run(evaluate.Options(fold, split="validation", devices=options.devices))
    content = {"init": init and str(init), **summarise(folds)}
    text = table(content)
    runs.write_atomically(workdir / "cross-validation.md", text)
    runs.write_atomically(workdir / runs.CROSS_VALIDATION, json.dumps(content, indent=2) + "\n")
    print(f"\n{text}\nnext, with the ensemble of the folds:")
    print(f"  {program.command('evaluate', '--workdir', workdir)}")
    print(
        f"  {program.command('predict', '--workdir', workdir, '--out', 'predictions/', 'PICTURES')}"
    )
    return 0


def check_alike(folds: list[Path]) -> None:
    """Compare the formats of images and masks, which a run records if no flag gives them.

    Raises:
        ValueError: the folds differ in one of them.
    """
    configs = [runs.recorded_config(fold) for fold in folds]
    for section, flag in (("images", "--value-range"), ("masks", "--classes")):
        for fold, config in zip(folds[1:], configs[1:], strict=True):
            if config.get(section) != configs[0].get(section):
                raise ValueError(
                    f"{fold} and {folds[0]} were trained with other {section} "
                    f"({config.get(section)}, {configs[0].get(section)}): remove the wrong ones, "
                    f"and give {flag} for all"
                )


def summarise(folds: list[Path]) -> dict[str, Any]:
    """The scores of the folds, from the reports that evaluate wrote, at the pictures' own sizes.

    Returns:
        Of each fold its workdir, step, number of images and mean scores; the mean and the standard
        deviation (of a sample) of these over folds; and the mean over all images, with its 95 %
        interval.
    """
    rows, values, classes = [], [], []
    for fold in folds:
        report = json.loads((fold / "evaluation-validation-latest.json").read_text())
        images, classes = report["own_size"]["images"], report["classes"]
        if isinstance(images[0].get("dice"), float):  # one class: without the background
            classes = classes[1:]
        values.append(np.array([per_image(image, classes) for image in images]))
        scores = dict(zip(SCORES, values[-1].mean(0).tolist(), strict=True))
        rows.append(
            {"workdir": fold.name, "step": report["step"], "n_images": len(images), **scores}
        )
    means, together = np.array([each.mean(0) for each in values]), np.concatenate(values)
    intervals = metrics.bootstrap_interval(together)
    return {
        "classes": classes,
        "folds": rows,
        "over_folds": {
            name: {"mean": mean, "standard_deviation": deviation}
            for name, mean, deviation in zip(
                SCORES, means.mean(0).tolist(), means.std(0, ddof=1).tolist(), strict=True
            )
        },
        "all_images": {
            "n_images": len(together),
            **{
                name: {"mean": mean, "interval": interval}
                for name, mean, interval in zip(
                    SCORES, together.mean(0).tolist(), intervals, strict=True
                )
            },
        },
    }


def per_image(image: dict[str, Any], classes: list[str]) -> list[float]:
    """The scores of an image in a report."""
    one = isinstance(image.get("dice"), float)
    each = [image] if one else [image[name] for name in classes]
    return [float(np.mean([scores[name] for scores in each])) for name in SCORES]


def table(content: dict[str, Any]) -> str:
    """The scores in Markdown."""
    lines = ["| fold | images | Dice per image | IoU per image |", "|---|---|---|---|"]
    for i, row in enumerate(content["folds"]):
        lines.append(f"| {i} | {row['n_images']} | {row['dice']:.3f} | {row['iou']:.3f} |")
    cells = " | ".join(
        f"{x['mean']:.3f} ± {x['standard_deviation']:.3f}" for x in content["over_folds"].values()
    )
    lines.append(f"| mean ± standard deviation over folds | | {cells} |")
    all_images = content["all_images"]
    pairs = ((all_images[name]["mean"], *all_images[name]["interval"]) for name in SCORES)
    cells = " | ".join(f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in pairs)
    n = all_images["n_images"]
    seen = f" (what {content['init']} saw is not known)" if content["init"] else ""
    lines.append(f"| all images, each by the run that did not see it{seen} | {n} | {cells} |")
    if len(names := content["classes"]) > 1:
        lines += [
            "",
            f"The scores of an image are means over its classes, {', '.join(names)}. A class",
        ]
        lines += ["that is neither in the mask nor predicted scores 1."]
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args, unused=UNUSED)
