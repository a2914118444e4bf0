"""What each ingredient of `strong` contributes: `flax-unet ablate --workdir runs/ablation`.

Trains the recipe, and the recipe with one ingredient changed at a time, and scores the last state
of each on the validation split. Finished training runs are reused. Intervals cover the variation
over pictures only: each row is one training run, so the variation over seeds is not included.

example:
  flax-unet ablate --workdir runs/ablation --protocol effisegnet --image-size 96 --epochs 60
"""

from dataclasses import replace

import numpy as np

from flax_unet import metrics, runs
from flax_unet.recipes import RECIPES, Adam, Recipe
from flax_unet_cli import program
from flax_unet_cli.study import UNUSED, open_study, settings_for, train_and_score
from flax_unet_cli.train import Options

STRONG = RECIPES["strong"]
_AFFINE = STRONG.augment["random_affine"]
_FLIPS = {name: 1.0 if name == "scale" else 0.0 for name in _AFFINE}  # mirrored, not moved

#: The recipe with an ingredient left out, or replaced by a simpler one.
ROWS = {
    "strong": STRONG,
    "flips instead of affine and elastic warp": replace(
        STRONG, augment=STRONG.augment | {"random_affine": _FLIPS}
    ),
    "no colour changes, blur or noise": replace(STRONG, augment={"random_affine": _AFFINE}),
    "BCE alone": replace(STRONG, loss="bce"),
    "instance norm instead of batch norm": replace(
        STRONG, model=STRONG.model.clone(norm="instance")
    ),
    "plain blocks, logits of the last level only": replace(
        STRONG, model=STRONG.model.clone(residual=False, deep=False)
    ),
    "Adam at a constant rate instead of scheduled AdamW, no average": replace(
        STRONG, optimizer=Adam()
    ),
}


def table_row(name: str, values: np.ndarray, base: np.ndarray) -> str:
    """A row of the table: the mean, and its difference from the recipe's with an interval."""
    low, high = metrics.bootstrap_interval(values - base)
    verdict = "not significant" if low <= 0 <= high else ""
    gap = (values - base).mean()
    return f"| {name} | {values.mean():.3f} | {gap:+.3f} ({low:+.3f} to {high:+.3f}) | {verdict} |"


def run(options: Options) -> None:
    """Train what is missing, and print the table."""
    arrays = open_study(options, "strong")
    settings = settings_for(options, "strong")
    rows: dict[str, Recipe] = {
        name: runs.configure(recipe, settings) for name, recipe in ROWS.items()
    }
    scores = {
        name: train_and_score(options.places.workdir, settings, recipe, arrays, name)
        for name, recipe in rows.items()
    }
    base = scores["strong"]["dice"]
    print("| | Dice per image | difference (95 % interval) | |\n|---|---|---|---|")
    print(f"| strong | {base.mean():.3f} | | |")
    for name in [*rows][1:]:
        print(table_row(name, scores[name]["dice"], base))
    print(table_row("with flips in prediction", scores["strong"]["dice_flips"], base))


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args, unused=(*UNUSED, "encoder"))
