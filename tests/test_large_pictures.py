"""The programs on pictures of several sizes, larger than a crop; and what leaves for elsewhere."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from flax_unet import checkpoint, data, onnx_file, runs
from flax_unet.evaluate import score
from flax_unet.predict import Tiled, predict_picture, predict_proba
from flax_unet_cli import evaluate, export, predict, train

SIZES = (70, 90), (48, 120), (64, 64), (25, 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twenty grey pictures of bright discs on noise, of four sizes."""
    root, rng = tmp_path_factory.mktemp("discs"), np.random.default_rng(0)
    for part in ("images", "masks", "broken"):
        (root / part).mkdir()
    for i in range(20):
        height, width = SIZES[i % 4]
        y, x = np.mgrid[:height, :width]
        disc = np.zeros((height, width), bool)
        for _ in range(3):
            cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 8)
            disc |= (y - cy) ** 2 + (x - cx) ** 2 < r * r
        image = rng.normal(70, 20, (height, width)) + 110 * disc
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{i:02d}.png")
        Image.fromarray(disc.astype(np.uint8) * 255).save(root / f"masks/{i:02d}.png")
    return root


def flags(folders, workdir, *more):
    places = "--images", str(folders / "images"), "--masks", str(folders / "masks")
    size = "--crop", "32", "32", "--features", "4", "8", "--batch-size", "4"
    settings = "--dataset", "folder", *places, "--recipe", "strong", *size
    return ["--workdir", str(workdir), *settings, "--learning-rate", "0.01", *more]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert train.main(flags(folders, workdir, "--epochs", "4")) == 0
    return workdir


def test_a_run_on_crops_records_them_and_validates_on_tiles(folders, run, capsys):
    content = json.loads((run / "config.json").read_text())
    assert content["settings"]["crop"] == 32 == content["settings"]["image_size"]
    affine = content["training"]["augment"]["random_affine"]
    assert (affine["size"], affine["shift"], affine["outside"]) == ([32, 32], 0, 255)
    trained = runs.load_model(run)
    tiles = sum(  # of the validation pictures
        -(-height // 32) * -(-width // 32)
        for height, width in (
            Image.open(folders / f"images/{name}.png").size for name in validation_names(folders)
        )
    )
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    areas = [SIZES[int(name) % 4] for name in train_names(folders)]
    assert last["n_images"] == sum(-(-h * w // 1024) for h, w in areas)
    assert last["val_n_images"] == tiles
    dice = checkpoint._dice(run / "checkpoints" / str(last["step"]))
    assert dice == last["val_dice_pooled"] != last["val_dice_per_image"]
    model, size = trained.predictor()
    assert (model, size) == (Tiled(trained.model, 32), None)
    assert train.main(flags(folders, run, "--epochs", "4")) == 0  # the same run
    assert "all 4 epochs are done" in capsys.readouterr().out


def train_names(folders):
    return [x["name"] for x in data.FolderSource(folders / "images", folders / "masks", "train")]


def validation_names(folders):
    source = data.FolderSource(folders / "images", folders / "masks", "validation")
    return [example["name"] for example in source]


def test_another_size_beside_the_crop_is_refused(folders, tmp_path, capsys):
    with pytest.raises(ValueError, match="only one of --image-size and --crop"):
        runs.Settings(image_size=64, crop=32)
    assert runs.Settings(crop=32).size == (32, 32)
    assert runs.Settings(crop=(32, 32), image_size=(32, 32)) == runs.Settings(crop=32)
    assert train.main(flags(folders, tmp_path / "a", "--crop", "31", "--epochs", "1")) == 1
    assert "crop 31 is not a multiple of" in capsys.readouterr().err


def test_a_validation_split_without_objects_is_no_error(tmp_path):
    """Then the masks of its tiles have 0 and what does not count, and nothing else."""
    rng = np.random.default_rng(0)
    for split, high in (("train", 255), ("val", 0), ("test", 255)):
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True)
        for i in range(2):
            image, mask = rng.integers(0, 256, (50, 70), np.uint8), np.zeros((50, 70), np.uint8)
            mask[9:30, 9:40] = high
            Image.fromarray(image).save(tmp_path / split / "images" / f"{split}{i}.png")
            Image.fromarray(mask).save(tmp_path / split / "masks" / f"{split}{i}.png")
    places = "--images", str(tmp_path), "--masks", str(tmp_path), "--dataset", "folder"
    settings = "--crop", "32", "--features", "4", "8", "--epochs", "1"
    assert train.main(["--workdir", str(tmp_path / "run"), *places, *settings]) == 0


def test_evaluate_scores_in_windows_and_writes_a_report(folders, run, tmp_path, capsys):
    flags = ["--workdir", str(run), "--split", "validation", "--checkpoint", "best"]
    assert evaluate.main([*flags, "--threshold", "0.4"]) == 0
    out = capsys.readouterr().out
    assert "windows of" in out and "0.5 is used unless you say --threshold" in out
    content = json.loads((run / "evaluation-validation-threshold-0.4.json").read_text())
    assert (content["window"], content["image_size"], content["threshold"]) == ([32, 32], None, 0.4)
    trained = runs.load_model(run)
    tiled = Tiled(trained.model, 32)
    for row in content["own_size"]["images"]:
        image = np.asarray(Image.open(folders / f"images/{row['name']}.png"))[..., None]
        mask = np.asarray(Image.open(folders / f"masks/{row['name']}.png")) > 0
        predicted = predict_proba(tiled, trained.variables, image)[..., 0] > 0.4
        assert row["tp"] == (predicted & mask).sum() and row["fp"] == (predicted & ~mask).sum()
    page = (run / "report-validation-threshold-0.4.html").read_text()
    assert evaluate.read_lines(run / "metrics.jsonl")[-1]["epoch"] == 4
    torn = tmp_path / "metrics.jsonl"
    torn.write_bytes((run / "metrics.jsonl").read_bytes()[:-40])
    assert [line["epoch"] for line in evaluate.read_lines(torn)] == [1, 2, 3]
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert evaluate.main([*flags, "--window", "64", "--out", str(tmp_path)]) == 0
    wide = json.loads((tmp_path / "evaluation-validation-window-64x64.json").read_text())
    assert wide["window"] == [64, 64]


def test_predict_works_in_windows_and_with_onnx_runtime_the_same(folders, run, tmp_path, capsys):
    pictures = [str(folders / f"images/{i:02d}.png") for i in range(4)]
    for backend in ("jax", "onnx"):
        flags = ["--model", str(run), "--out", str(tmp_path / backend), "--backend", backend]
        assert predict.main([*flags, "--flips", *pictures]) == 0
    with (tmp_path / "jax" / "predictions.csv").open() as file:
        sizes = [(int(row["height"]), int(row["width"])) for row in csv.DictReader(file)]
    assert sizes == list(SIZES)
    for i, size in enumerate(SIZES):
        masks = [
            np.asarray(Image.open(tmp_path / backend / f"{i:02d}-mask.png"))
            for backend in ("jax", "onnx")
        ]
        assert masks[0].shape == size
        assert (masks[0] != masks[1]).mean() < 0.001
    assert capsys.readouterr().out.count("4 of 4 pictures segmented") == 2


def test_a_run_is_exported_in_all_forms_at_once(run, tmp_path, capsys):
    files = ["--onnx", str(tmp_path / "a.onnx"), "--stablehlo", str(tmp_path / "a.stablehlo")]
    folder = ["--out", str(tmp_path / "a"), "--safetensors"]
    assert export.main(["--workdir", str(run), *folder, *files]) == 0
    assert (tmp_path / "a" / "weights.safetensors").stat().st_size > 1000
    assert (tmp_path / "a.stablehlo").stat().st_size > 1000
    exported, trained = runs.load_model(tmp_path / "a"), runs.load_model(run)
    assert exported.settings.crop == 32
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 64, 1), np.uint8)
    model = onnx_file.OnnxModel(tmp_path / "a.onnx")
    expected = predict_proba(trained.model, trained.variables, image)
    np.testing.assert_allclose(model.probabilities(image), expected, atol=1e-4)
    with pytest.raises(ValueError, match="computes probabilities"):
        model.apply({}, image)
    metadata = {key: json.loads(model.metadata[key]) for key in ("window", "image_size")}
    assert metadata == {"window": [32, 32], "image_size": None}
    same, other = str(tmp_path / "same"), str(tmp_path / "other.onnx")
    for more, words in (
        (["--safetensors", "--onnx", other], "--safetensors needs --out FOLDER"),
        (["--onnx", same, "--stablehlo", same], "cannot be both ONNX and StableHLO"),
        (
            ["--out", same, "--image-size", "64"],
            "a model of crops takes pictures at their own size",
        ),
    ):
        assert export.main(["--workdir", str(run), *more]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "same").exists() and not (tmp_path / "other.onnx").exists()
    again = ["--workdir", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--safetensors"]
    assert export.main(again) == 0
    assert runs.load_model(tmp_path / "b").settings.crop == 32


def test_an_onnx_model_stands_in_for_the_network_in_windows(run):
    trained = runs.load_model(run)
    model, size = trained.predictor(backend="onnx", flips=True)
    assert size is None
    with pytest.raises(ValueError, match="window .0, 0. is not a multiple of"):
        trained.predictor(window=0)
    with pytest.raises(ValueError, match="only predict.Tiled predicts"):
        list(score(trained.model, trained.variables, [{}], None))
    with pytest.raises(ValueError, match="on the host: give size None"):
        list(score(model, trained.variables, [{}], 32))
    picture = Image.new("L", (20, 30))
    assert predict_picture(model, {}, picture, None).shape == (30, 20, 1)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 1), np.uint8)
    expected, _ = trained.predictor(flips=True)
    proba = predict_proba(model, {}, image)
    np.testing.assert_allclose(proba, predict_proba(expected, trained.variables, image), atol=1e-4)


def test_what_does_not_fit_is_streamed_and_trains_the_same(
    folders, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train.devices, "memory", lambda: 1000)
    assert train.main(flags(folders, tmp_path / "run", "--epochs", "4")) == 0
    assert "they are decoded again in each epoch, as with --stream" in capsys.readouterr().out
    a, b = (runs.load_model(each, "latest") for each in (run, tmp_path / "run"))
    for x, y in zip(*(map(np.asarray, jax_leaves(t.variables)) for t in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)
