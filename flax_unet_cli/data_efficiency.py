"""Dice against the number of training pictures: `flax-unet data-efficiency --workdir runs/subsets`.

Trains `strong` and `pretrained` on fractions of the training pictures, each time for as many steps
(rounded up to entire epochs) as `--epochs` takes with all of them, scores the last state on the
validation split, and draws data-efficiency.png. Finished training runs are reused. A bar is the
95 % interval over the validation pictures, for one training run and one choice of pictures.

example:
  flax-unet data-efficiency --workdir runs/subsets --protocol effisegnet --image-size 96
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_unet import data, metrics, runs
from flax_unet_cli import program
from flax_unet_cli.study import UNUSED, open_study, settings_for, train_and_score
from flax_unet_cli.train import Options

RECIPES = ("strong", "pretrained")
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 1.0)


def dice_by_images(
    workdir: Path, settings: runs.Settings, arrays: dict[str, data.Arrays]
) -> dict[int, np.ndarray]:
    """{number of training pictures: Dice per validation picture}, from nested random subsets."""
    train, results = arrays["train"], {}
    order = data.shuffled(len(train.image), settings.seed, epoch=0)
    steps = settings.epochs * -(-len(order) // settings.batch_size)
    for fraction in FRACTIONS:
        index = order[: max(1, round(fraction * len(order)))]
        names = [train.name[i] for i in index]
        subset = train._replace(image=train.image[index], mask=train.mask[index], name=names)
        subset_settings = replace(
            settings, epochs=-(-steps // -(-len(index) // settings.batch_size))
        )
        name = f"{settings.recipe} on {len(index)} images"
        recipe = runs.recipe_of(subset_settings)
        scores = train_and_score(workdir, subset_settings, recipe, arrays | {"train": subset}, name)
        results[len(index)] = scores["dice"]
    return results


def save_picture(file: Path, results: dict[str, dict[int, np.ndarray]]) -> None:
    """Draw a curve per recipe as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for recipe, dice in results.items():
        mean = np.array([values.mean() for values in dice.values()])
        low, high = np.transpose([metrics.bootstrap_interval(v) for v in dice.values()])
        bars = np.maximum([mean - low, high - mean], 0)
        axes.errorbar([*dice], mean, bars, marker="o", capsize=3, label=recipe)
    axes.set(xscale="log", xlabel="training pictures", ylabel="Dice, mean over validation pictures")
    ticks = sorted({n for dice in results.values() for n in dice})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def run(options: Options) -> None:
    """Train what is missing, print the table, draw the picture."""
    arrays = open_study(options, *RECIPES)
    workdir = options.places.workdir
    results = {
        name: dice_by_images(workdir, settings_for(options, name), arrays) for name in RECIPES
    }
    print("| training pictures | " + " | ".join(RECIPES) + " |\n|---" + "|---" * len(results) + "|")
    for n in results[RECIPES[0]]:
        cells = []
        for dice in results.values():
            low, high = metrics.bootstrap_interval(dice[n])
            cells.append(f"{dice[n].mean():.3f} ({low:.3f} to {high:.3f})")
        print(f"| {n} | {' | '.join(cells)} |")
    save_picture(workdir / "data-efficiency.png", results)


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args, unused=UNUSED)
