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
    labels[0] = False  # nothing there, something claimed
    labels[1], logits[1] = False, -1  # nothing there, nothing claimed
    logits[2] = -1  # something there, nothing claimed
    return jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.float32)


FIGURES = {
    metrics.dice: lambda y, p: sklearn.metrics.f1_score(y, p, zero_division=1),
    metrics.iou: lambda y, p: sklearn.metrics.jaccard_score(y, p, zero_division=1),
    metrics.precision: lambda y, p: sklearn.metrics.precision_score(y, p, zero_division=1),
    metrics.recall: lambda y, p: sklearn.metrics.recall_score(y, p, zero_division=1),
    metrics.accuracy: sklearn.metrics.accuracy_score,
}


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_equals_sklearn_per_image_and_pooled(pair, figure):
    counts = metrics.confusion(*pair)
    truth, answer = np.asarray(pair[1]) > 0.5, np.asarray(pair[0]) > 0
    each = [FIGURES[figure](y.ravel(), p.ravel()) for y, p in zip(truth, answer, strict=True)]
    np.testing.assert_allclose(figure(counts)[:, 0], each, rtol=1e-6)
    together = FIGURES[figure](truth.ravel(), answer.ravel())
    np.testing.assert_allclose(figure(metrics.pooled(counts)), [together], rtol=1e-12)


def test_hand_made_counts():
    counts = Confusion(tp=np.array([3]), fp=np.array([1]), fn=np.array([2]), tn=np.array([4]))
    assert metrics.dice(counts) == [6 / 9]
    assert metrics.iou(counts) == [3 / 6]
    assert metrics.precision(counts) == [3 / 4]
    assert metrics.recall(counts) == [3 / 5]
    assert metrics.accuracy(counts) == [7 / 10]


def test_no_polyp_and_none_predicted_is_dice_one(pair):
    assert metrics.dice(metrics.confusion(*pair))[1, 0] == 1
    assert metrics.dice(metrics.confusion(*pair))[0, 0] == 0


def test_pooled_counts_do_not_overflow():
    big = np.full((3, 1), 2**31 - 1, np.int32)
    assert metrics.pooled(Confusion(big, big, big, big)).tp[0] == 3 * (2**31 - 1)


def test_a_logit_of_zero_is_negative():
    counts = metrics.confusion(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
    assert [int(count[0, 0]) for count in counts] == [0, 0, 1, 0]


def test_classes_are_counted_apart():
    logits = jnp.stack([jnp.ones((1, 2, 2)), -jnp.ones((1, 2, 2))], axis=-1)
    counts = metrics.confusion(logits, jnp.ones((1, 2, 2, 2)))
    np.testing.assert_array_equal(counts.tp, [[4, 0]])
    np.testing.assert_array_equal(counts.fn, [[0, 4]])


def test_iou_coef_is_the_tutorials_and_ignores_weight_zero(pair):
    logits, labels = pair
    proba, truth = reference.sigmoid(logits), np.asarray(labels, np.float64)
    ones = jnp.ones(6)
    np.testing.assert_allclose(
        metrics.iou_coef(logits, labels, ones), reference.iou_coef(proba, truth), rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics.iou_coef(logits, labels, ones.at[4:].set(0)),
        reference.iou_coef(proba[:4], truth[:4]),
        rtol=1e-6,
    )


def test_summary_names_the_means(pair):
    counts = metrics.confusion(*pair)
    figures = metrics.summary([1.0, 2.0], [0.25, 0.75], counts)
    assert figures["loss"] == 1.5 and figures["iou_coef"] == 0.5 and figures["n_images"] == 6
    truth, answer = np.asarray(pair[1]) > 0.5, np.asarray(pair[0]) > 0
    for ratio in (metrics.dice, metrics.iou, metrics.precision, metrics.recall):
        pairs = zip(truth, answer, strict=True)
        each = [FIGURES[ratio](y.ravel(), p.ravel()) for y, p in pairs]
        assert figures[f"{ratio.__name__}_per_image"] == pytest.approx(np.mean(each))
    for ratio in (metrics.dice, metrics.iou, metrics.precision, metrics.recall, metrics.accuracy):
        name = "accuracy" if ratio is metrics.accuracy else f"{ratio.__name__}_pooled"
        expected = FIGURES[ratio](truth.ravel(), answer.ravel())
        assert figures[name] == pytest.approx(expected), name


def test_reliability_counts_each_pixel_in_its_part():
    rng = np.random.default_rng(0)
    proba, labels = rng.random((9, 8)), rng.random((9, 8)) < 0.4
    proba[0, :3] = 0, 1, 0.3  # both ends, and a limit between two parts
    n, claimed, found = np.zeros(10), np.zeros(10), np.zeros(10)
    for p, y in zip(proba.ravel(), labels.ravel(), strict=True):
        part = min(int(p * 10), 9)
        n[part], claimed[part], found[part] = n[part] + 1, claimed[part] + p, found[part] + y
    counts = metrics.reliability(proba, labels, parts=10)
    for a, b in zip(counts, (n, claimed, found), strict=True):
        np.testing.assert_allclose(a, b)
    share = n / 72
    gap = abs(claimed / n - found / n)
    assert metrics.calibration_error(counts) == pytest.approx((share * gap).sum())


def test_the_calibration_error_of_a_hand_made_set():
    # Four pixels at 0.9 of which three are foreground, six at 0.2 of which none is.
    proba = np.array([0.9] * 4 + [0.2] * 6)
    labels = np.array([1, 1, 1, 0] + [0] * 6)
    error = metrics.calibration_error(metrics.reliability(proba, labels))
    assert error == pytest.approx(0.4 * 0.15 + 0.6 * 0.2)


def test_equal_to_torchmetrics():
    """Only where it is installed."""
    theirs = pytest.importorskip("torchmetrics.classification")
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
        expected = getattr(theirs, name)()(p, y)
        assert ratio(total)[0] == pytest.approx(float(expected)), name
    expected = theirs.BinaryCalibrationError(n_bins=15, norm="l1")(p, y)
    error = metrics.calibration_error(metrics.reliability(proba, labels))
    assert error == pytest.approx(float(expected), rel=1e-4)


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.001)
    assert high == pytest.approx(values.mean() + half, abs=0.001)
