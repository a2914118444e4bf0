import jax.numpy as jnp
import numpy as np
import pytest
import reference
import sklearn.metrics

from flax_unet import metrics
from flax_unet.metrics import Confusion


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(-1, 2, (6, 9, 7, 1)), rng.random((6, 9, 7, 1)) < 0.3
    labels[0] = False  # no foreground, some predicted
    labels[1], logits[1] = False, -1  # no foreground, none predicted
    logits[2] = -1  # some foreground, none predicted
    return jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.float32)


SKLEARN = {
    metrics.dice: lambda y, p: sklearn.metrics.f1_score(y, p, zero_division=1),
    metrics.iou: lambda y, p: sklearn.metrics.jaccard_score(y, p, zero_division=1),
    metrics.precision: lambda y, p: sklearn.metrics.precision_score(y, p, zero_division=1),
    metrics.recall: lambda y, p: sklearn.metrics.recall_score(y, p, zero_division=1),
    metrics.accuracy: sklearn.metrics.accuracy_score,
}


@pytest.mark.parametrize("ratio", SKLEARN)
def test_ratios_equal_sklearn_per_image_and_pooled(pair, ratio):
    counts = metrics.confusion(*pair)
    true, predicted = np.asarray(pair[1]) > 0.5, np.asarray(pair[0]) > 0
    pairs = zip(true, predicted, strict=True)
    per_image = [SKLEARN[ratio](y.ravel(), p.ravel()) for y, p in pairs]
    np.testing.assert_allclose(ratio(counts)[:, 0], per_image, rtol=1e-6)
    expected = SKLEARN[ratio](true.ravel(), predicted.ravel())
    np.testing.assert_allclose(ratio(metrics.pooled(counts)), [expected], rtol=1e-12)


def test_ratios_of_known_counts():
    counts = Confusion(tp=np.array([3]), fp=np.array([1]), fn=np.array([2]), tn=np.array([4]))
    assert metrics.dice(counts) == [6 / 9]
    assert metrics.iou(counts) == [3 / 6]
    assert metrics.precision(counts) == [3 / 4]
    assert metrics.recall(counts) == [3 / 5]
    assert metrics.accuracy(counts) == [7 / 10]


def test_dice_is_one_if_there_is_no_polyp_and_none_is_predicted(pair):
    assert metrics.dice(metrics.confusion(*pair))[1, 0] == 1
    assert metrics.dice(metrics.confusion(*pair))[0, 0] == 0


def test_pooled_counts_do_not_overflow():
    maximum = np.full((3, 1), 2**31 - 1, np.int32)
    assert metrics.pooled(Confusion(*[maximum] * 4)).tp[0] == 3 * (2**31 - 1)


def test_a_logit_of_zero_predicts_background():
    counts = metrics.confusion(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
    assert [int(count[0, 0]) for count in counts] == [0, 0, 1, 0]


def test_classes_are_counted_separately():
    logits = jnp.stack([jnp.ones((1, 2, 2)), -jnp.ones((1, 2, 2))], axis=-1)
    counts = metrics.confusion(logits, jnp.ones((1, 2, 2, 2)))
    np.testing.assert_array_equal(counts.tp, [[4, 0]])
    np.testing.assert_array_equal(counts.fn, [[0, 4]])


def test_iou_coef_equals_the_tutorials_and_ignores_weight_zero(pair):
    logits, labels = pair
    proba, true = reference.sigmoid(logits), np.asarray(labels, np.float64)
    ones = jnp.ones(6)
    np.testing.assert_allclose(
        metrics.iou_coef(logits, labels, ones), reference.iou_coef(proba, true), rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics.iou_coef(logits, labels, ones.at[4:].set(0)),
        reference.iou_coef(proba[:4], true[:4]),
        rtol=1e-6,
    )


def test_summary_has_means_and_pooled_ratios(pair):
    counts = metrics.confusion(*pair)
    summary = metrics.summary([1.0, 2.0], [0.25, 0.75], counts)
    assert summary["loss"] == 1.5 and summary["iou_coef"] == 0.5 and summary["n_images"] == 6
    true, predicted = np.asarray(pair[1]) > 0.5, np.asarray(pair[0]) > 0
    for ratio in (metrics.dice, metrics.iou, metrics.precision, metrics.recall):
        pairs = zip(true, predicted, strict=True)
        per_image = [SKLEARN[ratio](y.ravel(), p.ravel()) for y, p in pairs]
        assert summary[f"{ratio.__name__}_per_image"] == pytest.approx(np.mean(per_image))
    for ratio in SKLEARN:
        name = "accuracy" if ratio is metrics.accuracy else f"{ratio.__name__}_pooled"
        expected = SKLEARN[ratio](true.ravel(), predicted.ravel())
        assert summary[name] == pytest.approx(expected), name


def test_reliability_counts_each_pixel_in_its_bin():
    rng = np.random.default_rng(0)
    proba, labels = rng.random((9, 8)), rng.random((9, 8)) < 0.4
    proba[0, :3] = 0, 1, 0.3  # both ends, and the limit between two bins
    count, probability_sum, positives = np.zeros((3, 10))
    for p, y in zip(proba.ravel(), labels.ravel(), strict=True):
        i = min(int(p * 10), 9)
        count[i] += 1
        probability_sum[i] += p
        positives[i] += y
    result = metrics.reliability(proba, labels, bins=10)
    np.testing.assert_array_equal(result.pixels, count)
    np.testing.assert_allclose(result.probability_sum, probability_sum)
    np.testing.assert_array_equal(result.positives, positives)
    gap = abs(probability_sum / count - positives / count)
    assert metrics.calibration_error(result) == pytest.approx((count / 72 * gap).sum())


def test_the_calibration_error_of_known_pixels():
    # Of four pixels at 0.9 three are foreground, of six at 0.2 none is.
    proba = np.array([0.9] * 4 + [0.2] * 6)
    labels = np.array([1, 1, 1, 0] + [0] * 6)
    error = metrics.calibration_error(metrics.reliability(proba, labels))
    assert error == pytest.approx(0.4 * 0.15 + 0.6 * 0.2)


def test_equal_to_torchmetrics():
    """Runs only if torchmetrics is installed: extra `peers`."""
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    proba = rng.random((4, 20, 30)).astype(np.float32)
    labels = rng.random((4, 20, 30)) < proba**2
    p, y = torch.from_numpy(proba), torch.from_numpy(labels).int()
    logits = jnp.asarray(np.log(proba / (1 - proba)))[..., None]
    total = metrics.pooled(metrics.confusion(logits, jnp.asarray(labels)[..., None]))
    for ratio, name in {
        metrics.dice: "BinaryF1Score",
        metrics.iou: "BinaryJaccardIndex",
        metrics.precision: "BinaryPrecision",
        metrics.recall: "BinaryRecall",
    }.items():
        expected = getattr(torchmetrics, name)()(p, y)
        assert ratio(total)[0] == pytest.approx(float(expected)), name
    expected = torchmetrics.BinaryCalibrationError(n_bins=15, norm="l1")(p, y)
    error = metrics.calibration_error(metrics.reliability(proba, labels))
    assert error == pytest.approx(float(expected), rel=1e-4)


def test_bootstrap_interval_is_close_to_the_normal_interval():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.001)
    assert high == pytest.approx(values.mean() + half, abs=0.001)


def test_bootstrap_intervals_of_columns_equal_those_of_single_columns():
    values = np.random.default_rng(0).random((50, 3)) ** np.array([1, 2, 3])
    expected = [metrics.bootstrap_interval(column) for column in values.T]
    np.testing.assert_allclose(metrics.bootstrap_interval(values), expected, rtol=0, atol=1e-12)


def test_probabilities_and_labels_of_other_shapes_have_no_reliability():
    with pytest.raises(ValueError, match="must have the same shape"):
        metrics.reliability(np.zeros((2, 3)), np.zeros((3, 2)))
