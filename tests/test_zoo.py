"""The shipped models: their names, their folders, their checksums."""

import json
import shutil
from pathlib import Path

import drawn
import pytest

from flax_unet import data, losses, pack, runs, zoo
from flax_unet_cli import evaluate, export, train

MODELS = Path(__file__).parent.parent / "models"
WHAT_WAS_FOUND = "is a shipped model, and also"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_names_are_those_of_the_folders():
    assert [*zoo.NAMES] == sorted(file.parent.name for file in MODELS.glob("*/model.json"))


def test_a_name_is_the_folder_of_the_shipped_model(here):
    assert [zoo.folder(name) for name in zoo.NAMES] == [MODELS / name for name in zoo.NAMES]


def test_a_path_is_that_folder(here):
    (here / "mine").mkdir()
    assert (
        zoo.folder("mine") == zoo.folder(Path("mine")) == zoo.folder(here / "mine") == here / "mine"
    )


def test_what_does_not_exist_is_an_error_that_names_the_shipped_models(here):
    words = f"{here / 'stong'} does not exist; the shipped models are pretrained and strong"
    with pytest.raises(FileNotFoundError, match=words):
        runs.load_model("stong")


def test_a_name_that_is_also_a_folder_is_refused(here):
    (here / "strong").mkdir()
    for ambiguous in ("strong", Path("strong")):
        with pytest.raises(ValueError, match=f"{WHAT_WAS_FOUND} {here / 'strong'}"):
            zoo.folder(ambiguous)
    assert zoo.folder("./strong") == zoo.folder(here / "strong") == here / "strong"
    assert zoo.folder("pretrained") == MODELS / "pretrained"


def test_the_shipped_folder_itself_is_no_other(monkeypatch):
    monkeypatch.chdir(MODELS)
    assert zoo.folder("strong") == MODELS / "strong"


def test_programs_take_a_name_and_refuse_one_that_is_not_clear(here, capsys):
    assert export.main(["--model", "strong", "--out", "model"]) == 0
    assert (here / "model" / "weights.npz").is_file()
    (here / "strong").mkdir()
    with pytest.raises(SystemExit):
        export.main(["--model", "strong", "--out", "other"])
    assert WHAT_WAS_FOUND.split()[0] in capsys.readouterr().err
    assert export.main(["--model", "./strong", "--out", "other"]) == 1
    assert f"{here / 'strong' / 'config.json'} is missing" in capsys.readouterr().err
    assert not (here / "other").exists()


def test_settings_take_a_name(here):
    assert runs.Settings(init=Path("strong")).init == MODELS / "strong"
    assert runs.Settings(init=here / "strong").init == here / "strong"
    (here / "strong").mkdir()
    with pytest.raises(ValueError, match=WHAT_WAS_FOUND):
        runs.Settings(init=Path("strong"))


def test_a_report_is_not_written_into_the_folder_of_a_shipped_model(here, capsys):
    flags = ["--images", "images", "--masks", "masks"]
    assert evaluate.main(["--model", "strong", *flags]) == 1
    assert "add --out FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "encoder"), [("strong", None), ("pretrained", "lite2")])
def test_a_shipped_model_says_how_it_was_made(name, encoder):
    trained = runs.load_model(name)
    settings = trained.settings
    assert (settings.recipe, settings.encoder, settings.dataset) == (name, encoder, "kvasir_seg")
    assert trained.model == runs.recipe_of(settings).model  # which the recipe still is
    augment = trained.config["training"]["augment"]
    assert augment == json.loads(json.dumps(runs.recipe_of(settings).augment))
    assert (settings.image_size, trained.config["trained_at"]) == (288, 352)
    assert trained.config["calibration"]["temperature"] > 1
    assert trained.loss_fn is losses.bce_soft_dice and trained.step > 0
    assert trained.places.images is None and set(trained.fingerprints) == set(data.SPLITS)


# Checksums


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("file", ["model.json", "weights.npz"])
def test_the_checksum_covers_both_files(name, file, tmp_path):
    """A sound file of something else, so that no other check sees it."""
    folder = shutil.copytree(MODELS / name, tmp_path / name)
    if file == "model.json":
        content = json.loads((folder / file).read_text())
        content["about"]["step"] += 1
        (folder / file).write_text(json.dumps(content))
    else:
        packed = pack.load(folder)
        packed.variables["params"]["head"]["bias"] = packed.variables["params"]["head"]["bias"] + 1
        pack.save(tmp_path / "other", packed)
        shutil.copy(tmp_path / "other" / file, folder)
    with pytest.raises(ValueError, match="checksum"):
        pack.load(folder)


def test_what_is_exported_keeps_the_terms_of_kvasir_seg(here, capsys):
    onnx = pytest.importorskip("onnx")
    assert export.main(["--model", "strong", "--out", "mine", "--onnx", "mine.onnx"]) == 0
    assert "the model was trained on Kvasir-SEG" in capsys.readouterr().out
    for text in (
        (here / "mine" / "LICENSE").read_text(),
        {x.key: x.value for x in onnx.load("mine.onnx").metadata_props}["terms"],
    ):
        assert "research and education only" in text and "10.1007/978-3-030-37734-2_37" in text


def test_other_models_have_no_such_terms():
    trained = runs.load_model("strong")
    assert trained.terms == trained._replace(config={}).terms != ""
    other = trained._replace(settings=runs.Settings(dataset="folder"), config={})
    assert other.terms == ""


def test_what_is_fine_tuned_on_other_pictures_keeps_the_terms(here):
    """Through an export, a second fine-tuning and a resumption without the first model."""
    drawn.discs(here, 10, 16)

    def run(workdir, *more):
        flags = "--dataset folder --images images --masks masks --image-size 16 --features 4 8"
        flags = [*flags.split(), "--workdir", workdir, "--epochs", "1", *more]
        assert train.main(flags) == 0
        return runs.load_model(workdir).terms

    assert run("own") == ""
    file = here / "own" / "config.json"
    content = json.loads(file.read_text())
    content["settings"]["dataset"] = "kvasir_seg"  # as if it had been trained on that
    del content["terms"]  # as before it was recorded
    file.write_text(json.dumps(content))
    assert run("tuned", "--init", "own") == runs.TERMS
    assert export.main(["--workdir", "tuned", "--out", "model"]) == 0
    assert "Kvasir-SEG" in (here / "model" / "LICENSE").read_text()
    assert runs.load_model("model").settings.init is None
    assert run("again", "--init", "model") == runs.TERMS
    shutil.rmtree(here / "model")
    assert run("again", "--init", "model", "--epochs", "2") == runs.TERMS
