"""What the studies share: training runs whose scores are kept in the workdir."""

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flax_unet import data, metrics, predict, runs
from flax_unet.efficientnet import imagenet
from flax_unet.evaluate import evaluate
from flax_unet.fit import fit
from flax_unet.recipes import Recipe
from flax_unet_cli.sources import (
    check_used,
    image_format_of,
    load_split,
    mask_format_of,
    open_sources,
)
from flax_unet_cli.train import Options

#: Flags of train that the studies have no use for: they compare networks for one class, in runs
#: that are short and are repeated if they are interrupted.
UNUSED = (
    "recipe",
    "init",
    "stream",
    "crop",
    "fold",
    "class_weights",
    "classes",
    "overlapping",
    "mask_files",
    "devices",
    "dry_run",
    "fsdp",
    "quiet",
    "save_every",
    "distributed",
    "coordinator",
    "process",
)


def open_study(options: Options, *recipes: str) -> dict[str, data.Arrays]:
    """The training and the validation split.

    Raises:
        ValueError: the settings do not fit one of the recipes, or the data is unusable.
        ModuleNotFoundError: the encoder's weights are not installed.
    """
    for name in recipes:
        recipe = runs.recipe_of(settings_for(options, name))
        if recipe.imagenet and recipe.model.encoder is not None:
            imagenet(recipe.model.encoder.variant)
    check_used(options.settings, options.places)
    sources = open_sources(options.settings, options.places, options.masks.classes)
    mask_format = mask_format_of(options.settings, sources, options.masks)
    if mask_format.channels > 1:
        raise ValueError("this program compares networks for one class: the masks have more")
    image_format = image_format_of(options.settings, sources, options.channels)
    return {
        split: load_split(options.settings, sources, split, mask_format, image_format)
        for split in ("train", "validation")
    }


def settings_for(options: Options, recipe: str) -> runs.Settings:
    """The settings with another recipe; --encoder applies only to `pretrained`."""
    encoder = options.settings.encoder if recipe == "pretrained" else None
    return replace(options.settings, recipe=recipe, encoder=encoder)


def train_and_score(
    workdir: Path,
    settings: runs.Settings,
    recipe: Recipe,
    arrays: dict[str, data.Arrays],
    name: str,
) -> dict[str, np.ndarray]:
    """Dice per validation image after the last epoch: `dice`, and with flips `dice_flips`.

    They are kept in a file in the workdir. Its name has a hash of all that determines them, so that
    a training is repeated if and only if its settings, recipe, data, device or package versions
    changed.

    Raises:
        FloatingPointError: the training diverged.
    """
    fingerprints = {split: each.fingerprint for split, each in arrays.items()}
    formats = arrays["train"].mask_format, arrays["train"].image_format
    content = runs.to_json(settings, runs.Places(workdir), recipe, fingerprints, *formats)
    content |= {"names": arrays["train"].name}  # of a subset, which has the fingerprint of the set
    parts = (*runs.DETERMINES, "names", "device", "versions")
    text = json.dumps([content[part] for part in parts], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    file = workdir / f"{name.replace(' ', '-')}-{key}.json"
    if not file.is_file():
        scores = _train_and_score(settings, recipe, arrays, name)
        workdir.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(file, json.dumps(scores) + "\n")
    return {kind: np.array(values) for kind, values in json.loads(file.read_text()).items()}


def _train_and_score(
    settings: runs.Settings, recipe: Recipe, arrays: dict[str, data.Arrays], name: str
) -> dict[str, list[float]]:
    n, size = len(arrays["train"].image), settings.batch_size
    training = runs.build(settings, recipe, n)
    init_key, key = jax.random.split(jax.random.key(settings.seed))
    channels = arrays["train"].image_format.channels
    state: Any = runs.create_state(settings, recipe, training, init_key, channels)
    epochs = fit(
        training.model,
        training.tx,
        training.loss_fn,
        state,
        n,
        partial(data.batches, data.to_device(arrays["train"]), size),
        key=key,
        seed=settings.seed,
        epochs=settings.epochs,
        batch_size=size,
        augment=training.augment,
    )
    try:
        for epoch in tqdm(epochs, desc=name, unit="epoch", total=settings.epochs):
            state = epoch.state
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}: {error}") from error
    model, scores = training.model, {}
    mirrored = predict.Mirrored(model, settings.upright)
    for kind, network in {"dice": model, "dice_flips": mirrored}.items():
        _, counts = evaluate(network, state.variables, arrays["validation"])
        scores[kind] = metrics.dice(counts).mean(-1).tolist()
    return scores
