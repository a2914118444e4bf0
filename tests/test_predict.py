import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image

from flax_unet import data, metrics, predict
from flax_unet.model import UNet

MODEL = UNet(features=(4, 8, 8), group_size=2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))


def image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_any_size_is_padded_by_its_edge_and_cropped(variables):
    picture = image(9, 14, 3)
    padded = np.zeros((12, 16, 3), np.float32)
    for i in range(12):
        for j in range(16):
            padded[i, j] = picture[min(i, 8), min(j, 13)] / np.float32(255)
    logits = jax.jit(MODEL.apply)(variables, padded[None])
    proba = predict.predict_proba(MODEL, variables, picture)
    assert proba.shape == (9, 14, 1) and proba.dtype == jnp.float32
    np.testing.assert_allclose(proba, reference.sigmoid(logits)[0, :9, :14], rtol=1e-5, atol=1e-6)


def test_a_batch_is_its_images_and_float_is_uint8(variables):
    batch = image(3, 8, 12, 3)
    together = predict.predict_proba(MODEL, variables, batch)
    assert together.shape == (3, 8, 12, 1)
    alone = predict.predict_proba(MODEL, variables, batch[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-5, atol=1e-6)
    as_float = predict.predict_proba(MODEL, variables, batch / np.float32(255))
    np.testing.assert_allclose(together, as_float, rtol=1e-5)


def test_a_mask_is_the_probabilities_above_the_threshold(variables):
    picture = image(8, 8, 3)
    proba = np.asarray(predict.predict_proba(MODEL, variables, picture))
    for threshold in (0.5, float(np.median(proba))):
        mask = predict.predict(MODEL, variables, picture, threshold=threshold)
        assert mask.dtype == jnp.uint8
        np.testing.assert_array_equal(mask, proba > threshold)


@pytest.mark.parametrize("value", [255.0, -0.5, np.nan])
def test_a_float_image_out_of_0_to_1_is_refused(variables, value):
    image = np.zeros((8, 8, 3), np.float32)
    image[0, 0, 0] = value
    with pytest.raises(ValueError, match="image has values from .*: give uint8, or float in"):
        predict.predict_proba(MODEL, variables, image)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 8, 8, 3)])
def test_no_rank_is_guessed(variables, shape):
    with pytest.raises(ValueError, match=r"\[H, W, 3\] or \[B, H, W, 3\]"):
        predict.predict_proba(MODEL, variables, np.zeros(shape, np.uint8))


def test_a_picture_comes_back_at_its_own_size(variables):
    small = image(16, 16, 3)
    picture = Image.fromarray(small.repeat(3, 0).repeat(2, 1))  # 48 high, 32 wide
    proba = predict.predict_picture(MODEL, variables, picture, 16)
    assert proba.shape == (48, 32, 1)
    same = predict.predict_picture(MODEL, variables, Image.fromarray(small), 16)
    np.testing.assert_allclose(same, predict.predict_proba(MODEL, variables, small), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_is_exact_for_any_batch_size(variables, batch_size):
    rng = np.random.default_rng(1)
    masks = rng.integers(0, 2, (7, 8, 8, 1), np.uint8)
    arrays = data.Arrays(image(7, 8, 8, 3), masks, [str(i) for i in range(7)], "")
    logits = np.asarray(jax.jit(MODEL.apply)(variables, arrays.image / np.float32(255)))
    figures, counts = predict.evaluate(MODEL, variables, arrays, batch_size=batch_size)
    true_positives = [((x > 0) & (m > 0)).sum() for x, m in zip(logits, masks, strict=True)]
    np.testing.assert_array_equal(counts.tp[:, 0], true_positives)
    dice = [
        2 * t / ((x > 0).sum() + m.sum())
        for t, x, m in zip(true_positives, logits, masks, strict=True)
    ]
    assert figures["dice_per_image"] == pytest.approx(np.mean(dice))
    assert figures["loss"] == pytest.approx(reference.bce(logits, masks).mean(), rel=1e-5)
    assert figures["n_images"] == 7
    coefs = [
        reference.iou_coef(reference.sigmoid(logits[i : i + batch_size]), masks[i : i + batch_size])
        for i in range(0, 7, batch_size)
    ]
    assert figures["iou_coef"] == pytest.approx(np.mean(coefs), rel=1e-5)


def test_a_source_is_evaluated_as_its_arrays(variables):
    def png(array):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "png")
        return stream.getvalue()

    mask = np.eye(20, dtype=np.uint8)
    source = [
        {"name": str(i), "image": png(image(20, 20, 3, seed=i)), "mask": png(mask)}
        for i in range(3)
    ]
    figures, counts = predict.evaluate(MODEL, variables, source, size=16)
    same, _ = predict.evaluate(MODEL, variables, data.load(source, 16))
    assert figures == same
    assert metrics.pooled(counts).tn[0] + metrics.pooled(counts).fp[0] > 0


def test_a_mirrored_model_is_the_mean_of_four_predictions(variables):
    picture, mirrored = image(2, 8, 12, 3), predict.Mirrored(MODEL)
    apply = jax.jit(MODEL.apply)
    total = np.zeros((2, 8, 12, 1))
    for down in (1, -1):
        for right in (1, -1):
            logits = np.asarray(apply(variables, picture[:, ::down, ::right] / np.float32(255)))
            total += logits[:, ::down, ::right]
    proba = predict.predict_proba(mirrored, variables, picture)
    np.testing.assert_allclose(proba, reference.sigmoid(total / 4), rtol=1e-5, atol=1e-6)
    arrays = data.Arrays(picture, np.ones((2, 8, 12, 1), np.uint8), ["a", "b"], "")
    _, counts = predict.evaluate(mirrored, variables, arrays)
    np.testing.assert_array_equal(counts.tp[:, 0], (total > 0).sum((1, 2, 3)))
