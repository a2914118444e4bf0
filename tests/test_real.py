"""On the real pictures, where KVASIR_SEG_ZIP names the archive."""

import io
import json
import os

import evaluate as evaluate_program
import jax
import numpy as np
import pytest
import train as train_program
from PIL import Image
from recipes import Config, make_recipe

import tfds_kvasir
from flax_unet import data, predict, train

pytestmark = pytest.mark.skipif(
    "KVASIR_SEG_ZIP" not in os.environ, reason="KVASIR_SEG_ZIP does not name the archive"
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_sixteen_steps_of_the_article(data_dir):
    source = tfds_kvasir.sources("kvasir_seg", data_dir=data_dir)["train"]
    arrays = data.load([source[i] for i in range(128)], 128)
    model, tx, loss_fn, change = make_recipe(Config(data_dir, recipe="article"))
    key = jax.random.key(0)
    create = jax.jit(train.create_train_state, static_argnums=(0, 1, 3))
    state = create(model, tx, key, (1, 32, 32, 3))
    step = train.make_train_step(model, tx, loss_fn, augment=change)
    history = []
    for batch in data.batches(arrays, 8, data.shuffled(128, 0, 0)):
        state, figures = step(state, batch, key)
        history.append(float(figures["loss"]))
    assert len(history) == 16 and np.isfinite(history).all()
    # It begins near the entropy of a coin, log 2, and comes down slowly: see docs/results.md.
    assert 0.5 < history[0] < 1 and np.mean(history[-4:]) < history[0]

    few = data.Arrays(arrays.image[:5], arrays.mask[:5], arrays.name[:5], "")
    figures, counts = predict.evaluate(model, state.variables, few)
    assert figures["n_images"] == 5 and counts.tp.shape == (5, 1)
    assert 0.5 < figures["accuracy"] < 1
    picture = Image.open(io.BytesIO(source[0]["image"]))
    proba = predict.predict_picture(model, state.variables, picture, 128)
    assert proba.shape == (picture.height, picture.width, 1)
    assert 0 <= proba.min() and proba.max() <= 1


def test_medico_has_no_test_split_and_is_scored_by_its_latest(data_dir, tmp_path, capsys):
    workdir = tmp_path / "run"
    settings = f"--workdir {workdir} --data-dir {data_dir} --protocol medico --epochs 1"
    small = "--features 8 16 --image-size 32"
    assert train_program.main(f"{settings} {small}".split()) == 0
    assert evaluate_program.main(["--workdir", str(workdir)]) == 1
    error = capsys.readouterr().err
    assert "medico has no split 'test': choose one of train, validation" in error
    assert evaluate_program.main(["--workdir", str(workdir), "--split", "validation"]) == 0
    assert "medico, validation: 120 images, latest checkpoint" in capsys.readouterr().out
    report = json.loads((workdir / "evaluation-validation-latest.json").read_text())
    assert report["checkpoint"] == "latest" and report["n_images"] == 120
