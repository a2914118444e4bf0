"""Scores at the network's size and at the pictures' own sizes, and the report on them."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import sklearn.metrics
from PIL import Image

from flax_unet import boundary, data, evaluate, formats, images, metrics, predict
from flax_unet.images import RGB
from flax_unet.losses import bce, bce_soft_dice
from flax_unet.model import UNet
from flax_unet.pictures import DataError

MODEL = UNet(features=(4, 8, 8), norm=2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))


class Bright:
    """A network that predicts what is bright: logits [B, H, W, 1]."""

    stride = 1

    def apply(self, variables, image):
        return 20 * (image.mean(-1, keepdims=True) - 0.5)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def drawn(n):
    """Pictures of several sizes with a bright disc, and masks that are shifted a little."""
    rng, source, truth = np.random.default_rng(0), [], []
    for i in range(n):
        h, w = rng.integers(40, 90, 2)
        y, x = np.mgrid[:h, :w]
        r, cy, cx = rng.uniform(4, 18), h / 2, w / 2
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        mask = (y - cy - 2) ** 2 + (x - cx) ** 2 < r * r
        grey = np.where(disc, 230, 30).astype(np.uint8)
        picture = png(np.stack([grey] * 3, -1))
        source.append({"name": str(i), "image": picture, "mask": png(255 * mask.astype(np.uint8))})
        truth.append((disc, mask))
    return source, truth


def random_arrays(n, height=8, width=8):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n, height, width, 3), np.uint8)
    masks = rng.integers(0, 2, (n, height, width, 1), np.uint8)
    return data.Arrays(images, masks, [str(i) for i in range(n)], "")


@pytest.mark.parametrize("place", [lambda arrays: arrays, data.to_device], ids=["host", "device"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_is_exact_for_any_batch_size(variables, batch_size, place):
    arrays = random_arrays(7)
    masks, size = arrays.mask, batch_size
    logits = np.asarray(jax.jit(MODEL.apply)(variables, arrays.image / np.float32(255)))
    result, counts = evaluate.evaluate(MODEL, variables, place(arrays), batch_size=size)
    true_positives = [((x > 0) & (m > 0)).sum() for x, m in zip(logits, masks, strict=True)]
    np.testing.assert_array_equal(counts.tp[:, 0], true_positives)
    dice = [
        2 * t / ((x > 0).sum() + m.sum())
        for t, x, m in zip(true_positives, logits, masks, strict=True)
    ]
    assert result["dice_per_image"] == pytest.approx(np.mean(dice))
    assert result["loss"] == pytest.approx(reference.bce(logits, masks).mean(), rel=1e-5)
    assert result["n_images"] == 7
    coefs = [
        reference.iou_coef(reference.sigmoid(logits[i : i + size]), masks[i : i + size])
        for i in range(0, 7, size)
    ]
    assert result["iou_coef"] == pytest.approx(np.mean(coefs), rel=1e-5)


def test_a_mirrored_model_is_evaluated_by_the_mean_of_its_logits(variables):
    arrays = random_arrays(2, 8, 12)
    apply, total = jax.jit(MODEL.apply), 0
    for axes in ((), (1,), (2,), (1, 2)):
        logits = apply(variables, np.flip(arrays.image, axes) / np.float32(255))
        total = total + np.flip(np.asarray(logits, np.float64), axes)
    _, counts = evaluate.evaluate(predict.Mirrored(MODEL), variables, arrays)
    expected = ((total > 0) & (arrays.mask > 0)).sum((1, 2, 3))
    np.testing.assert_array_equal(counts.tp[:, 0], expected)


def test_an_empty_data_set_is_refused(variables):
    empty = data.Arrays(np.zeros((0, 8, 8, 3)), np.zeros((0, 8, 8, 1)), [], "")
    with pytest.raises(DataError, match="empty"):
        evaluate.evaluate(MODEL, variables, empty)
    with pytest.raises(DataError, match="empty"):
        next(evaluate.score(MODEL, variables, [], 8))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_scores_equal_evaluate_and_predict_picture(variables, batch_size, mirrored):
    source, truth = drawn(7)
    model = predict.Mirrored(MODEL) if mirrored else MODEL
    options = {"batch_size": batch_size, "loss_fn": bce_soft_dice}
    batches = list(evaluate.score(model, variables, source, 16, tolerance=3.0, **options))
    content, counts, reliability = evaluate.report(batches)

    # At the network's size
    arrays = data.load(source, 16)
    expected, expected_counts = evaluate.evaluate(model, variables, arrays, **options)
    assert {key: content[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(counts, expected_counts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [name for batch in batches for name in batch.name] == arrays.name
    for name in ("image", "mask"):
        stacked = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(stacked, getattr(arrays, name))
    proba = np.concatenate([batch.prediction for batch in batches])
    theirs = predict.predict_proba(model, variables, arrays.image)
    np.testing.assert_allclose(proba, theirs, atol=2**-11)  # float16

    # At the pictures' own sizes
    rows, total = content["own_size"]["images"], metrics.Reliability(*np.zeros((3, 15)))
    for row, entry, (_, mask) in zip(rows, source, truth, strict=True):
        image, _ = data.decode_pair(entry, formats.find(source), RGB)
        proba = predict.predict_resized(model, variables, image, 16)[..., 0]
        expected = evaluate.score_picture(proba > 0.5, mask, tolerance=3.0)
        assert row == {"name": entry["name"], **{k: pytest.approx(v) for k, v in expected.items()}}
        total = metrics.Reliability(
            *(a + b for a, b in zip(total, metrics.reliability(proba, mask), strict=True))
        )
    np.testing.assert_array_equal(reliability.pixels, total.pixels)
    np.testing.assert_array_equal(reliability.positives, total.positives)
    np.testing.assert_allclose(reliability.probability_sum, total.probability_sum, rtol=1e-6)


def test_each_picture_is_opened_decoded_and_predicted_once(monkeypatch):
    entries, _ = drawn(7)
    opened, decoded, traced, predicted = [], [], [], []

    class Source:
        def __len__(self):
            return len(entries)

        def __getitem__(self, i):
            opened.append(i)
            return entries[i]

    class Counted(Bright):
        def apply(self, variables, image):
            traced.append(image.shape)
            jax.debug.callback(lambda rows: predicted.append(len(rows)), image[:, 0, 0, 0])
            return super().apply(variables, image)

    decode_pair = data.decode_pair
    monkeypatch.setattr(
        data, "decode_pair", lambda e, *form: decoded.append(e["name"]) or decode_pair(e, *form)
    )
    form = formats.find(entries), images.find(entries)
    batches = list(evaluate.score(Counted(), {}, Source(), 32, *form, batch_size=3))
    evaluate.report(batches)
    jax.effects_barrier()
    assert sorted(opened) == list(range(7))
    assert sorted(decoded) == [str(i) for i in range(7)]
    assert predicted == [3, 3, 3]  # the last one is padded
    assert traced == [(3, 32, 32, 3)]


def test_a_score_equals_sklearns_and_its_distances_are_in_percent_of_the_diagonal():
    rng = np.random.default_rng(0)
    proba, true = rng.random((30, 40)), rng.random((30, 40)) < 0.3
    score = evaluate.score_picture(proba > 0.5, true)
    flat = true.ravel(), proba.ravel() > 0.5
    assert score["foreground_fraction"] == pytest.approx(true.mean())
    assert score["dice"] == pytest.approx(sklearn.metrics.f1_score(*flat))
    assert score["iou"] == pytest.approx(sklearn.metrics.jaccard_score(*flat))
    assert score["precision"] == pytest.approx(sklearn.metrics.precision_score(*flat))
    assert score["recall"] == pytest.approx(sklearn.metrics.recall_score(*flat))
    assert [score[key] for key in ("tn", "fp", "fn", "tp")] == list(
        sklearn.metrics.confusion_matrix(*flat).ravel()
    )
    d = boundary.distances(proba > 0.5, true)  # the diagonal is 50 pixels: one of them is 2 %
    assert score["hd95"] == pytest.approx(2 * boundary.hd95(d))
    assert score["assd"] == pytest.approx(2 * boundary.assd(d))
    for tolerance, pixels in ((1.0, 0.5), (4.0, 2.0)):
        expected = boundary.surface_dice(d, pixels)
        assert (
            evaluate.score_picture(proba > 0.5, true, tolerance=tolerance)["surface_dice"]
            == expected
        )


def report_on(source):
    return evaluate.report(list(evaluate.score(Bright(), {}, source, 64)))


def test_a_report_scores_pictures_at_their_own_sizes_and_by_the_size_of_the_polyp():
    source, truth = drawn(12)
    content, counts, reliability = report_on(source)
    own_size, rows = content["own_size"], content["own_size"]["images"]
    assert [row["name"] for row in rows] == [str(i) for i in range(12)]
    sizes = dict.fromkeys(evaluate.POLYP_SIZES, 0)
    for row, (disc, mask) in zip(rows, truth, strict=True):
        assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == mask.size
        # The network finds the disc except for pixels of its outline, lost in resizing.
        exact = 2 * (disc & mask).sum() / (disc.sum() + mask.sum())
        assert row["dice"] == pytest.approx(exact, abs=0.06)
        fraction = mask.mean()
        sizes["small" if fraction < 0.05 else "medium" if fraction < 0.2 else "large"] += 1
    assert {k: v["n_images"] for k, v in own_size["by_polyp_size"].items()} == sizes
    assert min(sizes["small"], sizes["medium"]) > 0
    dice = np.array([row["dice"] for row in rows])
    assert own_size["per_image"]["dice"]["mean"] == pytest.approx(dice.mean())
    low, high = own_size["per_image"]["dice"]["interval"]
    assert low < dice.mean() < high
    sums = {key: sum(row[key] for row in rows) for key in ("tp", "fp", "fn")}
    pooled = 2 * sums["tp"] / (2 * sums["tp"] + sums["fp"] + sums["fn"])
    assert own_size["pooled"]["dice"] == pytest.approx(pooled)
    assert own_size["calibration_error"] == metrics.calibration_error(reliability)
    assert reliability.pixels.sum() == sum(mask.size for _, mask in truth)
    assert reliability.positives.sum() == sum(mask.sum() for _, mask in truth)
    for key, ratio in (("dice", metrics.dice), ("iou", metrics.iou)):
        values = ratio(counts).mean(-1)
        assert content[f"{key}_per_image"] == pytest.approx(values.mean())
        assert content[f"{key}_per_image_interval"] == metrics.bootstrap_interval(values)
    json.dumps(content)


def test_nothing_to_report_is_refused():
    with pytest.raises(ValueError, match="nothing to report"):
        evaluate.report([])


def test_a_class_may_be_empty_and_a_picture_without_a_polyp_is_not_small():
    source, truth = drawn(12)
    small = [entry for entry, (_, mask) in zip(source, truth, strict=True) if mask.mean() < 0.05]
    black, empty = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    small.append({"name": "none", "image": png(black), "mask": png(empty)})
    content, *_ = report_on(small)
    by_size = content["own_size"]["by_polyp_size"]
    sizes = {polyp: values["n_images"] for polyp, values in by_size.items()}
    assert sizes == {"none": 1, "small": len(small) - 1, "medium": 0, "large": 0}
    assert by_size["none"]["per_image"]["dice"]["mean"] == 1
    json.dumps(content)


def test_the_cost_is_counted():
    model = UNet(features=(4, 8), convs=1, norm=None)
    source, _ = drawn(3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    cost = evaluate.cost(model, variables, list(evaluate.score(model, variables, source, 16)))
    # Convolutions 3-4, 4-8, 8-4, the transposed 8-4 and the head, each with its bias.
    weights = (9 * 3 * 4 + 4) + (9 * 4 * 8 + 8) + (4 * 8 * 4 + 4) + (9 * 8 * 4 + 4) + (4 + 1)
    assert cost["parameters"] == weights
    products = 16 * 16 * 9 * (3 * 4 + 8 * 4) + 8 * 8 * (9 * 4 * 8 + 8 * 16) + 16 * 16 * 4
    assert cost["gflop_per_image"] == pytest.approx(2 * products / 1e9, rel=0.15)
    assert cost["images_per_second"] > 0


def test_a_loss_made_on_the_spot_does_not_compile_the_network_again():
    traced = []

    class Counted(Bright):
        def apply(self, variables, image):
            traced.append(image.shape)
            return super().apply(variables, image)

    model, arrays = Counted(), random_arrays(4)
    values = [
        evaluate.evaluate(model, {}, arrays, loss_fn=lambda x, y, k=k: k * bce(x, y))[0]["loss"]
        for k in (1, 2, 3)
    ]
    np.testing.assert_allclose(values, values[0] * np.array([1, 2, 3]), rtol=1e-6)
    assert len(traced) == 1


def test_pictures_in_tiles_are_scored_at_their_own_sizes_alone():
    source, truth = drawn(5)
    tiled = predict.Tiled(Bright(), 16)
    batches = list(evaluate.score(tiled, {}, source, None))
    content, counts, _ = evaluate.report(batches)
    for i, (disc, mask) in enumerate(truth):
        row = content["own_size"]["images"][i]
        both = (disc & mask).sum(), (disc & ~mask).sum(), (~disc & mask).sum()
        assert (row["tp"], row["fp"], row["fn"]) == both
        assert [int(count[i, 0]) for count in counts][:3] == list(both)
    assert content["dice_per_image"] == content["own_size"]["per_image"]["dice"]["mean"]
    assert "loss" not in content and "iou_coef" not in content
    json.dumps(content, allow_nan=False)
    assert evaluate.cost(tiled, {"params": {}}, batches)["gflop_per_image"] is None


def spread(n):
    """Pictures of random greys, and masks that agree with the brighter ones most of the time."""
    rng, source, pairs = np.random.default_rng(2), [], []
    for i in range(n):
        grey = rng.integers(90, 170, (20, 30), np.uint8)
        mask = rng.random((20, 30)) < (grey - 90.0) / 80
        picture = png(np.stack([grey] * 3, -1))
        source.append({"name": str(i), "image": picture, "mask": png(255 * mask.astype(np.uint8))})
        pairs.append((reference.sigmoid(20 * (grey / 255 - 0.5)), mask))
    return source, pairs


def dice_of(proba, mask, threshold):
    predicted = proba > threshold
    return 2 * (predicted & mask).sum() / max(1, predicted.sum() + mask.sum())


@pytest.mark.parametrize("size", [None, (20, 30)], ids=["tiles", "resized"])
def test_a_threshold_decides_at_both_sizes_and_the_best_one_is_reported(size):
    source, pairs = spread(4)
    model = predict.Tiled(Bright(), 16) if size is None else Bright()
    for threshold in (0.3, 0.5, 0.72):
        batches = list(evaluate.score(model, {}, source, size, threshold=threshold))
        content, counts, _ = evaluate.report(batches)
        expected = [dice_of(proba, mask, threshold) for proba, mask in pairs]
        rows = [row["dice"] for row in content["own_size"]["images"]]
        np.testing.assert_allclose(rows, expected, rtol=1e-6)
        np.testing.assert_allclose(metrics.dice(counts)[:, 0], expected, rtol=1e-6)
        steps = [np.mean([dice_of(*pair, j / 100) for pair in pairs]) for j in range(100)]
        best = content["own_size"]["best_threshold"]
        assert best["threshold"] != 0.5
        assert steps[round(100 * best["threshold"])] == pytest.approx(max(steps))
        np.testing.assert_allclose([best["dice"], best["dice_at_half"]], [max(steps), steps[50]])


def test_a_threshold_that_is_none_is_refused():
    source, _ = drawn(2)
    with pytest.raises(ValueError, match=r"threshold is 1: it must be in \[0, 1\)"):
        list(evaluate.score(Bright(), {}, source, 40, threshold=1))
    three = formats.MaskFormat(values=((0, 0), (255, 1)), names=("a", "b", "c"))
    with pytest.raises(ValueError, match="exclusive classes have no threshold"):
        list(evaluate.score(Bright(), {}, source, 40, three, RGB, threshold=0.4))


def test_of_equally_good_thresholds_the_one_closest_to_a_half_is_the_best():
    thresholds = np.zeros((2, 2, 102), int)
    thresholds[:, 0, 1], thresholds[:, 1, 100] = 90, 10  # right at each threshold from 0.01
    assert evaluate.best_threshold(thresholds)[0] == 0.5
    thresholds[0, 0, 70] = 1  # a false positive up to 0.69
    assert evaluate.best_threshold(thresholds)[0] == 0.7


def test_a_mask_that_vanishes_in_resizing_is_counted_and_missed_at_its_own_size_alone():
    mask = np.zeros((64, 64), np.uint8)
    mask[30, 30] = 255
    source = [{"name": "a", "image": png(np.zeros((64, 64, 3), np.uint8)), "mask": png(mask)}]
    for size, lost, dice in ((16, 1, 1), (64, 0, 0)):
        content, *_ = evaluate.report(list(evaluate.score(Bright(), {}, source, size)))
        assert (content["masks_that_lost_a_class"], content["dice_per_image"]) == (lost, dice)
        assert content["own_size"]["images"][0]["dice"] == 0
