"""What each ingredient of `strong` gives: `python experiments/ablate.py --workdir runs/ablation`.

Trains the recipe, and the recipe with each ingredient changed in turn, and scores the last state of
each on the validation split. What is done already is not done again. An interval is over the images
of two trainings, one each: that another seed would give another difference is not in it.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import optax
import tyro
from recipes import (
    AUGMENT,
    DETERMINES,
    Config,
    Recipe,
    absolute,
    abstract_state,
    changes,
    create_state,
    keep_compiled,
    keras_adam,
    load_split,
    make_recipe,
    open_sources,
    to_json,
    write_atomically,
)
from tqdm import tqdm

from flax_unet import data, losses, metrics, predict, train
from flax_unet.efficientnet import imagenet

affine, *looks = AUGMENT["strong"]
nowhere = {name: 1.0 if name == "scale" else 0.0 for name in affine}  # mirrored, not moved

#: The recipe with an ingredient left out, or a simpler one in its place.
ROWS: dict[str, Callable[[Recipe, float], Recipe]] = {
    "strong": lambda r, rate: r,
    "flips for affine and elastic warp": lambda r, rate: r._replace(
        augment=changes(nowhere, *looks)
    ),
    "no change of colours, blur, noise": lambda r, rate: r._replace(augment=changes(affine)),
    "BCE alone": lambda r, rate: r._replace(loss_fn=losses.bce),
    "instance norm for batch norm": lambda r, rate: r._replace(
        model=r.model.clone(batch_norm=False, group_size=1)
    ),
    "plain blocks, logits of the last level": lambda r, rate: r._replace(
        model=r.model.clone(residual=False, deep=False)
    ),
    "Adam for the falling AdamW, no average": lambda r, rate: r._replace(tx=keras_adam(rate)),
}


def open_study(given: Config, *recipes: str, unused: tuple[str, ...]) -> dict[str, data.Arrays]:
    """The training and the validation split.

    Raises:
        ValueError: the settings do not fit one of the recipes, a flag of train.py that is `unused`
            here is given, or the data cannot be used.
        ModuleNotFoundError: the encoder's weights are not installed.
    """
    if ignored := [f for f in unused if getattr(given, f) != getattr(Config(given.workdir), f)]:
        raise ValueError(f"--{ignored[0]} has no use here: leave it out")
    for recipe in recipes:
        abstract_state(make_recipe(replace(given, recipe=recipe)))
        if recipe == "pretrained":
            imagenet(given.encoder)
    sources = open_sources(given)
    return {split: load_split(given, sources, split) for split in ("train", "validation")}


def score(
    config: Config, recipe: Recipe, arrays: dict[str, data.Arrays], name: str
) -> dict[str, np.ndarray]:
    """Dice of each validation image after the last epoch, `dice` as predicted, `dice_flips` with.

    They are kept in a file in the workdir, and what is there of the same settings and name is not
    made again.
    """
    settings = to_json(config, {split: each.fingerprint for split, each in arrays.items()})
    text = json.dumps([settings[part] for part in DETERMINES], sort_keys=True)
    kind = hashlib.sha256(text.encode()).hexdigest()[:8]  # other settings, other files
    file = config.workdir / f"{name.replace(' ', '-')}-{kind}.json"
    if not file.is_file():
        found = train_and_score(config, recipe, arrays, name)
        config.workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found) + "\n")
    return {what: np.array(values) for what, values in json.loads(file.read_text()).items()}


def train_and_score(
    config: Config, recipe: Recipe, arrays: dict[str, data.Arrays], name: str
) -> dict[str, list[float]]:
    """What `score` keeps.

    Raises:
        ValueError: the training diverged.
    """
    model, tx, loss_fn, change = recipe
    init_key, key = jax.random.split(jax.random.key(config.seed))
    state = create_state(config, recipe, init_key)
    step = train.make_train_step(model, tx, loss_fn, augment=change)
    resident = data.to_device(arrays["train"])
    for epoch in tqdm(range(config.epochs), desc=name, unit="epoch"):
        order = data.shuffled(len(resident.image), config.seed, epoch)
        for batch in data.batches(resident, config.batch_size, order):
            state, _ = step(state, batch, key)
        if not np.isfinite(optax.tree.norm(state.params)):
            raise ValueError(f"{name}: a parameter is not finite: try a smaller --learning-rate")
    scores = {}
    for what, network in {"dice": model, "dice_flips": predict.Mirrored(model)}.items():
        _, counts = predict.evaluate(network, state.variables, arrays["validation"])
        scores[what] = metrics.dice(counts).mean(-1).tolist()
    return scores


def row(name: str, values: np.ndarray, base: np.ndarray) -> str:
    """A line of the table: the mean, and the difference from the recipe with its interval."""
    low, high = metrics.bootstrap_interval(values - base)
    verdict = "not shown" if low <= 0 <= high else ""
    gap = (values - base).mean()
    return f"| {name} | {values.mean():.3f} | {gap:+.3f} ({low:+.3f} to {high:+.3f}) | {verdict} |"


def main(args: list[str] | None = None) -> int:
    given = absolute(tyro.cli(Config, description=__doc__, args=args))
    keep_compiled()
    try:
        config = replace(given, recipe="strong")
        arrays = open_study(given, "strong", unused=("recipe", "encoder", "init", "stream"))
        recipe = make_recipe(config, len(arrays["train"].image))
        if config.image_size == recipe.model.stride:
            raise ValueError("instance norm makes 0 of one pixel: take a larger --image-size")
        scores = {
            name: score(config, change(recipe, config.learning_rate), arrays, name)
            for name, change in ROWS.items()
        }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    base = scores["strong"]["dice"]
    print("| | Dice per image | difference (95 % interval) | |\n|---|---|---|---|")
    print(f"| strong | {base.mean():.3f} | | |")
    for name in [*ROWS][1:]:
        print(row(name, scores[name]["dice"], base))
    print(row("with flips in prediction", scores["strong"]["dice_flips"], base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
