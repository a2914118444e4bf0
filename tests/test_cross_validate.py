"""Cross-validation: what is trained and scored on what, the table, the ensemble of the folds."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from drawn import discs
from PIL import Image

from flax_unet import data, predict, runs
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet_cli import cross_validate, evaluate, export, sources, train
from flax_unet_cli import predict as predict_program

K = 3
#: Pictures whose names end with the same digit are a group: ten groups of two.
GROUP = r"\d$"
SETTINGS = "--features 4 8 --image-size 16 --epochs 2 --batch-size 4".split()


def flags(root, workdir):
    return [
        *("--dataset", "folder", "--images", str(root / "images"), "--masks", str(root / "masks")),
        *("--workdir", str(workdir), "--group", GROUP, *SETTINGS),
    ]


def cross(root, workdir, *more):
    return cross_validate.main([*flags(root, workdir), "--folds", str(K), *more])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of discs."""
    return discs(tmp_path_factory.mktemp("pictures"), 20, 32)


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    """A finished cross-validation."""
    folder = tmp_path_factory.mktemp("runs") / "folds"
    assert cross(root, folder) == 0
    return folder


def splits(fold):
    """The names and sources that a fold's config.json leads to."""
    settings, places = runs.from_json(runs.read_config(fold), fold)
    opened = sources.open_sources(settings, places)
    names = {
        split: [source[i]["name"] for i in range(len(source))] for split, source in opened.items()
    }
    return names, opened


def scored(fold):
    return json.loads((fold / "evaluation-validation-latest.json").read_text())


def test_each_picture_but_those_of_test_is_validated_once(root, workdir):
    own = {
        split: [
            x["name"]
            for x in data.FolderSource(root / "images", root / "masks", split, group=GROUP)
        ]
        for split in data.SPLITS
    }
    seen = []
    for i in range(K):
        fold = workdir / f"fold-{i}"
        names, opened = splits(fold)
        assert names["test"] == own["test"]
        assert sorted(names["train"] + names["validation"]) == sorted(
            own["train"] + own["validation"]
        )
        groups = [{name[-1] for name in names[split]} for split in data.SPLITS]
        assert len(set.union(*groups)) == sum(map(len, groups)) == 10
        config = runs.read_config(fold)
        assert config["settings"]["fold"] == [i, K]
        # What was trained on and scored is what is recorded.
        assert config["data"] == {split: data.fingerprint(each) for split, each in opened.items()}
        assert [row["name"] for row in scored(fold)["own_size"]["images"]] == names["validation"]
        steps = 2 * -(-len(names["train"]) // 4)
        assert runs.load_model(fold, "latest").step == steps == scored(fold)["step"]
        seen += names["validation"]
        assert not list(fold.glob("*-test*"))  # which nobody has scored
    assert len(seen) == len({*seen}) == 18 and not {*seen} & {*own["test"]}


def proba_of(trained, picture):
    return predict.predict_picture(
        trained.model, trained.variables, picture, 16, trained.image_format
    )


def dice_and_iou(proba, mask):
    found, there = np.asarray(proba)[..., 0] > 0.5, np.asarray(mask) > 127
    both, either = (found & there).sum(), (found | there).sum()
    return 2 * both / (both + either), both / either


def test_the_table_has_the_scores_of_the_last_states_on_pictures_they_did_not_see(root, workdir):
    content = json.loads((workdir / "cross-validation.json").read_text())
    expected = []
    for i in range(K):
        trained = runs.load_model(workdir / f"fold-{i}", "latest")
        values = []
        for name in splits(workdir / f"fold-{i}")[0]["validation"]:
            with Image.open(root / "images" / f"{name}.png") as picture:
                proba = proba_of(trained, picture)
            values.append(dice_and_iou(proba, Image.open(root / "masks" / f"{name}.png")))
        expected.append(np.array(values))
        row = content["folds"][i]
        assert (row["workdir"], row["n_images"]) == (f"fold-{i}", len(values))
        assert [row["dice"], row["iou"]] == pytest.approx(expected[-1].mean(0), abs=1e-6)
    means, together = np.array([x.mean(0) for x in expected]), np.concatenate(expected)
    rng = np.random.default_rng(1)
    resampled = together[rng.integers(len(together), size=(20_000, len(together)))].mean(1)
    for j, name in enumerate(("dice", "iou")):
        over = content["over_folds"][name]
        mean = means[:, j].sum() / K
        assert over["mean"] == pytest.approx(mean, abs=1e-6)
        variance = ((means[:, j] - mean) ** 2).sum() / (K - 1)
        assert over["standard_deviation"] == pytest.approx(variance**0.5, abs=1e-6)
        pooled = content["all_images"][name]
        assert pooled["mean"] == pytest.approx(together[:, j].mean(), abs=1e-6)
        limits = np.percentile(resampled[:, j], (2.5, 97.5))
        assert pooled["interval"] == pytest.approx(limits, abs=0.1 * np.ptp(limits))
    assert content["all_images"]["n_images"] == 18
    text = (workdir / "cross-validation.md").read_text()
    dice, iou = means[0]
    assert f"| 0 | {len(expected[0])} | {dice:.3f} | {iou:.3f} |\n" in text
    low, high = content["all_images"]["dice"]["interval"]
    assert f"| 18 | {together[:, 0].mean():.3f} ({low:.3f} to {high:.3f}) |" in text
    assert f"| {means[:, 0].mean():.3f} ± {means[:, 0].std(ddof=1):.3f} |" in text
    assert "means over its classes" not in text and content["classes"] == ["foreground"]


def test_scores_of_several_classes_are_means_over_them():
    image = {"name": "x", "a": {"dice": 0.25, "iou": 0.5}, "b": {"dice": 0.75, "iou": 0.0}}
    assert cross_validate.per_image(image, ["a", "b"]) == [0.5, 0.25]


def states(workdir, fold="fold-*"):
    """The checkpoints, and when they were written."""
    return {p: p.stat().st_mtime_ns for p in workdir.glob(f"{fold}/checkpoints/[0-9]*")}


def test_a_cross_validation_goes_on_where_it_was_stopped(root, workdir, tmp_path, capsys):
    copied = tmp_path / "folds"
    shutil.copytree(workdir, copied)
    for name in ("cross-validation.json", "cross-validation.md"):
        (copied / name).unlink()
    # As if it was killed in the second epoch of the second of three runs.
    first, last = sorted(
        (copied / "fold-1" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name)
    )
    shutil.rmtree(last)
    shutil.rmtree(copied / "fold-2")
    finished = states(copied, "fold-0")
    assert cross(root, copied) == 0
    out = capsys.readouterr().out
    assert "all 2 epochs are done" in out and f"resuming after step {first.name}" in out
    assert states(copied, "fold-0") == finished
    for name in ("cross-validation.json", "cross-validation.md"):
        assert (copied / name).read_text() == (workdir / name).read_text()


def test_a_signal_ends_it_before_there_is_a_table(root, tmp_path, monkeypatch):
    trained = []

    def complete(options):
        trained.append((options.settings.fold, options.places.workdir.name))
        return 130 if len(trained) == 2 else 0

    monkeypatch.setattr(train, "complete", complete)
    monkeypatch.setattr(cross_validate, "check_alike", lambda folds: None)  # there are none
    assert cross(root, tmp_path / "folds") == 130
    assert trained == [((0, K), "fold-0"), ((1, K), "fold-1")]
    assert not (tmp_path / "folds").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (("--folds", "4"), r"fold-0 holds a run with other settings .*fold: \[0, 3\] -> \[0, 4\]"),
        (("--seed", "1"), "fold-0 holds a run with other settings .*seed: 0 -> 1"),
        (("--group", "^[01]."), "fold-0 holds .*pictures of the train split"),
        (("--folds", "1"), "--folds is 1: it must be 2 or more"),
        (("--folds", "0", "--dry-run"), "--folds is 0: it must be 2 or more"),
    ],
)
def test_other_folds_in_the_same_workdir_are_refused(root, workdir, capsys, change, words):
    before = (workdir / "cross-validation.json").read_bytes(), states(workdir)
    assert cross(root, workdir, *change) == 1
    assert re.search(words, capsys.readouterr().err)
    assert before == ((workdir / "cross-validation.json").read_bytes(), states(workdir))


def test_folds_of_different_length_make_no_table(root, workdir, tmp_path, monkeypatch, capsys):
    copied = tmp_path / "folds"
    shutil.copytree(workdir, copied)
    config = json.loads((copied / "fold-1" / "config.json").read_text())
    config["settings"]["epochs"] = 3
    (copied / "fold-1" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(train, "complete", lambda options: 0)
    assert cross(root, copied) == 1
    assert "were trained for 2 to 3 epochs: give --epochs 3" in capsys.readouterr().err


def test_folds_of_other_ranges_are_refused_before_any_is_trained(
    root, workdir, tmp_path, monkeypatch, capsys
):
    copied = tmp_path / "folds"
    shutil.copytree(workdir, copied)
    config = json.loads((copied / "fold-2" / "config.json").read_text())
    config["images"] = config["images"] | {"low": [0.0], "high": [4095.0]}
    (copied / "fold-2" / "config.json").write_text(json.dumps(config))

    def complete(options):
        raise AssertionError("a fold was trained")

    monkeypatch.setattr(train, "complete", complete)
    assert cross(root, copied) == 1
    words = "fold-2 and .*fold-0 were trained with other images .*4095.*: .* give --value-range"
    assert re.search(words, capsys.readouterr().err)


def test_a_fold_that_finds_another_range_is_refused_before_the_next(
    root, workdir, tmp_path, monkeypatch, capsys
):
    copied, trained = tmp_path / "folds", []
    shutil.copytree(workdir, copied)

    def complete(options):
        trained.append(options.places.workdir.name)
        file = options.places.workdir / "config.json"
        config = json.loads(file.read_text())
        config["images"] = config["images"] | {"high": [float(len(trained))]}
        file.write_text(json.dumps(config))
        return 0

    monkeypatch.setattr(train, "complete", complete)
    assert cross(root, copied) == 1
    assert re.search("fold-1 and .*fold-0 were trained with other images", capsys.readouterr().err)
    assert trained == ["fold-0", "fold-1"]


@pytest.mark.parametrize("which", ["best", "latest"])
def test_a_fold_that_was_trained_further_makes_the_ensemble_out_of_date(workdir, tmp_path, which):
    copied = tmp_path / "folds"
    shutil.copytree(workdir, copied)
    file = copied / "cross-validation.json"
    content = json.loads(file.read_text())
    step, content["folds"][1]["step"] = content["folds"][1]["step"], 3
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"fold-1 is at step {step}, and the table .* of step 3"):
        runs.load_model(copied, which)


def test_a_table_of_several_classes_says_what_is_averaged():
    means = {name: {"mean": 0.5, "standard_deviation": 0.1} for name in ("dice", "iou")}
    images = {name: {"mean": 0.5, "interval": [0.4, 0.6]} for name in ("dice", "iou")}
    row = {"workdir": "fold-0", "n_images": 3, "dice": 0.5, "iou": 0.4}
    content = {"init": None, "folds": [row], "over_folds": means}
    content["all_images"] = {"n_images": 3, **images}
    one = cross_validate.table(content | {"classes": ["polyp"]})
    several = cross_validate.table(content | {"classes": ["a", "b"]})
    more = "The scores of an image are means over its classes, a, b. A class"
    assert several == f"{one}\n{more}\nthat is neither in the mask nor predicted scores 1.\n"


def test_a_table_says_if_the_folds_began_with_another_model(
    root, workdir, tmp_path, monkeypatch, capsys
):
    copied, other = tmp_path / "folds", str(tmp_path / "other")
    shutil.copytree(workdir, copied)
    monkeypatch.setattr(train, "complete", lambda options: 0)
    assert cross(root, copied, "--init", other) == 0
    assert f"if {other} was trained on these pictures" in capsys.readouterr().err
    text = (copied / "cross-validation.md").read_text()
    assert f"by the run that did not see it (what {other} saw is not known) |" in text
    assert json.loads((copied / "cross-validation.json").read_text())["init"] == other
    assert json.loads((workdir / "cross-validation.json").read_text())["init"] is None


def test_other_pictures_are_refused(root, workdir, tmp_path, capsys):
    for part in ("images", "masks"):
        shutil.copytree(root / part, tmp_path / part)
    name = splits(workdir / "fold-0")[0]["validation"][0]
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{name}.png")
    assert cross(tmp_path, workdir) == 1
    assert "pictures of the validation split" in capsys.readouterr().err


def test_a_fold_is_an_ordinary_run(root, workdir, tmp_path, capsys):
    fold = str(workdir / "fold-1")
    # The command that another machine would have run.
    assert train.main([*flags(root, fold), "--fold", "1", str(K)]) == 0
    assert "all 2 epochs are done" in capsys.readouterr().out
    assert evaluate.main(["--workdir", fold, "--split", "train", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "evaluation-train.json").read_text())
    assert report["n_images"] == len(splits(workdir / "fold-1")[0]["train"]) == 12
    assert "not the pictures" not in capsys.readouterr().err
    model = str(tmp_path / "model")
    assert export.main(["--workdir", fold, "--out", model]) == 0
    out = str(tmp_path / "out")
    assert predict_program.main(["--workdir", model, "--out", out, str(root / "images")]) == 0
    assert len(list((tmp_path / "out").glob("*-mask.png"))) == 20


def test_the_folder_is_a_model_the_ensemble_of_the_folds(root, workdir, tmp_path, capsys):
    trained = runs.load_model(workdir)
    assert isinstance(trained.model, predict.Ensemble) and len(trained.variables) == K
    members = [runs.load_model(workdir / f"fold-{i}") for i in range(K)]
    assert evaluate.main(["--workdir", str(workdir), "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert "not the pictures" not in output.err and "images, ensemble of 3, best" in output.out
    assert "ensemble of 3, best checkpoint" in (tmp_path / "report-test.html").read_text()
    report = json.loads((tmp_path / "evaluation-test.json").read_text())
    assert report["ensemble"] == [str(workdir / f"fold-{i}") for i in range(K)]
    names = splits(workdir / "fold-0")[0]["test"]
    expected = []
    for name in names:
        with Image.open(root / "images" / f"{name}.png") as picture:
            proba = np.mean([proba_of(each, picture) for each in members], 0)
        expected.append(dice_and_iou(proba, Image.open(root / "masks" / f"{name}.png"))[0])
    rows = report["own_size"]["images"]
    assert [row["name"] for row in rows] == names
    assert [row["dice"] for row in rows] == pytest.approx(expected)
    leaves = [x for each in members for x in jax.tree.leaves(each.variables["params"])]
    assert report["cost"]["parameters"] == sum(x.size for x in leaves)
    files = [str(root / "images" / f"{name}.png") for name in names]
    out = ["--window", "16", "--flips", "--out", str(tmp_path / "out")]
    assert predict_program.main(["--workdir", str(workdir), *out, *files]) == 0
    assert len(list((tmp_path / "out").glob("*-mask.png"))) == len(names)


def test_what_takes_one_network_refuses_an_ensemble(root, workdir, tmp_path, capsys):
    words = "takes one network, and this is an ensemble of 3: use one of them, such as"
    given = ["--workdir", str(workdir)]
    files = [tmp_path / name for name in ("out", "a.onnx", "a.hlo")]
    for flag, file in zip(("--out", "--onnx", "--stablehlo"), files, strict=True):
        assert export.main([*given, flag, str(file)]) == 1
        assert f"export {words} {workdir}" in capsys.readouterr().err and not file.exists()
    other = tmp_path / "other"
    assert train.main([*flags(root, other), "--init", str(workdir)]) == 1
    assert f"--init {words}" in capsys.readouterr().err and not (other / "config.json").exists()
    with pytest.raises(ValueError, match=f"the backend onnx {words}"):
        runs.load_model(workdir).predictor(backend="onnx")
    for split in ("train", "validation"):  # of which each member has seen some
        assert evaluate.main([*given, "--split", split]) == 1
        assert f"each picture of {split} was trained on by some" in capsys.readouterr().err
    assert train.main(flags(root, workdir)) == 1
    assert "holds a cross-validation: choose another --workdir" in capsys.readouterr().err
    assert cross(root, workdir / "fold-0") == 1
    assert "holds a run or a model: choose another" in capsys.readouterr().err
    assert export.main(["--workdir", str(workdir / "fold-0"), "--out", str(workdir)]) == 1
    assert f"{workdir} is the workdir of a run: choose another" in capsys.readouterr().err
    for name in (runs.CROSS_VALIDATION, "model.json"):
        shutil.copy(workdir / runs.CROSS_VALIDATION, tmp_path / name)
    with pytest.raises(ValueError, match="holds a cross-validation and an exported model"):
        runs.load_model(tmp_path)


def test_models_of_other_pictures_are_no_ensemble(workdir, tmp_path):
    one = runs.load_model(workdir / "fold-0")
    for change, words in (
        (
            {"image_format": ImageFormat(3, low=(0.0,), high=(9.0,))},
            "have other images .*value-range",
        ),
        ({"mask_format": MaskFormat(values=((0, 0), (7, 1)))}, "have other masks"),
        ({"settings": runs.Settings(image_size=64)}, "have other image_size: 64 and 16"),
    ):
        with pytest.raises(ValueError, match=words):
            runs.ensemble([one, one._replace(**change)])
    bound = one._replace(config=one.config | {"terms": "for research"})
    for members in ([one, bound], [bound, one]):
        assert runs.ensemble(members).terms == "for research"
    for content in ('{"folds": [{}]}', '{"folds": []}', "{}", "[]"):
        (tmp_path / "cross-validation.json").write_text(content)
        with pytest.raises(ValueError, match="cross-validation.json is damaged"):
            runs.load_model(tmp_path)


def test_the_embedded_data_set_by_its_own_split(tmp_path):
    settings = "--dataset synthetic_polyps --features 4 8 --image-size 32 --epochs 1".split()
    places = ["--workdir", str(tmp_path / "folds"), "--data-dir", str(tmp_path / "tfds")]
    assert cross_validate.main([*places, *settings, "--folds", "2"]) == 0
    content = json.loads((tmp_path / "folds" / "cross-validation.json").read_text())
    assert [row["n_images"] for row in content["folds"]] == [180, 180]  # of 320 and 40
    names = [splits(tmp_path / "folds" / f"fold-{i}")[0] for i in range(2)]
    assert names[0]["train"] != names[1]["train"] and names[0]["test"] == names[1]["test"]
    assert {*names[0]["train"]} == {*names[1]["validation"]} and len(names[0]["test"]) == 80
    assert runs.load_model(tmp_path / "folds").model.num_classes == 1


def test_the_folds_of_pictures_of_16_bits_have_one_range(tmp_path, root):
    """Their models could not become an ensemble otherwise."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    for i, file in enumerate(sorted((tmp_path / "images").iterdir())):
        values = rng.integers(100, 1000 * (i + 1), (32, 32)).astype(np.uint16)
        Image.fromarray(values).save(file)
    found = set()
    for fold in range(K):
        settings = runs.Settings(dataset="folder", fold=(fold, K), image_size=16, features=(4, 8))
        places = runs.Places(
            tmp_path, images=tmp_path / "images", masks=tmp_path / "masks", group=GROUP
        )
        opened = sources.open_sources(settings, places)
        found.add(sources.image_format_of(settings, opened, sources.ImageFlags()))
    (only,) = found
    assert only.kind == "integers" and only.high[0] > 10_000


def test_the_scores_of_a_class_called_dice_are_found():
    image = {"name": "a", "dice": {"dice": 0.5, "iou": 0.25}, "b": {"dice": 1.0, "iou": 1.0}}
    assert cross_validate.per_image(image, ["dice", "b"]) == [0.75, 0.625]
    assert cross_validate.per_image({"name": "a", "dice": 0.5, "iou": 0.25}, []) == [0.5, 0.25]
