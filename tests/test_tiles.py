import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_unet import predict, tiles
from flax_unet.model import UNet
from flax_unet.predict import Mirrored, Tiled, predict_proba

MODEL = UNet(features=(4, 8), convs=1, norm=None)  # each logit depends on pixels up to 6 away
REACH = 6
apply = jax.jit(MODEL.apply)


def variables_of(model, channels=3):
    shape = (1, model.stride, model.stride, channels)
    return jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros(shape))


@pytest.fixture(scope="module")
def variables():
    return variables_of(MODEL)


def image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("window", [8, 32])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_windows_cover_an_axis_with_the_overlap_that_is_asked_for(window, overlap, stride):
    step = max(1, int(window * (1 - overlap)) // stride) * stride
    for size in range(1, 150):
        starts = tiles.starts(size, window, step, stride)
        assert starts[0] == 0 and starts[-1] + window >= size
        assert starts[-1] == 0 or starts[-1] + window < size + stride
        assert all(start % stride == 0 for start in starts)
        assert all(0 < b - a <= step for a, b in zip(starts, starts[1:], strict=False))
        assert len(starts) <= 1 + max(0, math.ceil((size - window + stride - 1) / step))


@pytest.mark.parametrize("overlap", ["0", "0.1", "0.3", "0.5", "0.7", "0.75", "0.8", "0.9"])
def test_windows_start_as_far_apart_as_the_overlap_and_the_stride_allow(overlap):
    for side in range(2, 400, 2):
        most = side * (1 - Fraction(overlap))
        if most < MODEL.stride:
            with pytest.raises(ValueError, match=f"cannot overlap by {overlap}, .* multiples of 2"):
                Tiled(MODEL, side, float(overlap))
        else:
            step = most // MODEL.stride * MODEL.stride
            assert Tiled(MODEL, (side, 400), float(overlap)).steps[0] == step


def test_windows_are_where_nnu_net_puts_them():
    assert tiles.starts(120, 64, 32) == [0, 28, 56]  # round(56 / 2)
    assert tiles.starts(512, 256, 128) == [0, 128, 256]


@pytest.mark.parametrize("blend", ["gaussian", "linear"])
def test_the_weights_of_a_pixel_add_up_to_1_and_have_the_profile(blend):
    size, window, starts = 45, 16, [0, 8, 16, 32]
    weights = tiles.weights(size, window, starts, blend)

    def profile(i):
        distance = abs(i - (window - 1) / 2)
        sigma = window / 8
        return math.exp(-(distance**2) / (2 * sigma**2)) if blend == "gaussian" else 8 - distance

    for pixel in range(size):
        inside = [(k, pixel - s) for k, s in enumerate(starts) if 0 <= pixel - s < window]
        total = sum(profile(i) for _, i in inside)
        for k, i in inside:
            assert weights[k, i] == pytest.approx(profile(i) / total, rel=1e-5)
    assert (weights[3, size - 32 :] == 0).all()


def one_shot(variables, picture):
    """Logits of the whole picture, edge-padded."""
    pad = [(0, -n % MODEL.stride) for n in picture.shape[:2]]
    padded = np.pad(picture, (*pad, (0, 0)), mode="edge") / np.float32(255)
    return apply(variables, padded[None])[0, : len(picture), : picture.shape[1]]


def by_loops(variables, picture, tiled):
    """Logits blended with one weight map for each window, divided by their sum."""
    size, (h, w) = picture.shape[:2], tiled.size
    total = np.zeros((*size, 1))
    weight = np.zeros((*size, 1))
    axis = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in (h, w)]
    step = [int(n * (1 - tiled.overlap)) // 2 * 2 for n in (h, w)]
    for top in tiles.starts(size[0], h, step[0], 2):
        for left in tiles.starts(size[1], w, step[1], 2):
            rows, columns = np.arange(top, top + h), np.arange(left, left + w)
            part = picture[rows.clip(max=size[0] - 1)][:, columns.clip(max=size[1] - 1)]
            logits = np.asarray(apply(variables, part[None] / np.float32(255))[0])
            for i in range(h):
                for j in range(w):
                    if top + i < size[0] and left + j < size[1]:
                        total[top + i, left + j] += axis[0][i] * axis[1][j] * logits[i, j]
                        weight[top + i, left + j] += axis[0][i] * axis[1][j]
    return total / weight


@pytest.mark.parametrize("shape", [(40, 61), (16, 24), (9, 50)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_are_blended_as_by_loops(variables, shape, batch_size):
    picture = image(*shape, 3)
    tiled = Tiled(MODEL, (16, 24), overlap=0.4, batch_size=batch_size)
    expected = by_loops(variables, picture, tiled)
    np.testing.assert_allclose(tiled.apply(variables, picture[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("blend", ["gaussian", "linear"])
def test_far_from_the_borders_of_windows_the_logits_are_those_of_one_piece(variables, blend):
    picture, tiled = image(70, 93, 3), Tiled(MODEL, 32, overlap=0.25, blend=blend)
    far = np.ones(picture.shape[:2], bool)
    for axis, size in enumerate(picture.shape[:2]):
        for start in tiles.starts(size, 32, 24, 2):
            for border in {start, start + 32} - {0}:
                if border < size:
                    index = [slice(None)] * 2
                    index[axis] = slice(max(0, border - REACH), border + REACH)
                    far[tuple(index)] = False
    assert 0.1 < far.mean() < 0.9
    logits, expected = tiled.apply(variables, picture[None])[0], one_shot(variables, picture)
    np.testing.assert_allclose(logits[far], expected[far], atol=1e-5)
    assert abs(logits - expected).max() > 1e-4  # but not everywhere


def test_one_window_for_the_whole_picture_is_the_prediction_in_one_piece(variables):
    picture = image(30, 44, 3)
    proba = predict_proba(Tiled(MODEL, (30, 44)), variables, picture)
    np.testing.assert_allclose(proba, predict_proba(MODEL, variables, picture), atol=1e-6)


def test_a_picture_smaller_than_the_window_is_edge_padded(variables):
    picture = image(11, 13, 3)
    padded = picture[np.arange(32).clip(max=10)][:, np.arange(32).clip(max=12)]
    expected = predict_proba(MODEL, variables, padded)[:11, :13]
    proba = predict_proba(Tiled(MODEL, 32), variables, picture)
    assert proba.shape == (11, 13, 1)
    np.testing.assert_allclose(proba, expected, atol=1e-6)


@pytest.mark.parametrize("overlapping", [False, True])
def test_probabilities_of_several_classes_and_of_a_batch(monkeypatch, overlapping):
    monkeypatch.setattr(predict, "CHUNK", 1000)  # more than one
    model = MODEL.clone(num_classes=3, overlapping=overlapping)
    variables, batch = variables_of(model), image(2, 40, 50, 3)
    tiled = Tiled(model, 16, batch_size=5)
    proba, logits = predict_proba(tiled, variables, batch), tiled.apply(variables, batch)
    exact = np.exp(logits.astype(np.float64))
    expected = exact / (1 + exact) if overlapping else exact / exact.sum(-1, keepdims=True)
    np.testing.assert_allclose(proba, expected, atol=1e-6)
    alone = [predict_proba(tiled, variables, each) for each in batch]
    np.testing.assert_allclose(proba, alone, atol=1e-6)


def test_flips_of_the_windows_and_of_the_image_both_work(variables):
    picture = image(32, 48, 3)  # whose windows lie in the same places when it is flipped
    inside = predict_proba(Tiled(Mirrored(MODEL), 16), variables, picture)
    outside = predict_proba(Mirrored(Tiled(MODEL, 16)), variables, picture)
    np.testing.assert_allclose(inside, outside, atol=1e-6)
    flipped = predict_proba(Tiled(Mirrored(MODEL), 16), variables, picture[::-1])
    np.testing.assert_allclose(inside[::-1], flipped, atol=1e-6)


def test_one_shape_is_compiled_for_all_pictures(variables):
    model = MODEL.clone(features=(4, 4))
    variables = variables_of(model)
    for shape in ((40, 61), (8, 8), (90, 33)):
        predict_proba(Tiled(model, 32), variables, image(*shape, 3))
    assert predict.logits_function(model)._cache_size() == 1


def test_float_and_uint8_images_and_pictures_are_the_same(variables):
    picture, tiled = image(40, 30, 3), Tiled(MODEL, 16)
    expected = predict_proba(tiled, variables, picture)
    as_float = predict_proba(tiled, variables, picture / np.float32(255))
    np.testing.assert_allclose(as_float, expected, atol=1e-6)
    proba = predict.predict_picture(tiled, variables, Image.fromarray(picture), None)
    np.testing.assert_array_equal(proba, expected)


def test_a_window_or_overlap_that_does_not_fit_is_refused(variables):
    with pytest.raises(ValueError, match=r"window \(15, 15\) is not a multiple of 2"):
        Tiled(MODEL, 15)
    with pytest.raises(ValueError, match="overlap is 1"):
        Tiled(MODEL, 16, overlap=1)
    with pytest.raises(ValueError, match="blend is 'gauss'"):
        Tiled(MODEL, 16, blend="gauss")
    with pytest.raises(ValueError, match="batch_size is 0"):
        Tiled(MODEL, 16, batch_size=0)
    for window in (32.0, (32,)):
        with pytest.raises(ValueError, match="give one or two whole numbers"):
            Tiled(MODEL, window)
    with pytest.raises(ValueError, match="it is empty"):
        predict_proba(Tiled(MODEL, [16, 16]), variables, np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(lambda x: predict_proba(Tiled(MODEL, 16), variables, x))(jnp.zeros((20, 20, 3)))


@pytest.mark.parametrize("shape", [(64, 80), (48, 32)])
def test_the_result_is_that_of_monai(variables, shape):
    inferers, torch = pytest.importorskip("monai.inferers"), pytest.importorskip("torch")
    tiled = Tiled(MODEL, (32, 16), batch_size=2)
    picture = image(1, *shape, 3)
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in (32, 16)]
    # MONAI raises weights below 0.001.
    weight = torch.tensor(np.outer(*axes) * 1e8, dtype=torch.float64)

    def predictor(windows):
        image = windows.movedim(1, -1).numpy().astype(np.float32)
        logits = np.asarray(apply(variables, image))
        return torch.tensor(logits.astype(np.float64)).movedim(-1, 1)

    expected = inferers.sliding_window_inference(
        torch.tensor(picture / 255).movedim(-1, 1),
        roi_size=(32, 16),
        sw_batch_size=2,
        predictor=predictor,
        overlap=0.5,
        roi_weight_map=weight,
    )
    logits = tiled.apply(variables, picture)
    np.testing.assert_allclose(logits, expected.movedim(1, -1).numpy(), atol=1e-5)
