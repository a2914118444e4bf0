"""Runs and models of version 0.1.0.

golden/run-0.1.0 was written by it: a run stopped after 4 of 18 steps, its pictures, the model that
it exported of that run, and in expected.json what it computed from them. golden/configs-0.1.0.json
holds its config.json for several flags.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import flax_unet_cli.evaluate
import flax_unet_cli.export
import flax_unet_cli.predict
import flax_unet_cli.train
from flax_unet import checkpoint, data, losses, metrics, pack, runs
from flax_unet.model import UNet

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "run-0.1.0" / "expected.json").read_text())
CONFIGS = json.loads((GOLDEN / "configs-0.1.0.json").read_text())
MODEL = UNet(
    (4, 8), convs=2, norm="batch", residual=True, patch=2, deep=True, dtype=jnp.dtype("float32")
)
WORKDIR, EXPORTED = "run-0.1.0/workdir", "run-0.1.0/exported"
IMAGES, MASKS = "run-0.1.0/images", "run-0.1.0/masks"


#: Of the recipes strong and pretrained.
OLD_AUGMENT = {
    "random_affine": {
        "rotation": 180.0,
        "scale": 1.5,
        "shear": 15.0,
        "shift": 0.125,
        "elastic": 0.02,
    },
    "random_colour": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 10.0},
    "random_blur": {"sigma": 1.0},
    "random_noise": {"deviation": 0.03},
}


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A copy of the old run, in the folder that its relative paths start from."""
    shutil.copytree(GOLDEN / "run-0.1.0", tmp_path / "run-0.1.0")
    monkeypatch.chdir(tmp_path)


def test_the_old_run_has_the_old_layout():
    items = {path.name for path in Path(WORKDIR, "checkpoints", "4").iterdir() if path.is_dir()}
    assert items == {"state", "progress", "metrics"}
    assert "config" in json.loads(Path(WORKDIR, "config.json").read_text())


@pytest.mark.parametrize("which", ["best", "latest"])
def test_an_old_run_is_loaded(which):
    trained = runs.load_model(WORKDIR, which)
    assert trained.model == MODEL and trained.loss_fn is losses.bce_soft_dice
    assert (trained.step, trained.checkpoint) == (4, which)
    settings = trained.settings
    assert (settings.recipe, settings.features, settings.image_size) == ("strong", (4, 8), 16)
    assert (settings.epochs, settings.encoder, settings.batch_size) == (3, None, 4)
    assert trained.places == runs.Places(
        Path(WORKDIR).absolute(), images=Path(IMAGES), masks=Path(MASKS), split_by="name"
    )
    assert set(trained.fingerprints) == set(data.SPLITS)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    assert jax.tree.map(jnp.shape, trained.variables) == jax.tree.map(jnp.shape, shapes)


def test_an_old_runs_variables_are_those_that_it_exported():
    ours, theirs = runs.load_model(WORKDIR, "latest"), runs.load_model(EXPORTED)
    assert theirs.model == MODEL and theirs.settings == ours.settings
    assert (theirs.step, theirs.checkpoint) == (4, "latest")
    for a, b in zip(*map(jax.tree.leaves, (ours.variables, theirs.variables)), strict=True):
        rounded = np.asarray(a, np.float16 if a.ndim > 1 else np.float32)
        np.testing.assert_array_equal(rounded.astype(np.float32), b)


def assert_expected(report, expected):
    numbers = {key: report[key] for key in expected if key != "own_dice"}
    numbers["own_dice"] = report["own_size"]["per_image"]["dice"]["mean"]
    assert numbers == pytest.approx(expected, rel=1e-5)


def test_an_old_run_is_evaluated(capsys):
    assert flax_unet_cli.evaluate.main(["--workdir", WORKDIR, "--split", "validation"]) == 0
    report = json.loads(Path(WORKDIR, "evaluation-validation-latest.json").read_text())
    assert_expected(report, EXPECTED["evaluation"])
    assert "not the pictures" not in capsys.readouterr().err  # the fingerprints are the run's


def evaluate_all(model):
    flags = ["--model", model, "--images", IMAGES, "--masks", MASKS, "--out", "reports"]
    assert flax_unet_cli.evaluate.main(flags) == 0
    return json.loads(Path("reports/evaluation-folder-run-0.1.0-images-latest.json").read_text())


def test_an_old_exported_model_is_evaluated():
    assert_expected(evaluate_all(EXPORTED), EXPECTED["exported"])


def test_an_old_run_is_exported_as_before():
    flags = ["--workdir", WORKDIR, "--checkpoint", "latest", "--out", "exported"]
    assert flax_unet_cli.export.main(flags) == 0
    with np.load("exported/weights.npz") as ours, np.load(f"{EXPORTED}/weights.npz") as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in ours.files:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert pack.load("exported").model == MODEL
    assert_expected(evaluate_all("exported"), EXPECTED["exported"])


def dice_of_predictions(names):
    counts = []
    for name in names:
        predicted, true = (
            np.asarray(Image.open(file)) > 127
            for file in (f"predictions/{name}-mask.png", f"{MASKS}/{name}.png")
        )
        pixels = (predicted & true, predicted & ~true, ~predicted & true, ~predicted & ~true)
        counts.append([int(x.sum()) for x in pixels])
    return metrics.dice(metrics.Confusion(*np.array(counts).T)).mean()


def test_an_old_exported_model_and_an_old_run_segment_pictures():
    assert flax_unet_cli.predict.main(["--model", EXPORTED, IMAGES]) == 0
    names = [entry["name"] for entry in data.FolderSource(IMAGES, MASKS)]
    assert len(names) == 24
    assert dice_of_predictions(names) == pytest.approx(EXPECTED["exported"]["own_dice"], rel=1e-5)
    shutil.rmtree("predictions")
    assert flax_unet_cli.predict.main(["--workdir", WORKDIR, "--checkpoint", "latest", IMAGES]) == 0
    source = data.FolderSource(IMAGES, MASKS, "validation", split_by="name")
    names = [entry["name"] for entry in source]
    assert dice_of_predictions(names) == pytest.approx(EXPECTED["evaluation"]["own_dice"], rel=1e-5)


FLAGS = [
    *("--workdir", WORKDIR, "--recipe", "strong", "--dataset", "folder"),
    *("--images", IMAGES, "--masks", MASKS, "--image-size", "16", "--features", "4", "8"),
    *("--batch-size", "4", "--epochs", "3", "--learning-rate", "0.01"),
]


def test_an_old_run_is_resumed_to_its_old_end(capsys):
    assert flax_unet_cli.train.main(FLAGS) == 0
    out, error = capsys.readouterr()
    assert "resuming after step 4" in out
    changed, warning = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert changed == (
        "warning: recipe strong has another augment now than when this run began; the run goes on "
        "with its own"
    )
    changes = warning.removeprefix("warning: resuming with other versions, device or places: ")
    changed = {change.split(": ")[0] for change in changes.split(", ")}
    assert changed <= {
        *runs.PACKAGES,
        "flax-unet",
        "python",
        "device",
        "workdir",
        "images",
        "masks",
    }
    assert {"workdir", "images", "masks"} <= changed  # absolute now
    history = [json.loads(x) for x in Path(WORKDIR, "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 3
    for line, expected in zip(history, EXPECTED["history"], strict=True):
        # On validation images it differs: batch statistics warm up since version 0.3.0.
        training = {key: value for key, value in expected.items() if not key.startswith("val_")}
        assert len(training) == 4
        assert {key: line[key] for key in training} == pytest.approx(training, rel=1e-4)
    # It is a run of today now.
    assert "settings" in json.loads(Path(WORKDIR, "config.json").read_text())
    last = runs.load_model(WORKDIR, "latest")
    assert last.step == 18 and Path(WORKDIR, "checkpoints", "18", "variables").is_dir()
    assert flax_unet_cli.train.main(FLAGS) == 0
    assert "all 3 epochs are done" in capsys.readouterr().out


def test_an_old_run_that_needs_something_else_is_not_resumed(capsys):
    file = Path(WORKDIR, "config.json")
    content = runs.upgrade(json.loads(file.read_text()))
    content["training"]["augment"]["random_other"] = {}
    content["versions"]["flax-unet"] = "9.8.7"
    file.write_text(json.dumps(content))
    assert flax_unet_cli.train.main(FLAGS) == 1
    words = "workdir cannot be resumed, .*random_other.*: resume it with flax-unet 9.8.7"
    assert re.search(words, capsys.readouterr().err)


def test_a_changed_flag_is_no_changed_recipe(capsys):
    assert flax_unet_cli.train.main([*FLAGS, "--upright"]) == 1
    error = capsys.readouterr().err
    assert "other settings (upright: False -> True)" in error and "recipe" not in error


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--learning-rate", "0.02", "learning_rate: 0.01 -> 0.02"),
        ("--epochs", "4", "epochs: 3 -> 4"),  # over which the rate falls
        ("--features", "8", "features: .4, 8. -> .8, 8."),
    ],
)
def test_an_old_run_is_not_resumed_with_other_settings(capsys, flag, value, words):
    flags = list(FLAGS)
    flags[flags.index(flag) + 1] = value
    assert flax_unet_cli.train.main(flags) == 1
    assert re.search(f"holds a run with other settings .*{words}", capsys.readouterr().err)
    assert "config" in json.loads(Path(WORKDIR, "config.json").read_text())


@pytest.mark.parametrize("source", [WORKDIR, EXPORTED])
def test_a_new_run_starts_from_an_old_one(source):
    settings = runs.Settings(
        recipe="strong", dataset="folder", features=(4, 8), image_size=16, init=Path(source)
    )
    recipe = runs.recipe_of(settings)
    state = runs.create_state(settings, recipe, runs.build(settings, recipe, 20), jax.random.key(0))
    expected = runs.load_model(source).variables
    for a, b in zip(*map(jax.tree.leaves, (state.variables, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.step) == 0


def test_a_damaged_old_checkpoint_is_named():
    for file in Path(WORKDIR, "checkpoints", "4", "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints/4 cannot be restored"):
        runs.load_model(WORKDIR)


def new_form(flags):
    """What this version writes for the same flags."""
    paths = ("workdir", "kvasir_zip", "images", "masks", "data_dir", "init")
    values = {name: Path(value) if name in paths else value for name, value in flags.items()}
    if "features" in values:
        values["features"] = tuple(values["features"])
    names = runs.Places.__dataclass_fields__
    places = {name: value for name, value in values.items() if name in names}
    places = runs.Places(**places, split_by="name")  # the old rule
    settings = runs.Settings(**{k: value for k, value in values.items() if k not in names})
    return settings, places, runs.to_json(settings, places, runs.recipe_of(settings), {})


@pytest.mark.parametrize("old", CONFIGS, ids=lambda old: json.dumps(old["flags"]["recipe"]))
def test_an_old_configuration_becomes_what_is_written_today(old):
    before = json.dumps(old["config.json"])
    settings, places, new = new_form(old["flags"])
    upgraded = runs.upgrade(old["config.json"])
    for section in ("settings", "model", "training", "places"):
        expected = new[section]
        if section == "training" and settings.recipe in ("strong", "pretrained"):
            expected = expected | {"augment": OLD_AUGMENT}
        assert upgraded[section] == expected
    assert upgraded.keys() == new.keys()
    for section in ("data", "device", "versions"):
        assert upgraded[section] == old["config.json"][section]
    assert json.dumps(old["config.json"]) == before  # the argument is unchanged
    assert runs.upgrade(upgraded) == upgraded  # today's form is left as it is
    model = runs.recipe_of(settings).model
    resolved = replace(settings, features=model.features, encoder=new["settings"]["encoder"])
    assert runs.from_json(upgraded, places.workdir) == (resolved, places)
    assert pack.build(upgraded["model"]) == model
