"""What a few annotated pictures give.

    python experiments/data_efficiency.py --workdir runs/shares

Trains `strong` and `pretrained` on a share of the training images, each time for as many steps (to
a whole epoch) as `--epochs` takes with all of them, scores the last state on the validation split,
and draws Dice against the number of images: data-efficiency.png. What is done already is not done
again. A bar is the 95 % interval over the validation images, of one training and one choice of
images.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro
from ablate import open_study, score
from recipes import Config, absolute, keep_compiled, make_recipe

from flax_unet import data, metrics

RECIPES = ("strong", "pretrained")
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)


def dice_by_images(config: Config, arrays: dict[str, data.Arrays]) -> dict[int, np.ndarray]:
    """Dice of each validation image after training on the first images of a drawn order."""
    train, found = arrays["train"], {}
    order = data.shuffled(len(train.image), config.seed, epoch=0)
    for share in SHARES:
        index = order[: max(1, round(share * len(order)))]
        names = [train.name[i] for i in index]
        some = train._replace(image=train.image[index], mask=train.mask[index], name=names)
        steps = config.epochs * -(-len(order) // config.batch_size)
        longer = replace(config, epochs=-(-steps // -(-len(index) // config.batch_size)))
        recipe = make_recipe(longer, len(index))
        name = f"{config.recipe} on {len(index)} images"
        found[len(index)] = score(longer, recipe, arrays | {"train": some}, name)["dice"]
    return found


def save_picture(file: Path, found: dict[str, dict[int, np.ndarray]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for recipe, of_recipe in found.items():
        mean = np.array([values.mean() for values in of_recipe.values()])
        low, high = np.transpose([metrics.bootstrap_interval(v) for v in of_recipe.values()])
        bars = np.maximum([mean - low, high - mean], 0)
        axes.errorbar([*of_recipe], mean, bars, marker="o", capsize=3, label=recipe)
    axes.set(xscale="log", xlabel="training images", ylabel="Dice, mean over validation images")
    ticks = sorted({n for of_recipe in found.values() for n in of_recipe})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main(args: list[str] | None = None) -> int:
    given = absolute(tyro.cli(Config, description=__doc__, args=args))
    keep_compiled()
    try:
        arrays = open_study(given, *RECIPES, unused=("recipe", "init", "stream"))
        found = {name: dice_by_images(replace(given, recipe=name), arrays) for name in RECIPES}
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| training images | " + " | ".join(RECIPES) + " |\n|---" + "|---" * len(found) + "|")
    for n in found[RECIPES[0]]:
        cells = []
        for of_recipe in found.values():
            low, high = metrics.bootstrap_interval(of_recipe[n])
            cells.append(f"{of_recipe[n].mean():.3f} ({low:.3f} to {high:.3f})")
        print(f"| {n} | {' | '.join(cells)} |")
    save_picture(given.workdir / "data-efficiency.png", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
