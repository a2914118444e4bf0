"""On the real pictures, if KVASIR_SEG_ZIP names the archive."""

import io
import json
import os
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

import tfds_kvasir
from flax_unet import data, predict, runs
from flax_unet.evaluate import evaluate
from flax_unet.fit import fit
from flax_unet_cli import evaluate as evaluate_program
from flax_unet_cli import train as train_program

pytestmark = pytest.mark.skipif(
    "KVASIR_SEG_ZIP" not in os.environ, reason="KVASIR_SEG_ZIP does not name the archive"
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_sixteen_steps_of_the_article(data_dir):
    source = tfds_kvasir.sources("kvasir_seg", data_dir=data_dir)["train"]
    arrays = data.load([source[i] for i in range(128)], 128)
    settings, losses = runs.Settings(recipe="article", image_size=128, epochs=1), []
    recipe = runs.recipe_of(settings)
    training = runs.build(settings, recipe, 128)
    [epoch] = fit(
        training.model,
        training.tx,
        training.loss_fn,
        runs.create_state(settings, recipe, training, jax.random.key(0)),
        128,
        partial(data.batches, data.to_device(arrays), settings.batch_size),
        key=jax.random.key(0),
        seed=0,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        augment=training.augment,
        on_step=lambda images, record: losses.append(record["loss"]),
    )
    assert len(losses) == 16 and np.isfinite(losses).all()
    assert epoch.metrics is not None and epoch.metrics["n_images"] == 128
    assert epoch.metrics["loss"] == pytest.approx(np.mean(losses))
    # The loss starts near log 2, that of a probability of 0.5, and decreases slowly: see
    # docs/results.md.
    assert 0.5 < losses[0] < 1 and np.mean(losses[-4:]) < losses[0]

    few = data.Arrays(arrays.image[:5], arrays.mask[:5], arrays.name[:5], "")
    variables = epoch.state.variables
    metrics, counts = evaluate(training.model, variables, few)
    assert metrics["n_images"] == 5 and counts.tp.shape == (5, 1)
    assert 0.5 < metrics["accuracy"] < 1
    picture = Image.open(io.BytesIO(source[0]["image"]))
    proba = predict.predict_picture(training.model, variables, picture, 128)
    assert proba.shape == (picture.height, picture.width, 1)
    assert 0 <= proba.min() and proba.max() <= 1


def test_medico_has_no_test_split_and_its_latest_checkpoint_is_scored(data_dir, tmp_path, capsys):
    workdir = tmp_path / "run"
    settings = f"--workdir {workdir} --data-dir {data_dir} --protocol medico --epochs 1"
    small = "--features 8 16 --image-size 32"
    assert train_program.main(f"{settings} {small}".split()) == 0
    assert "hours on 2 CPU cores" not in capsys.readouterr().out  # small images take less
    assert evaluate_program.main(["--workdir", str(workdir)]) == 1
    error = capsys.readouterr().err
    assert "medico has no split 'test': choose one of train, validation" in error
    assert evaluate_program.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    assert "medico, validation: 120 images, latest checkpoint" in capsys.readouterr().out
    report = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert report["checkpoint"] == "latest" and report["n_images"] == 120
