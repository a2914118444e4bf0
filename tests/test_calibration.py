"""The temperature: fitted, folded into the heads, and `export --calibrate`."""

import json
import shutil
from collections import Counter

import jax
import numpy as np
import onnx
import pytest
from scipy.special import expit, log_softmax, softmax

from flax_unet import calibration, data, formats, metrics, predict, runs
from flax_unet.calibration import fit_temperature, with_temperature
from flax_unet.classes import IGNORE
from flax_unet.efficientnet import Encoder
from flax_unet.formats import MaskFormat
from flax_unet.images import RGB
from flax_unet.model import UNet
from flax_unet_cli import evaluate, export, info, train
from tests.drawn import discs, encode

# Fitted


def drawn(kind, factor, n=20_000, seed=0):
    """Logits `factor` times too large, and a mask drawn from the probabilities that are right."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (4, n, {"one": 1, "overlapping": 2, "exclusive": 3}[kind]))
    if kind == "exclusive":
        rise = softmax(z, axis=-1).cumsum(-1)
        mask = (rng.random((4, n, 1)) > rise).sum(-1, keepdims=True)
    else:
        mask = rng.random(z.shape) < expit(z)
    return factor * z, mask.astype(np.uint8)


def cross_entropy(kind, z, mask):
    """The mean over the pixels that count, by its definition."""
    counted = mask != IGNORE
    if kind == "exclusive":
        logs = np.take_along_axis(log_softmax(z, -1), np.where(counted, mask, 0).astype(int), -1)
        return -logs[counted].mean()
    p = expit(z[counted])
    return -np.where(mask[counted] == 1, np.log(p), np.log1p(-p)).mean()


KINDS = "one", "overlapping", "exclusive"


@pytest.mark.parametrize("factor", [0.3, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_too_large_have_that_temperature(kind, factor):
    z, mask = drawn(kind, factor)
    fitted = fit_temperature(z, mask, overlapping=kind == "overlapping")
    assert fitted == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_no_temperature_of_a_grid_is_better(kind):
    z, mask = drawn(kind, 3, n=500)
    mask[:, ::3] = IGNORE
    z[:, ::3] = 50.0  # which would ask for a much larger temperature
    fitted = fit_temperature(z, mask, overlapping=kind == "overlapping")
    grid = np.exp(np.linspace(np.log(1), np.log(9), 801))
    losses = [cross_entropy(kind, z / t, mask) for t in grid]
    assert fitted == pytest.approx(grid[np.argmin(losses)], rel=0.003)
    assert cross_entropy(kind, z / fitted, mask) <= min(losses) + 1e-12


def test_pictures_may_differ_in_size_and_count_by_their_pixels():
    z, mask = drawn("one", 2)
    parts = [x[..., 0].reshape(-1, 1) for x in (z[0, :50], z[1], z[2, :7])]
    masks = [x.reshape(-1, 1) for x in (mask[0, :50], mask[1], mask[2, :7])]
    together = [np.concatenate(x)[None] for x in (parts, masks)]
    assert fit_temperature(parts, masks) == pytest.approx(fit_temperature(*together), rel=1e-5)


def test_a_picture_of_which_nothing_counts_changes_nothing():
    z, mask = drawn("one", 2, n=500)
    mask[1] = IGNORE
    others = np.delete(z, 1, 0), np.delete(mask, 1, 0)
    assert fit_temperature(z, mask) == fit_temperature(*others)


def test_logits_that_are_very_large_do_not_overflow():
    z, mask = drawn("one", 3)
    z = z.astype(np.float32)
    z[0, 0], mask[0, 0] = 20_000, 0
    grid = np.exp(np.linspace(np.log(1), np.log(19), 401))
    losses = [np.logaddexp(0, np.where(mask == 1, -z, z) / t).mean() for t in grid]
    assert fit_temperature(z, mask) == pytest.approx(grid[np.argmin(losses)], rel=0.01)


def test_masks_of_0_and_255_are_refused_and_classes_beside_255_are_not():
    z, mask = drawn("one", 2, n=1000)
    with pytest.raises(ValueError, match="no values but 0 and 255, .* no pixel shows an object"):
        fit_temperature(z, mask * IGNORE)
    z, mask = drawn("exclusive", 2)
    mask[mask == 1] = IGNORE
    assert fit_temperature(z, mask) > 1


def test_what_cannot_be_fitted_is_refused():
    z, mask = drawn("one", 1, n=100)
    with pytest.raises(ValueError, match="0.05 or beyond: these pixels are all predicted right"):
        fit_temperature(z, (z > 0).astype(np.uint8))
    with pytest.raises(ValueError, match="20 or beyond: .* no better than at random"):
        fit_temperature(z, (z < 0).astype(np.uint8))
    with pytest.raises(ValueError, match="no pixel counts"):
        fit_temperature(z, np.full_like(mask, IGNORE))
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(z * np.nan, mask)
    with pytest.raises(ValueError, match="from 0 to 2: use 0 to 1"):
        fit_temperature(z, 2 * mask)
    z, mask = drawn("exclusive", 1, n=100)
    with pytest.raises(ValueError, match="do not fit together.* one class index"):
        fit_temperature(z, np.eye(3, dtype=np.uint8)[mask[..., 0]])
    with pytest.raises(ValueError, match="do not fit together.* 0 and 1 for each class"):
        fit_temperature(z, mask, overlapping=True)
    with pytest.raises(ValueError):  # of pictures
        fit_temperature(z, mask[:2])


# Folded

MODELS = {
    "plain": UNet(features=(4, 8, 8)),
    "deep": UNet(features=(4, 8, 8), deep=True, norm="batch", patch=2),
    "exclusive": UNet(features=(4, 8), num_classes=3),
    "overlapping": UNet(features=(4, 8, 8), num_classes=2, overlapping=True, deep=True),
    "encoder": UNet(features=(8, 8, 8, 8), encoder=Encoder("lite0"), deep=True),
}


def random_variables(model):
    """Variables of a network, drawn by NumPy: nothing is compiled."""
    rng, image = np.random.default_rng(0), np.zeros((1, model.stride, model.stride, 3))

    def draw(x):
        if len(x.shape) > 1:
            return rng.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape).astype(np.float32)
        return rng.normal(1, 0.1, x.shape).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), image))


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    """A network, its random variables, and images."""
    model = MODELS[request.param]
    image = np.random.default_rng(1).random((2, 64, 96, 3), np.float32)
    return model, random_variables(model), image


@pytest.mark.parametrize("temperature", [0.4, 1.7])
def test_folded_variables_divide_the_logits(network, temperature):
    model, variables, image = network
    folded = with_temperature(model, variables, temperature)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    before, after = (np.asarray(jax.jit(model.apply)(v, image)) for v in (variables, folded))
    scale = abs(before).max()
    np.testing.assert_allclose(after / scale, before / temperature / scale, atol=1e-6)
    # The same masks, but for pixels that are a rounding error from a tie.
    overlapping = model.overlapping or model.num_classes == 1
    best = np.sort(before, -1)
    margin = abs(before).min(-1) if overlapping else best[..., -1] - best[..., -2]
    assert (sure := margin > 1e-5 * scale).mean() > 0.99
    masks = [metrics.classes.predicted(x, overlapping=model.overlapping) for x in (before, after)]
    np.testing.assert_array_equal(masks[0][sure], masks[1][sure])


def test_the_given_variables_stay_as_they_are():
    model = MODELS["deep"]
    variables = random_variables(model)
    before = jax.tree.map(np.array, variables)
    folded = with_temperature(model, variables, 2.0)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    changed = {
        name
        for name, x in folded["params"].items()
        if not jax.tree.all(jax.tree.map(np.array_equal, x, before["params"][name]))
    }
    assert changed == {"head", "head1"}
    assert folded["batch_stats"] is variables["batch_stats"]


def test_other_models_and_temperatures_are_refused():
    class Other(UNet):
        pass

    for model in (Other(), predict.Mirrored(UNet()), predict.Tiled(UNet())):
        with pytest.raises(ValueError, match=f"heads of {type(model).__name__} are not known"):
            with_temperature(model, {"params": {}}, 2)
    for temperature in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match="must be positive"):
            with_temperature(UNet(), {"params": {}}, temperature)


# Pixels


def test_variables_without_a_head_are_refused():
    with pytest.raises(ValueError, match="no head"):
        with_temperature(UNet((4, 8)), {"params": {"decoder": {}}}, 2.0)


def entries(n, sides, channels=1):
    rng = np.random.default_rng(0)
    return [
        {
            "name": str(i),
            "image": encode(rng.integers(0, 256, (*sides[i % len(sides)], 3), np.uint8)),
            "mask": encode(rng.integers(0, max(2, channels), sides[i % len(sides)], np.uint8)),
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("tiled", [False, True])
def test_logits_and_truth_are_those_of_the_networks_size(tiled):
    source, model = entries(3, [(40, 30), (32, 48)]), MODELS["plain"]
    variables = random_variables(model)
    used, size = (predict.Tiled(model, 16), None) if tiled else (model, (24, 32))
    logits, truth = calibration.logits_of(used, variables, source, size, formats.BINARY, RGB)
    for i in range(3):
        if tiled:
            image, mask = data.decode_pair(source[i], formats.BINARY, RGB)
        else:
            image, mask, *_ = data.decode_resized(source, i, (24, 32), formats.BINARY, RGB)
        proba = np.asarray(predict.predict_proba(used, variables, image))
        np.testing.assert_allclose(expit(logits[i]), proba.reshape(-1, 1), atol=1e-6)
        np.testing.assert_array_equal(truth[i], mask.reshape(-1, 1))


def test_of_many_pixels_some_are_taken_at_random(monkeypatch):
    names = "background", "a", "b"
    mask_format = MaskFormat(names, ((0, 0), (1, 1), (2, 2)))
    source, model = entries(4, [(16, 16)], channels=3), MODELS["exclusive"]
    variables = random_variables(model)
    how = model, variables, source, 16, mask_format, RGB
    logits, truth = calibration.logits_of(*how)
    assert [x.shape for x in logits] == [(256, 3)] * 4
    monkeypatch.setattr(calibration, "MOST", 4 * 3 * 64)
    fewer, again = (calibration.logits_of(*how) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, fewer, again)
    for x, y, *all_of_it in zip(*fewer, logits, truth, strict=True):
        assert (x.shape, y.shape) == ((64, 3), (64, 1))
        # Each with its own truth, and none twice.
        some, rows = (Counter(map(tuple, np.hstack(pair).tolist())) for pair in ((x, y), all_of_it))
        assert some <= rows


def test_large_pictures_keep_their_weight_if_some_pixels_are_taken(monkeypatch):
    source, model = entries(4, [(16, 16), (64, 64)]), MODELS["plain"]
    tiled = predict.Tiled(model, 16)
    how = tiled, random_variables(model), source, None, formats.BINARY, RGB
    for most, kept in (
        (8704, [256, 4096] * 2),  # all
        (8703, [128, 2048] * 2),
        (2200, [64, 1024] * 2),
        (1088, [32, 512] * 2),
    ):
        monkeypatch.setattr(calibration, "MOST", most)
        assert [len(x) for x in calibration.logits_of(*how)[0]] == kept


# The program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = discs(tmp_path_factory.mktemp("discs"), 40, 32)
    places = "--images", str(root / "images"), "--masks", str(root / "masks")
    size = "--image-size", "32", "--features", "4", "8", "--learning-rate", "0.01"
    flags = "--dataset", "folder", *places, *size, "--epochs", "3"
    assert train.main(["--workdir", str(root / "run"), *flags]) == 0
    return root


def scores(folder, out, *flags):
    """The report of `evaluate` on validation."""
    flags = "--checkpoint", "best", "--out", str(out), *flags
    assert evaluate.main(["--workdir", str(folder), *flags]) == 0
    (file,) = out.glob("evaluation-*.json")
    return json.loads(file.read_text())


def test_export_fits_folds_and_records_a_temperature(run, tmp_path, capsys):
    flags = ["--workdir", str(run / "run"), "--out"]
    assert export.main([*flags, str(tmp_path / "plain")]) == 0
    assert "temperature" not in capsys.readouterr().out
    assert export.main([*flags, str(tmp_path / "model"), "--calibrate"]) == 0
    printed = capsys.readouterr().out
    trained, plain, calibrated = (
        runs.load_model(x) for x in (run / "run", tmp_path / "plain", tmp_path / "model")
    )
    about = calibrated.config["calibration"]
    temperature, (before, after) = about["temperature"], about["calibration_error"]
    assert "calibration" not in plain.config

    # The temperature is that of the validation pictures at the network's size.
    arrays = data.load(data.FolderSource(run / "images", run / "masks", "validation"), 32)
    logits = np.asarray(trained.model.apply(trained.variables, arrays.image / np.float32(255)))
    assert temperature == pytest.approx(fit_temperature(logits, arrays.mask), rel=1e-4)
    assert abs(temperature - 1) > 0.05  # so that the test says something
    head, scaled = (x.variables["params"]["head"]["bias"] for x in (trained, calibrated))
    np.testing.assert_allclose(scaled, head / temperature, rtol=1e-6)

    # The errors are those of evaluate. Kernels are rounded to float16.
    validation = scores(run / "run", tmp_path / "a", "--split", "validation")
    assert before == validation["own_size"]["calibration_error"]
    assert f"temperature {temperature:.2f}: calibration error on validation" in printed
    assert f"{before:.4f} -> {after:.4f}" in printed
    source = data.FolderSource(run / "images", run / "masks", "validation")
    folder = tmp_path / "validation"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
        for i in range(len(source)):
            name = f"{source[i]['name']}.png"
            (folder / part / name).write_bytes((run / part / name).read_bytes())
    others = "--images", str(folder / "images"), "--masks", str(folder / "masks")
    again = scores(tmp_path / "model", tmp_path / "b", *others)
    assert again["own_size"]["calibration_error"] == pytest.approx(after, abs=3e-4)
    assert again["dice_per_image"] == pytest.approx(validation["dice_per_image"], abs=1e-3)

    assert export.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "c")]) == 0
    assert runs.load_model(tmp_path / "c").config["calibration"] == about
    assert export.main([*flags[:2], "--onnx", str(tmp_path / "a.onnx"), "--calibrate"]) == 0
    metadata = {x.key: x.value for x in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(metadata["calibration"]) == about
    flags = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "d"), "--calibrate"]
    assert export.main(flags) == 1
    assert "has a temperature already" in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_info_says_the_temperature(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(info, "answer", lambda *_, **__: "")
    flags = ["--workdir", str(run / "run"), "--out", str(tmp_path / "model")]
    assert export.main([*flags, "--calibrate"]) == 0
    temperature = runs.load_model(tmp_path / "model").config["calibration"]["temperature"]
    info.main(["--workdir", str(tmp_path / "model")])
    assert f"temperature={temperature}" in capsys.readouterr().out


def test_export_refuses_a_temperature_without_pictures(run, tmp_path, capsys):
    flags = ["--workdir", str(run / "run"), "--out", str(tmp_path / "plain")]
    assert export.main(flags) == 0
    flags = ["--model", str(tmp_path / "plain"), "--out", str(tmp_path / "model"), "--calibrate"]
    assert export.main(flags) == 1
    assert "does not record where its pictures are" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_at_another_size_the_error_of_a_calibrated_model_is_not_known(run, tmp_path, capsys):
    first, second = tmp_path / "model", tmp_path / "smaller"
    flags = ["--workdir", str(run / "run"), "--out", str(first), "--calibrate"]
    assert export.main(flags) == 0
    flags = ["--model", str(first), "--out", str(second), "--image-size", "16"]
    assert export.main(flags) == 0
    assert "the temperature was fitted at another size" in capsys.readouterr().out
    about, again = (runs.load_model(x).config["calibration"] for x in (first, second))
    assert again == {"temperature": about["temperature"]} and "calibration_error" in about


def test_export_says_what_a_temperature_needs(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "run")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["places"]["images"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    flags = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "model"), "--calibrate"]
    assert export.main(flags) == 1
    assert "--calibrate needs the pictures of the run, where they were" in capsys.readouterr().err


def test_export_warns_of_other_pictures(run, tmp_path, capsys):
    for part in ("images", "masks", "run"):
        shutil.copytree(run / part, tmp_path / part)
    workdir = tmp_path / "run"
    config = json.loads((workdir / "config.json").read_text())
    config["places"] |= {part: str(tmp_path / part) for part in ("images", "masks")}
    (workdir / "config.json").write_text(json.dumps(config))
    assert (
        export.main(["--workdir", str(workdir), "--calibrate", "--out", str(tmp_path / "a")]) == 0
    )
    assert "not the pictures" not in capsys.readouterr().err
    source = data.FolderSource(tmp_path / "images", tmp_path / "masks", "validation")
    (tmp_path / "images" / f"{source[0]['name']}.png").write_bytes(
        encode(np.zeros((32, 32, 3), "u1"))
    )
    assert (
        export.main(["--workdir", str(workdir), "--calibrate", "--out", str(tmp_path / "b")]) == 0
    )
    assert "not the pictures" in capsys.readouterr().err
