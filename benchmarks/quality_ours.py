"""A recipe of flax_unet, trained as `flax-unet train` does, for time_to_dice.py.

`python benchmarks/quality_ours.py DATA MINUTES RECIPE`; see quality.py.
"""

import sys
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import quality

from flax_unet import data, runs
from flax_unet.fit import fit
from flax_unet.predict import predict_proba

#: The length of the first stage in docs/results.md, which the schedule of the learning rate spans.
#: The rate of `unet` is constant: its training ends with the time.
EPOCHS = {"unet": 10_000, "strong": 90, "pretrained": 50}


def main() -> None:
    file, minutes, name = sys.argv[1:]
    train, validation = quality.read(file)
    settings = runs.Settings(recipe=name, image_size=train.image.shape[1], epochs=EPOCHS[name])
    recipe, n, size = runs.recipe_of(settings), len(train.image), settings.batch_size
    training = runs.build(settings, recipe, n)
    init_key, key = jax.random.split(jax.random.key(settings.seed))
    state = runs.create_state(settings, recipe, training, init_key)
    arrays = data.to_device(data.Arrays(*train, name=[""] * n, fingerprint=""))

    def epochs() -> Iterator[float]:
        nonlocal state
        for epoch in fit(
            *(training.model, training.tx, training.loss_fn, state, n),
            partial(data.batches, arrays, size),
            key=key,
            seed=settings.seed,
            epochs=settings.epochs,
            batch_size=size,
            augment=training.augment,
        ):
            assert epoch.metrics is not None
            state = epoch.state
            yield epoch.metrics["loss"]

    def predict(image: np.ndarray) -> np.ndarray:
        variables = state.variables
        batches = np.split(image, range(size, len(image), size))
        return np.concatenate([predict_proba(training.model, variables, x) for x in batches])

    quality.train(epochs(), predict, validation, float(minutes))


if __name__ == "__main__":
    main()
