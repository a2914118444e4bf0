import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image

from flax_unet import predict
from flax_unet.images import RGB, ImageFormat
from flax_unet.model import UNet

MODEL = UNet(features=(4, 8, 8), norm=2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))


def image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_an_image_of_any_size_is_edge_padded_and_cropped(variables):
    odd = image(9, 14, 3)
    padded = np.zeros((12, 16, 3), np.float32)
    for i in range(12):
        for j in range(16):
            padded[i, j] = odd[min(i, 8), min(j, 13)] / np.float32(255)
    logits = jax.jit(MODEL.apply)(variables, padded[None])
    proba = predict.predict_proba(MODEL, variables, odd)
    assert proba.shape == (9, 14, 1) and proba.dtype == jnp.float32
    np.testing.assert_allclose(proba, reference.sigmoid(logits)[0, :9, :14], rtol=1e-5, atol=1e-6)


def test_a_batch_gives_the_result_of_its_images_and_float_that_of_uint8(variables):
    batch = image(3, 8, 12, 3)
    together = predict.predict_proba(MODEL, variables, batch)
    assert together.shape == (3, 8, 12, 1)
    alone = predict.predict_proba(MODEL, variables, batch[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-5, atol=1e-6)
    as_float = predict.predict_proba(MODEL, variables, batch / np.float32(255))
    np.testing.assert_allclose(together, as_float, rtol=1e-5)


@pytest.mark.parametrize("value", [255.0, -0.5, np.nan])
def test_a_float_image_outside_0_to_1_is_refused(variables, value):
    image = np.zeros((8, 8, 3), np.float32)
    image[0, 0, 0] = value
    with pytest.raises(ValueError, match="image has values from .*: use uint8, or float in"):
        predict.predict_proba(MODEL, variables, image)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 8, 8, 3)])
def test_an_image_of_another_rank_is_refused(variables, shape):
    with pytest.raises(ValueError, match=r"\[H, W, C\] or \[B, H, W, C\]"):
        predict.predict_proba(MODEL, variables, np.zeros(shape, np.uint8))


def test_a_picture_is_predicted_at_its_own_size(variables):
    small = image(16, 16, 3)
    picture = Image.fromarray(small.repeat(3, 0).repeat(2, 1))  # 48 high, 32 wide
    proba = predict.predict_picture(MODEL, variables, picture, 16)
    assert proba.shape == (48, 32, 1)
    same = predict.predict_picture(MODEL, variables, Image.fromarray(small), 16)
    np.testing.assert_allclose(same, predict.predict_proba(MODEL, variables, small), rtol=1e-6)


@pytest.mark.parametrize("upright", [False, True])
def test_a_mirrored_model_averages_the_logits_of_mirror_images(variables, upright):
    batch, mirrored = image(2, 8, 12, 3), predict.Mirrored(MODEL, upright)
    apply = jax.jit(MODEL.apply)
    total = np.zeros((2, 8, 12, 1))
    downs = (1,) if upright else (1, -1)
    for down in downs:
        for right in (1, -1):
            logits = np.asarray(apply(variables, batch[:, ::down, ::right] / np.float32(255)))
            total += logits[:, ::down, ::right]
    proba = predict.predict_proba(mirrored, variables, batch)
    np.testing.assert_allclose(
        proba, reference.sigmoid(total / 2 / len(downs)), rtol=1e-5, atol=1e-6
    )
    assert mirrored.stride == MODEL.stride and hash(mirrored) == hash(
        predict.Mirrored(MODEL, upright)
    )


def test_a_model_is_compiled_once_per_shape(variables):
    shapes = []

    class Counted:
        stride = 4

        def apply(self, variables, image):
            shapes.append(image.shape)
            return MODEL.apply(variables, image)

    model = Counted()
    for size in ((8, 8), (8, 8), (7, 6), (12, 8)):  # 7x6 is padded to 8x8
        predict.predict_proba(model, variables, image(*size, 3))
    assert shapes == [(1, 8, 8, 3), (1, 12, 8, 3)]


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_the_models_channels_are_segmented_and_others_refused(channels):
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 16, 16, channels)))
    values = np.random.default_rng(0).integers(0, 256, (20, 24, channels), np.uint8)
    picture = Image.fromarray(values.squeeze())
    image_format = ImageFormat(channels=channels)
    proba = predict.predict_picture(MODEL, variables, picture, (16, 32), image_format)
    assert proba.shape == (20, 24, 1)
    small = np.stack(
        [
            np.asarray(Image.fromarray(values[..., c]).resize((32, 16), Image.Resampling.BILINEAR))
            for c in range(channels)
        ],
        -1,
    )
    expected = np.asarray(predict.predict_proba(MODEL, variables, small))[..., 0]
    expected = Image.fromarray(expected).resize((24, 20), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(proba[..., 0], np.asarray(expected), atol=1e-6)
    found = predict.predict_picture(MODEL, variables, picture, (16, 32))  # as the model takes them
    np.testing.assert_array_equal(found, proba)
    with pytest.raises(ValueError, match="the image has 3 channels, and the model takes another"):
        predict.predict_picture(MODEL, variables, picture, 16, RGB)
    five = MODEL.init(jax.random.key(0), jnp.zeros((1, 16, 16, 5)))
    with pytest.raises(ValueError, match="neither 3, 1 nor 4 channels: give image_format"):
        predict.predict_picture(MODEL, five, picture, 16)


def test_predictions_are_made_inside_of_other_transformations(variables):
    predict_image = lambda image: predict.predict_proba(MODEL, variables, image)  # noqa: E731
    square = image(7, 6, 3, seed=1) / np.float32(255)
    expected = predict_image(square)
    np.testing.assert_allclose(jax.jit(predict_image)(square), expected, rtol=1e-6)
    both = jax.vmap(predict_image)(np.stack([square, square]))
    np.testing.assert_allclose(both, np.stack([expected] * 2), rtol=1e-5)
    ahead = jax.jvp(predict_image, (square,), (np.ones_like(square),))[1].sum()
    np.testing.assert_allclose(
        ahead, jax.grad(lambda x: predict_image(x).sum())(square).sum(), rtol=1e-3
    )
