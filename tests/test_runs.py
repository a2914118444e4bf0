"""A run's folder and the model in it. Nothing is trained: `make_run` saves an initial state."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_unet import checkpoint, efficientnet, losses, pack, recipes, runs
from flax_unet.model import UNet
from flax_unet.recipes import RECIPES, Adam, AdamW
from flax_unet.runs import Places, Settings

SMALL = Settings(dataset="folder", features=(2, 4), image_size=16, epochs=3)
DATA = {"train": "0" * 64, "validation": "1" * 64, "test": "2" * 64}


def config_of(workdir, settings=SMALL, data=DATA, **places):
    return runs.to_json(settings, Places(workdir, **places), runs.recipe_of(settings), data)


def make_run(workdir, settings=SMALL, dice=(0.5,)):
    """Write a run with an initial state per value of `dice`; return the last state."""
    recipe, state = runs.recipe_of(settings), None
    training = runs.build(settings, recipe, 20)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config_of(workdir, settings)))
    with checkpoint.open_checkpoints(workdir / "checkpoints") as checkpoints:
        for step, value in enumerate(dice):
            state = runs.create_state(settings, recipe, training, jax.random.key(step))
            state = state.replace(step=jnp.int32(step))
            checkpoint.save(checkpoints, state, {"records": []}, dice=value)
            checkpoints.wait_until_finished()
    return state


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose best checkpoint is its first, and the state of its latest."""
    workdir = tmp_path_factory.mktemp("made")
    return workdir, make_run(workdir, dice=(0.7, 0.2))


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run."""
    shutil.copytree(made[0], tmp_path / "run")
    places = {"places": {**config_of(made[0])["places"], "workdir": str(tmp_path / "run")}}
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | places))
    return tmp_path / "run"


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def snapshot(folder):
    """Every file and folder below a folder, with content and time of change."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


# Settings


def test_the_defaults_are_the_tutorials():
    settings = Settings()
    assert (settings.batch_size, settings.epochs, settings.image_size) == (8, 100, 256)
    assert settings.learning_rate == 1e-3 and settings.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "weak"}, "no recipe 'weak': choose one of unet, article, strong, pretrained"),
        ({"image_size": 0}, "image_size is 0: it must be positive"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"seed": -1}, r"seed is -1: it must be in \[0, 2\^63\)"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"image_size": 33}, "image_size 33 is not a multiple of 32"),
        ({"image_size": 32}, "leaves one pixel in the bottleneck"),
        ({"features": ()}, "give one to six positive numbers"),
        ({"fold": (2, 2)}, "fold is 2 2: give I K"),
        ({"fold": (0, 1)}, "fold is 0 1: give I K"),
        ({"encoder": "lite0"}, "encoder is lite0, but this recipe has none"),
        ({"encoder": "lite0", "recipe": "strong"}, "encoder is lite0, but this recipe has none"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        runs.recipe_of(Settings(**changes))


def test_one_pixel_in_the_bottleneck_is_refused_only_with_instance_norm():
    assert runs.recipe_of(Settings(image_size=32, recipe="article")).model.stride == 32
    assert runs.recipe_of(Settings(image_size=32, recipe="strong")).model.stride == 32


def test_a_recipe_of_ones_own_takes_the_settings_and_is_checked():
    own = recipes.Recipe(about="", model=UNet(features=(4, 8)), loss="bce_soft_dice")
    configured = runs.configure(own, replace(SMALL, dtype="bfloat16"))
    assert configured.model == UNet(features=(2, 4), dtype=jnp.dtype("bfloat16"))
    assert configured.loss == "bce_soft_dice"
    with pytest.raises(ValueError, match="image_size 17 is not a multiple of 2"):
        runs.configure(own, replace(SMALL, image_size=17))
    foreign = replace(own, model=UNet((4,), encoder=nn.Dense(3)))
    with pytest.raises(ValueError, match="Dense cannot be described, only Encoder can"):
        runs.configure(foreign, replace(SMALL, features=None))


@pytest.mark.parametrize(("images", "steps"), [(1, 3), (8, 3), (9, 6), (80, 30)])
def test_the_schedule_ends_with_the_last_step_whatever_the_number_of_images(images, steps):
    settings = replace(SMALL, recipe="strong", image_size=8)
    tx = runs.build(settings, runs.recipe_of(settings), images).tx
    params, rates = {"kernel": jnp.ones((1, 1))}, []
    state = tx.init(params)
    for _ in range(steps + 1):  # without a gradient, an update is learning rate x weight decay
        updates, state = tx.update({"kernel": jnp.zeros((1, 1))}, state, params)
        rates.append(float(-updates["kernel"][0, 0]))
    assert all(rate > 0 for rate in rates[1:steps]) and rates[steps] == pytest.approx(0, abs=1e-12)


# States


def test_a_state_does_not_depend_on_the_number_of_images_and_has_its_abstract_shapes():
    recipe = runs.recipe_of(SMALL)
    one, many = (runs.build(SMALL, recipe, n) for n in (1, 1000))
    states = [runs.create_state(SMALL, recipe, each, jax.random.key(0)) for each in (one, many)]
    assert_equal(states[0].variables, states[1].variables)
    abstract = runs.abstract_state(one)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), states[0])
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


def test_pretrained_starts_with_the_weights_of_imagenet():
    settings = Settings(recipe="pretrained", encoder="lite2", image_size=64, features=(2, 2, 2, 2))
    recipe = runs.recipe_of(settings)
    training = runs.build(settings, recipe, 20)
    state = runs.create_state(settings, recipe, training, jax.random.key(0))
    imagenet = efficientnet.imagenet("lite2")
    for variables in (state.variables, {"params": state.params, **state.model_state}):
        for kind in ("params", "batch_stats"):
            assert_equal(variables[kind]["encoder"], imagenet[kind])


def test_a_run_starts_from_the_best_parameters_of_another(run):
    settings = replace(SMALL, init=run)
    recipe = runs.recipe_of(settings)
    training = runs.build(settings, recipe, 20)
    state = runs.create_state(settings, recipe, training, jax.random.key(9))
    assert int(state.step) == 0
    assert_equal(state.variables, runs.load_model(run, "best").variables)


def test_parameters_of_another_network_are_refused_with_the_flags_that_fit(run):
    settings = replace(SMALL, init=run, features=(2, 3))
    recipe = runs.recipe_of(settings)
    training = runs.build(settings, recipe, 20)
    with pytest.raises(ValueError, match=f"--init {run} needs --recipe unet --features 2 4:"):
        runs.create_state(settings, recipe, training, jax.random.key(0))


# config.json


@pytest.mark.parametrize("name", RECIPES)
def test_config_json_gives_back_the_settings_the_places_and_the_network(tmp_path, name):
    settings = Settings(
        recipe=name, image_size=64, features=(4, 4, 4, 4), dtype="bfloat16", init=tmp_path
    )
    recipe, places = runs.recipe_of(settings), Places(tmp_path, images=Path("/there"), stream=True)
    stored = json.loads(json.dumps(runs.to_json(settings, places, recipe, DATA)))
    if name == "pretrained":  # what was left to the recipe is stored
        settings = replace(settings, encoder="lite0")
    assert runs.from_json(stored, tmp_path) == (settings, places)
    assert pack.build(stored["model"]) == recipe.model
    assert stored["training"] == recipes.describe(recipe) and stored["data"] == DATA
    assert {"python", "jax", "flax", "optax", "numpy"} <= stored["versions"].keys()
    assert "cpu" in stored["device"]


# The workdir


def test_an_empty_or_missing_workdir_is_free(tmp_path):
    new = config_of(tmp_path)
    assert runs.check_workdir(tmp_path, new) == (new, "")
    assert runs.check_workdir(tmp_path / "missing", new) == (new, "")
    assert not list(tmp_path.iterdir())


def test_the_workdir_of_a_run_without_checkpoints_is_free_up_to_its_second_epoch(tmp_path):
    new = config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path, replace(SMALL, seed=7))))
    for lines in range(3):
        (tmp_path / "metrics.jsonl").write_text("{}\n" * lines)
        assert runs.check_workdir(tmp_path, new) == (new, "")
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 3)
    with pytest.raises(ValueError, match="metrics.jsonl has no checkpoint to resume from"):
        runs.check_workdir(tmp_path, new)


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_files_of_another_program_are_refused(tmp_path, file):
    (tmp_path / file).write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=f"{file}.*choose another --workdir"):
        runs.check_workdir(tmp_path, config_of(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 3, "learning_rate": 0.5}, "learning_rate: 0.001 -> 0.5, seed: 0 -> 3"),
        ({"features": (4, 8)}, r"features: \[2, 4\] -> \[4, 8\]"),
        ({"recipe": "article"}, "norm: instance -> None"),
        ({"image_size": 32}, "image_size: 16 -> 32"),
        ({"dtype": "bfloat16"}, "dtype: float32 -> bfloat16"),
        ({"init": Path("/there")}, "init: None -> /there"),
    ],
)
def test_settings_that_change_the_result_are_refused_and_listed(run, changes, words):
    before = snapshot(run)
    with pytest.raises(ValueError, match=f"holds a run with other settings.*{words}"):
        runs.check_workdir(run, config_of(run, replace(SMALL, **changes)))
    assert snapshot(run) == before


def test_other_pictures_are_refused(run):
    with pytest.raises(ValueError, match="pictures of the train split: 000.* -> 333"):
        runs.check_workdir(run, config_of(run, data=DATA | {"train": "3" * 64}))


def test_the_folder_of_an_exported_model_is_no_workdir(run, tmp_path):
    trained = runs.load_model(run)
    about = {"settings": {}}
    pack.save(tmp_path / "out", pack.Packed(trained.model, trained.variables, 16, about))
    with pytest.raises(ValueError, match="holds an exported model: choose another --workdir"):
        runs.check_workdir(tmp_path / "out", config_of(tmp_path / "out"))
    pack.save(run, pack.Packed(trained.model, trained.variables, 16, about))
    with pytest.raises(ValueError, match="holds a run and an exported model"):
        runs.load_model(run)


def test_another_recipe_of_the_same_name_is_refused(run, monkeypatch):
    monkeypatch.setitem(RECIPES, "unet", replace(RECIPES["unet"], loss="bce_soft_dice"))
    with pytest.raises(ValueError, match="loss: bce -> bce_soft_dice"):
        runs.check_workdir(run, config_of(run))


def test_more_epochs_are_allowed_unless_the_schedule_spans_them(run):
    new = config_of(run, replace(SMALL, epochs=4))
    assert runs.check_workdir(run, new) == (new, "")
    strong = replace(SMALL, recipe="strong")
    (run / "config.json").write_text(json.dumps(config_of(run, strong)))
    assert runs.check_workdir(run, config_of(run, strong))[1] == ""
    with pytest.raises(ValueError, match=r"\(epochs: 3 -> 4\)"):
        runs.check_workdir(run, config_of(run, replace(strong, epochs=4)))


def test_versions_device_and_places_may_differ_and_are_listed(run):
    old = json.loads((run / "config.json").read_text())
    old |= {"versions": old["versions"] | {"jax": "0.0.1"}, "device": "8 x tpu"}
    (run / "config.json").write_text(json.dumps(old))
    content, changes = runs.check_workdir(run, config_of(run, images=Path("/there")))
    assert all(words in changes for words in ("jax: 0.0.1 ->", "device: 8 x tpu ->"))
    assert "images: None -> /there" in changes
    # Where the pictures are now; but the versions and the device that the run started with.
    assert content["places"]["images"] == "/there"
    assert (content["versions"]["jax"], content["device"]) == ("0.0.1", "8 x tpu")


def test_two_processes_cannot_train_in_one_workdir(tmp_path):
    pytest.importorskip("fcntl")
    with runs.locked(tmp_path):
        with pytest.raises(ValueError, match=f"another process is training in {tmp_path}"):
            with runs.locked(tmp_path):
                pass
    with runs.locked(tmp_path):
        pass


def test_no_file_can_be_removed_to_get_around_the_lock(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / ".lock").touch()
    with runs.locked(tmp_path) as check:
        for file in tmp_path.iterdir():
            file.unlink()
        with pytest.raises(ValueError, match="another process is training"):
            with runs.locked(tmp_path):
                pass
        check()
        tmp_path.rename(tmp_path.with_name("moved"))
        tmp_path.mkdir()
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} was moved or removed"):
            check()


def test_the_history_ends_with_the_last_checkpoint(tmp_path):
    assert runs.read_history(tmp_path, 0) == []
    lines = [{"epoch": i, "loss": 0.5} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.read_history(tmp_path, 2) == lines[:2]
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines[:2]


ROWS = [{"epoch": i, "loss": i / 7} for i in (1, 2, 3, 4)]
#: {what happened to it: metrics.jsonl after 4 epochs, what the message says}
DAMAGED = {
    "gone": (None, "it has 0 lines, and 4 epochs are done"),
    "empty": ([], "it has 0 lines, and 4 epochs are done"),
    "cut": (ROWS[:2], "it has 2 lines, and 4 epochs are done"),
    "cut in a line": ([*ROWS[:3], '{"epo'], "line 4 is not that of epoch 4"),
    "without the 2nd": ([ROWS[0], *ROWS[2:]], "line 2 is not that of epoch 2"),
    "the 2nd twice": ([*ROWS[:2], *ROWS[1:]], "line 3 is not that of epoch 3"),
    "a number": ([ROWS[0], 5, *ROWS[2:]], "line 2 is not that of epoch 2"),
    "not UTF-8": ([ROWS[0], b"\xff", *ROWS[2:]], "line 2 is not that of epoch 2"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_history_is_refused_or_written_again_from_the_checkpoint(tmp_path, case):
    rows, words = DAMAGED[case]
    file = tmp_path / "metrics.jsonl"
    content = None
    if rows is not None:
        encoded = (
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        )
        content = b"".join(row + b"\n" for row in encoded)
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"metrics.jsonl is damaged .{words}.: restore it"):
        runs.read_history(tmp_path, 4)
    assert (file.read_bytes() if file.exists() else None) == content
    with pytest.warns(UserWarning, match=f"metrics.jsonl: {words}; written again from the check"):
        assert runs.read_history(tmp_path, 4, ROWS) == ROWS
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS


def test_a_damaged_line_of_a_later_epoch_is_not_needed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert runs.read_history(tmp_path, 1) == [{"epoch": 1}]


def test_a_file_is_written_entirely_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("old")

    def killed(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)  # nothing is moved that is not on the disk
        runs.write_atomically(file, "new content")
    assert file.read_text() == "old"
    runs.write_atomically(file, "new content")
    assert file.read_text() == "new content"
    assert os.listdir(tmp_path) == ["config.json"]


# The trained model


def test_a_model_is_loaded_with_its_origin(made, run):
    latest, best = (runs.load_model(run, which) for which in ("latest", "best"))
    assert_equal(latest.variables, made[1].variables)
    assert (latest.step, best.step) == (1, 0)
    assert (latest.checkpoint, best.checkpoint) == ("latest", "best")
    assert best.settings == SMALL and best.places == Places(run)
    assert best.model == runs.recipe_of(SMALL).model and best.loss_fn is losses.bce
    assert best.fingerprints == DATA


def test_a_moved_run_is_loaded_from_where_it_is(run, tmp_path):
    run.rename(tmp_path / "after")
    assert runs.load_model(tmp_path / "after").places.workdir == tmp_path / "after"


def test_a_run_is_loaded_although_its_recipe_has_changed(made, run, monkeypatch):
    today = replace(
        RECIPES["unet"],
        model=UNet(features=(8, 8), norm=None, residual=True, convs=4),
        loss="bce_soft_dice",
        augment={},
        optimizer=AdamW(),
    )
    expected = runs.recipe_of(SMALL).model
    monkeypatch.setitem(RECIPES, "unet", today)
    trained = runs.load_model(run, "latest")
    assert trained.model == expected and trained.loss_fn is losses.bce
    assert_equal(trained.variables, made[1].variables)
    others = {name: recipe for name, recipe in RECIPES.items() if name != "unet"}
    monkeypatch.setattr(recipes, "RECIPES", others)  # deleted, it would come back at the end
    assert_equal(runs.load_model(run, "latest").variables, made[1].variables)


def test_averaged_parameters_are_loaded_although_the_recipe_has_changed(tmp_path, monkeypatch):
    settings = replace(SMALL, recipe="strong")
    state = make_run(tmp_path, settings)
    today = replace(RECIPES["strong"], loss="bce", optimizer=Adam())
    monkeypatch.setitem(RECIPES, "strong", today)
    trained = runs.load_model(tmp_path)
    assert trained.loss_fn is losses.bce_soft_dice
    assert_equal(trained.variables, state.variables)


def test_an_exported_model_is_loaded_like_its_run(run, tmp_path):
    trained = runs.load_model(run)
    about = runs.read_config(run) | {"step": 7, "checkpoint": "best"}
    pack.save(tmp_path / "model", pack.Packed(trained.model, trained.variables, 16, about))
    packed = runs.load_model(tmp_path / "model", "latest")  # `which` is for a run
    assert (packed.step, packed.checkpoint) == (7, "best")
    assert packed.places == Places(tmp_path / "model")
    same = ("settings", "model", "loss_fn", "fingerprints")
    assert all(getattr(packed, part) == getattr(trained, part) for part in same)
    pack.save(tmp_path / "other", pack.Packed(trained.model, trained.variables, 32, about))
    with pytest.raises(ValueError, match="its image_size is 32 and 16"):
        runs.load_model(tmp_path / "other")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*there is no run in this workdir"):
        runs.load_model(tmp_path)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    make_run(tmp_path, dice=())
    with pytest.raises(OSError, match="holds no best checkpoint: train first"):
        runs.load_model(tmp_path)


def spoil(part, key, value):
    def change(content):
        content[part][key] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: [], "config.json is damaged or not of a run"),
        (lambda content: {"hello": 1}, "config.json is damaged or not of a run"),
        (lambda content: content | {"versions": 7}, "config.json is damaged or not of a run"),
        (lambda content: content | {"data": [1]}, "config.json is damaged or not of a run"),
        (lambda content: {"config": 1, "free": 2}, "config.json is damaged or not of a run"),
        (spoil("settings", "depth", 3), "is of another version or program"),
        (spoil("model", "depth", 3), "is of another version or program.*a UNet has no depth"),
        (spoil("model", "encoder", {}), "is of another version or program"),
        (spoil("training", "loss", "hinge"), "is of another version or program.*hinge"),
        (spoil("model", "norm", "layer"), "is of another version or program"),
        (spoil("model", "features", [2, 4, 8]), "is damaged or of another model"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(run, change, words):
    content = change(json.loads((run / "config.json").read_text()))
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, OSError), match=f"{run}.*{words}"):
        runs.load_model(run)


@pytest.mark.parametrize("about", [{"by": "another"}, {"config": 1}, [], {"settings": {}}])
def test_a_packed_model_of_another_program_is_named(tmp_path, about):
    model = UNet(features=(2, 4))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    pack.save(tmp_path, pack.Packed(model, variables, 16, about))
    with pytest.raises(ValueError, match=f"{tmp_path} is of another version or program"):
        runs.load_model(tmp_path)


def test_a_workdir_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .*train only once in it at a time"):
        with runs.locked(tmp_path) as check:
            check()
