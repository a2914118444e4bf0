"""Exclusive and overlapping classes, and pixels that do not count, from the mask to the metrics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import sklearn.metrics

from flax_unet import augment, classes, data, evaluate, fit, losses, metrics, predict, train
from flax_unet.classes import IGNORE
from flax_unet.model import UNet

K = 3


@pytest.fixture
def pair():
    """Logits of three classes, and a mask of indices of which a fifth does not count."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, K, (4, 6, 5, 1)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.2] = IGNORE
    return jnp.asarray(rng.normal(0, 3, (4, 6, 5, K)), jnp.float32), mask


def one_hot(mask):
    """One-hot [B, H, W, K], all of its entries IGNORE where the pixel does not count."""
    hot = (mask == np.arange(K)).astype(np.uint8)
    return np.where(mask == IGNORE, np.uint8(IGNORE), hot)


def softmax(logits):
    z = np.exp(np.asarray(logits, np.float64))
    return z / z.sum(-1, keepdims=True)


def entropies(logits, mask):
    """{(image, row, column): cross-entropy} of the pixels that count."""
    proba = softmax(logits)
    return {
        index[:3]: -np.log(proba[index[:3]][value])
        for index, value in np.ndenumerate(mask)
        if value != IGNORE
    }


def per_image(values, n=4):
    return [[v for index, v in values.items() if index[0] == i] for i in range(n)]


def test_cross_entropy_equals_a_loop_over_the_pixels_that_count(pair):
    expected = [np.mean(x) for x in per_image(entropies(*pair))]
    np.testing.assert_allclose(losses.cross_entropy(*pair), expected, rtol=1e-5)


def test_class_weights_are_those_of_a_weighted_mean(pair):
    weight, expected = np.array([0.5, 2.0, 3.0]), []
    for i in range(4):
        terms = {k: v for k, v in entropies(*pair).items() if k[0] == i}
        w = [weight[pair[1][index][0]] for index in terms]
        expected.append(np.average(list(terms.values()), weights=w))
    loss = losses.cross_entropy(*pair, class_weight=tuple(weight))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        losses.cross_entropy(*pair, class_weight=(1, 2))


@pytest.mark.parametrize("loss", [losses.bce, losses.cross_entropy])
def test_a_weight_of_each_pixel_is_a_factor_of_its_entropy(pair, loss):
    logits, mask = pair if loss is losses.cross_entropy else (pair[0][..., :1], pair[1] % 2)
    weight = np.random.default_rng(1).random(mask.shape).astype(np.float32)
    ones, twice = np.ones_like(weight), np.full_like(weight, 2)
    np.testing.assert_allclose(loss(logits, mask, ones), loss(logits, mask), rtol=1e-6)
    np.testing.assert_allclose(loss(logits, mask, twice), 2 * loss(logits, mask), rtol=1e-6)
    parts = [loss(logits, mask, weight * part) for part in (weight > 0.5, weight <= 0.5)]
    np.testing.assert_allclose(sum(parts), loss(logits, mask, weight), rtol=1e-5)
    assert (np.asarray(parts[0]) > 0).all()


def test_soft_dice_of_exclusive_classes_equals_the_reference(pair):
    logits, mask = pair
    expected = []
    for i in range(4):
        counts = mask[i, ..., 0] != IGNORE
        p, y = softmax(logits[i])[counts], np.eye(K)[mask[i, ..., 0][counts]]
        ratio = (2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1)
        expected.append(1 - ratio.mean())
    loss = losses.soft_dice(logits, mask, exclusive=True)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    both = losses.cross_entropy_soft_dice(logits, mask)
    np.testing.assert_allclose(both, losses.cross_entropy(*pair) + loss, rtol=1e-6)


def test_the_losses_of_one_class_leave_out_what_does_not_count():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (2, 8, 8, 1)).astype(np.float32)
    mask = rng.integers(0, 2, logits.shape).astype(np.uint8)
    mask[:, :, :3] = IGNORE
    kept = logits[:, :, 3:], mask[:, :, 3:]
    np.testing.assert_allclose(losses.bce(logits, mask), reference.bce(*kept), rtol=1e-6)
    np.testing.assert_allclose(
        losses.soft_dice(logits, mask), reference.soft_dice(*kept), rtol=1e-5
    )


LOSSES = {
    "bce": lambda x, y: losses.bce(x[..., :1], jnp.where(y == IGNORE, IGNORE, y % 2)),
    "bce_soft_dice": lambda x, y: losses.bce_soft_dice(x[..., :1], jnp.where(y == 255, 255, y % 2)),
    "overlapping": lambda x, y: losses.bce_soft_dice(x, jnp.repeat(jnp.where(y > 1, 255, y), 3, 3)),
    "cross_entropy": losses.cross_entropy,
    "weighted": partial(losses.cross_entropy, class_weight=(1.0, 2.0, 3.0)),
    "cross_entropy_soft_dice": losses.cross_entropy_soft_dice,
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_lies_under_a_pixel_that_does_not_count_changes_nothing(pair, name):
    logits, mask = pair
    other = jnp.where(mask == IGNORE, 50.0, logits)  # another prediction for these pixels alone
    assert (np.asarray(other) != np.asarray(logits)).any()
    loss = LOSSES[name]
    np.testing.assert_array_equal(loss(logits, mask), loss(other, mask))
    gradient = jax.grad(lambda x: loss(x, mask).sum())(logits)
    assert np.isfinite(gradient).all() and (np.asarray(gradient) != 0).any()
    np.testing.assert_array_equal(np.asarray(gradient)[np.repeat(mask == IGNORE, K, 3)], 0)
    for a, b in zip(metrics.confusion(logits, mask), metrics.confusion(other, mask), strict=True):
        np.testing.assert_array_equal(a, b)
    ones = jnp.ones(4)
    assert metrics.iou_coef(logits, mask, ones) == metrics.iou_coef(other, mask, ones)


@pytest.mark.parametrize("name", ["cross_entropy", "weighted", "cross_entropy_soft_dice"])
def test_index_and_one_hot_masks_give_the_same_numbers(pair, name):
    logits, mask = pair
    loss = LOSSES[name]
    np.testing.assert_array_equal(loss(logits, mask), loss(logits, one_hot(mask)))
    pairs = zip(metrics.confusion(*pair), metrics.confusion(logits, one_hot(mask)), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_an_image_that_does_not_count_has_a_loss_of_zero_and_a_finite_gradient(pair):
    mask = np.full_like(pair[1], IGNORE)
    for name in ("cross_entropy", "weighted"):
        value, gradient = jax.value_and_grad(lambda x, n=name: LOSSES[n](x, mask).sum())(pair[0])
        assert value == 0 and not np.asarray(gradient).any()


def test_exclusive_counts_are_those_of_sklearns_confusion_matrix(pair):
    logits, mask = pair
    counts = metrics.pooled(metrics.confusion(logits, mask))
    keep = mask[..., 0] != IGNORE
    true, predicted = mask[..., 0][keep], np.asarray(logits).argmax(-1)[keep]
    table = sklearn.metrics.multilabel_confusion_matrix(true, predicted)
    np.testing.assert_array_equal(counts.tn, table[:, 0, 0])
    np.testing.assert_array_equal(counts.fp, table[:, 0, 1])
    np.testing.assert_array_equal(counts.fn, table[:, 1, 0])
    np.testing.assert_array_equal(counts.tp, table[:, 1, 1])
    np.testing.assert_allclose(
        metrics.iou(counts), sklearn.metrics.jaccard_score(true, predicted, average=None)
    )


def test_overlapping_classes_are_predicted_independently(pair):
    logits = pair[0]
    mask = np.random.default_rng(3).integers(0, 2, logits.shape).astype(np.uint8)
    counts = metrics.confusion(logits, mask, overlapping=True)
    np.testing.assert_array_equal(counts.tp, ((np.asarray(logits) > 0) & (mask == 1)).sum((1, 2)))
    proba = classes.probabilities(logits, overlapping=True)
    np.testing.assert_allclose(proba, reference.sigmoid(logits), rtol=1e-5)
    np.testing.assert_array_equal(classes.decide(proba, overlapping=True), np.asarray(logits) > 0)


@pytest.mark.parametrize("k", [1, 3])
def test_probabilities_that_are_nan_are_not_taken_for_background(k):
    proba = np.full((4, 4, k), 1 / k, np.float32)
    proba[2, 1, 0] = np.nan
    with pytest.raises(ValueError, match="probabilities are NaN"):
        classes.decide(proba)


def test_exclusive_probabilities_add_up_and_the_largest_is_decided(pair):
    proba = np.asarray(classes.probabilities(pair[0]))
    np.testing.assert_allclose(proba, softmax(pair[0]), rtol=1e-5)
    mask = classes.decide(proba)
    assert mask.dtype == np.uint8 and mask.shape == (4, 6, 5, 1)
    np.testing.assert_array_equal(mask[..., 0], proba.argmax(-1))


def test_shapes_that_do_not_fit_are_refused(pair):
    logits, mask = pair
    for wrong in (mask[..., 0], mask[:1], np.repeat(mask, 2, 3)):
        for function in (losses.cross_entropy, metrics.confusion):
            with pytest.raises(ValueError, match=r"logits \(4, 6, 5, 3\) and mask .*do not fit"):
                function(logits, wrong)
    with pytest.raises(ValueError, match="for exclusive classes use cross_entropy"):
        losses.bce(logits, mask)
    with pytest.raises(ValueError, match="unless the classes are exclusive"):
        losses.soft_dice(logits, mask)


# Augmentation


def test_a_resampled_mask_holds_no_value_that_was_not_there():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 24, 24, 3), np.uint8)
    mask = rng.choice(np.array([0, 3, 7, IGNORE], np.uint8), (6, 24, 24, 1))
    _, moved = augment.random_affine(jax.random.key(0), image, mask, outside=IGNORE)
    assert set(np.unique(moved)) == {0, 3, 7, IGNORE}
    _, moved = augment.random_affine(jax.random.key(0), image, mask[..., :1] * 0 + 7, outside=9)
    assert set(np.unique(moved)) == {7, 9}


def test_the_value_with_most_of_the_weight_wins():
    values = jnp.array([0.0, 3.0, 5.0, 255.0])
    rng = np.random.default_rng(1)
    pixels = values[rng.integers(0, 4, (4, 30, 30, 1))]
    dy, dx = (jnp.asarray(rng.random((30, 30, 1)), jnp.float32) for _ in range(2))
    result = np.asarray(augment.vote(list(pixels), dy, dx))
    for i, j in np.ndindex(30, 30):
        y, x = float(dy[i, j, 0]), float(dx[i, j, 0])
        votes = {}
        for corner, w in enumerate(((1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x)):
            value = float(pixels[corner, i, j, 0])
            votes[value] = votes.get(value, 0) + w
        assert result[i, j, 0] == max(votes, key=votes.get)


def test_a_mask_of_0_and_1_is_its_interpolation_at_one_half():
    rng = np.random.default_rng(2)
    mask = jnp.asarray(rng.integers(0, 2, (32, 32, 1)), jnp.float32)
    pixels, dy, dx = augment.sample(mask, augment.affine(rotation=33, scale=1.1, shift=0.3))
    expected = augment.interpolate(pixels, dy, dx) >= 0.5
    np.testing.assert_array_equal(augment.vote(pixels, dy, dx), expected)


# Training and evaluation

NET = UNet(features=(8, 16), num_classes=K, convs=1)


@pytest.fixture(scope="module")
def scene():
    """Images whose class is the largest of the three colours."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    image = coarse.repeat(4, 1).repeat(4, 2)
    return image, image.argmax(-1)[..., None].astype(np.uint8)


def arrays_of(image, mask):
    return data.Arrays(image, mask, [str(i) for i in range(len(image))], "")


def train_on(scene, mask=None, model=NET, loss=losses.cross_entropy, steps=60):
    image, index = scene
    batch = {"image": image, "mask": index if mask is None else mask, "weight": np.ones(8)}
    tx = optax.adam(1e-2)
    state = train.create_train_state(model, tx, jax.random.key(0), (1, 32, 32, 3))
    step = train.make_train_step(model, tx, loss)
    result = {}
    for _ in range(steps):
        state, result = step(state, batch, jax.random.key(1))
    return state, result


def test_a_network_learns_exclusive_classes_from_indices_and_from_one_hot_masks(scene):
    image, index = scene
    steps = [train_on(scene, mask, steps=1)[1] for mask in (index, one_hot(index))]
    assert float(steps[0]["loss"]) == pytest.approx(float(steps[1]["loss"]), rel=1e-6)
    for name in ("update_norm", "iou_coef"):
        assert float(steps[0][name]) == pytest.approx(float(steps[1][name]), rel=1e-5)
    state, _ = train_on(scene)
    proba = predict.predict_proba(NET, state.variables, image)
    np.testing.assert_allclose(np.asarray(proba).sum(-1), 1, rtol=1e-5)
    predicted = classes.decide(proba)[..., 0]
    assert (predicted == index[..., 0]).mean() > 0.95
    for mask in (index, one_hot(index)):
        summary, counts = evaluate.evaluate(
            NET, state.variables, arrays_of(image, mask), loss_fn=losses.cross_entropy
        )
        f1 = sklearn.metrics.f1_score(index.ravel(), predicted.ravel(), average="macro")
        assert summary["dice_pooled"] == pytest.approx(f1, abs=1e-6)
        assert counts.tp.shape == (8, K)


def test_a_weight_map_reaches_the_loss_and_no_augmentation_loses_it(scene):
    image, index = scene
    left = np.arange(32)[None, None, :, None] < 16
    even = np.arange(8)[:, None, None, None] % 2 == 0
    weight = np.broadcast_to(left == even, index.shape).astype(np.float32)
    batch = {"image": image, "mask": index, "weight": np.ones(8, np.float32)}
    tx, key = optax.sgd(0.1), jax.random.key(1)

    def gradient(accumulate=1, **extra):
        state = train.create_train_state(NET, tx, jax.random.key(0), (1, 32, 32, 3))
        step = train.make_train_step(NET, tx, losses.cross_entropy, accumulate=accumulate)
        state, result = step(state, batch | extra, key)
        return state.params, result["loss"]

    half = np.where(weight > 0, index, IGNORE).astype(np.uint8)
    params, loss = gradient(pixel_weight=weight)
    ignored, double = gradient(mask=half)
    np.testing.assert_allclose(2 * loss, double, rtol=1e-5)  # the mean is over twice the pixels
    rows = {"index": np.arange(8, dtype=np.int32)[::-1]}
    for other, _ in (gradient(2, pixel_weight=weight), gradient(pixel_weight=weight, **rows)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, other)
    state = train.create_train_state(NET, tx, jax.random.key(0), (1, 32, 32, 3))
    step = train.make_train_step(NET, tx, losses.cross_entropy, augment=augment.random_flips)
    with pytest.raises(ValueError, match="moves no pixel_weight"):
        step(state, batch | {"pixel_weight": weight}, key)


# Values in memory


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_mask_of_which_nothing_counts_is_no_error(channels, xp):
    classes.check_mask(xp.full((2, 4, 4, 1), IGNORE, np.uint8), channels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, m: (i, (m > 0) * np.uint8(255)), "no values but 0 and 255"),
        (lambda i, m: (i, m + np.uint8(1)), "values from 1 to 3: use 0 to 2"),
        (lambda i, m: (i, m.astype(np.int32) - 1), "values from -1 to 1"),
        (lambda i, m: (i.astype(np.float32), m), "type float32 and values from 0.0 to 255.0"),
        (lambda i, m: (i / 255 + np.nan, m), "values from (nan to nan|inf to -inf)"),
    ],
)
@pytest.mark.parametrize("resident", [False, True])
def test_bad_values_in_memory_are_refused_before_the_first_step(scene, change, words, resident):
    image, mask = change(*scene)
    arrays = arrays_of(image, mask)
    if resident:
        arrays = data.to_device(arrays)
    tx = optax.adam(1e-2)
    state = train.create_train_state(NET, tx, jax.random.key(0), (1, 32, 32, 3))
    with pytest.raises(ValueError, match=words):
        evaluate.evaluate(NET, state.variables, arrays, loss_fn=losses.cross_entropy)
    steps = []
    epochs = fit.fit(
        NET,
        tx,
        losses.cross_entropy,
        state,
        8,
        lambda order: iter([{"image": image, "mask": mask, "weight": np.ones(8, np.float32)}]),
        key=jax.random.key(0),
        seed=0,
        epochs=1,
        batch_size=8,
        on_step=lambda *step: steps.append(step),
    )
    with pytest.raises(ValueError, match=words):
        next(epochs)
    assert not steps


def test_a_label_that_is_no_class_is_refused_in_a_later_batch(scene):
    image, mask = scene

    def batches(order):
        for i in order:
            labels = np.where(i == order[-1], mask + np.uint8(1), mask)
            yield {"image": image, "mask": labels, "weight": np.ones(8, np.float32)}

    tx = optax.adam(1e-2)
    state = train.create_train_state(NET, tx, jax.random.key(0), (1, 32, 32, 3))
    epochs = fit.fit(
        NET,
        tx,
        losses.cross_entropy,
        state,
        3,
        batches,
        key=jax.random.key(0),
        seed=0,
        epochs=1,
        batch_size=1,
    )
    with pytest.raises(ValueError, match="values from 1 to 3"):
        next(epochs)
