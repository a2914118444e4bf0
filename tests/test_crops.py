"""Crops: where they are, what is cut, and that a training on them resumes exactly."""

import math
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from drawn import encode

from flax_unet import augment, crops, data, fit, images, losses, train
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat

SIZES = (20, 33), (9, 50), (16, 8)  # the last ones are lower or narrower than a crop
CLASSES = MaskFormat(values=((0, 0), (1, 1), (2, 2)), names=("a", "b", "c"))
READ = {"mask_format": CLASSES, "image_format": images.ImageFormat()}


@pytest.fixture(scope="module")
def source():
    """Pictures of three sizes with two classes; the second class is one pixel in the first."""
    rng, examples = np.random.default_rng(0), []
    for i, size in enumerate(SIZES):
        image = rng.integers(1, 256, (*size, 3), np.uint8)
        mask = (rng.random(size) < 0.1).astype(np.uint8)
        if i == 0:
            mask[18, 28] = 2
        examples.append({"name": str(i), "image": encode(image), "mask": encode(mask)})
    return examples


class Pixel(nn.Module):
    """A network of each pixel alone, which compiles in a moment."""

    @nn.compact
    def __call__(self, image):
        return nn.Dense(1)(nn.relu(nn.Dense(8)(image)))


def decoded(source):
    return [data.decode_pair(example, **READ) for example in source]


def crops_of(source, size=(12, 10), frame=None, seed=3):
    return crops.crops_of(crops.areas(source), size, frame or size, seed)


def frame_by_loops(array, top, left, frame, outside):
    height, width, channels = array.shape
    result = np.full((*frame, channels), outside, array.dtype)
    for i in range(frame[0]):
        for j in range(frame[1]):
            if 0 <= top + i < height and 0 <= left + j < width:
                result[i, j] = array[top + i, left + j]
    return result


def test_an_epoch_has_as_many_crops_as_cover_the_area(source):
    cut = crops_of(source)
    assert np.bincount(cut.picture).tolist() == [6, 4, 2]  # 660, 450 and 128 pixels by 120
    assert len(cut) == 12


@pytest.mark.parametrize("frame", [(12, 10), (20, 24)])
def test_frames_are_cut_where_the_places_say(source, frame):
    cut, pairs = crops_of(source, frame=frame), decoded(source)
    resident = crops.load(source, **READ, padding=frame[1])
    assert resident.arrays.name == ["0", "1", "2"] and resident.shape == list(SIZES)
    order = np.arange(len(cut))[::-1]
    batches = list(crops.batches(resident, cut, 5, order, epoch=2))
    assert [batch["weight"].tolist() for batch in batches] == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]
    cut_images, cut_masks = (
        np.concatenate([batch[key] for batch in batches])[: len(cut)] for key in ("image", "mask")
    )
    for row, i in enumerate(order):
        image, mask = pairs[cut.picture[i]]
        places = crops.places_of(mask)
        top, left = crops.place(cut, i, 2, image.shape[:2], places)
        corner = top - (frame[0] - 12) // 2, left - (frame[1] - 10) // 2
        expected = (frame_by_loops(x, *corner, frame, v) for x, v in ((image, 0), (mask, IGNORE)))
        for got, wanted in zip((cut_images[row], cut_masks[row]), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_a_stream_yields_the_same_batches(source):
    frame = 18, 24
    cut, resident = crops_of(source, frame=frame), crops.load(source, **READ, padding=frame[1])
    order = data.shuffled(len(cut), 1, 0)
    streamed = crops.stream(source, cut, 4, order, epoch=1, **READ)
    both = list(zip(crops.batches(resident, cut, 4, order, epoch=1), streamed, strict=True))
    assert len(both) == 3
    for a, b in both:
        for key in ("image", "mask", "weight"):
            np.testing.assert_array_equal(a[key], b[key])


def test_places_depend_on_seed_epoch_and_crop_alone(source):
    shape, places = (200, 300), [np.array([0, 59_999])]
    cut = crops.Crops((12, 10), (12, 10), 3, np.zeros(50, int))

    def all_places(cut, epoch):
        return [crops.place(cut, i, epoch, shape, places) for i in range(50)]

    first = all_places(cut, 0)
    assert first == all_places(cut, 0) and len(set(first)) > 25
    assert first != all_places(cut, 1)
    assert first != all_places(crops.Crops((12, 10), (12, 10), 4, cut.picture), 0)


def test_a_third_of_the_crops_are_centred_at_a_pixel_of_a_class_in_equal_parts():
    shape, n = (400, 600), 6000
    rare, common = np.array([200 * 600 + 300]), np.array([100 * 600 + 70, 350 * 600 + 500])
    cut = crops.Crops((20, 31), (20, 31), 0, np.zeros(n, int))
    found = [crops.place(cut, i, 0, shape, [rare, common]) for i in range(n)]
    at = {(row - 10, column - 15) for row, column in [(100, 70), (350, 500)]}
    shares = [found.count((190, 285)) / n, sum(x in at for x in found) / n]
    np.testing.assert_allclose(shares, 1 / 6, atol=0.02)
    elsewhere = np.array([x for x in found if x not in at | {(190, 285)}])
    assert elsewhere.min(0).tolist() == [0, 0]
    assert elsewhere.max(0).tolist() == [380, 569]
    np.testing.assert_allclose(elsewhere.mean(0), [190, 284.5], rtol=0.05)


def test_a_crop_stays_inside_unless_the_picture_is_smaller():
    corner = [np.array([0])]  # which a crop cannot have at its centre
    for i in range(30):
        cut = crops.Crops((12, 10), (12, 10), 0, np.zeros(30, int))
        top, left = crops.place(cut, i, 0, (40, 7), corner)
        assert 0 <= top <= 28
        assert left == -2  # centred: (7 - 10) // 2


def test_places_of_a_class_are_its_pixels_and_at_most_10000(monkeypatch):
    mask = np.array([[0, 1, 2], [IGNORE, 2, 1]], np.uint8)[..., None]
    assert [x.tolist() for x in crops.places_of(mask)] == [[1, 5], [2, 4]]
    overlapping = np.stack([mask[..., 0] == 1, mask[..., 0] > 0], -1).astype(np.uint8)
    assert [x.tolist() for x in crops.places_of(overlapping)] == [[1, 5], [1, 2, 3, 4, 5]]
    monkeypatch.setattr(crops, "PLACES", 10)
    many = crops.places_of(np.ones((5, 7, 1), np.uint8))[0]
    assert len(many) <= 10 and many[0] == 0 and many[-1] > 25


def test_a_frame_holds_every_turned_and_shrunk_crop():
    size, settings = (32, 48), {"rotation": 180.0, "scale": 1.5, "shear": 0.0, "shift": 0.0}
    frame = crops.frame_of(size, settings)
    assert all((f - s) % 2 == 0 for f, s in zip(frame, size, strict=True))
    assert crops.frame_of(size, None) == size
    tilted = crops.frame_of(size, settings | {"rotation": 10.0, "scale": 1.0})
    expected = [32 * math.cos(0.1745) + 48 * math.sin(0.1745), 0]
    assert tilted[0] - 2 <= expected[0] <= tilted[0]
    image, mask = np.full((8, *frame, 1), 255, np.uint8), np.ones((8, *frame, 1), np.uint8)
    warp = jax.jit(
        partial(augment.random_affine, size=size, outside=IGNORE, elastic=0.0, **settings)
    )
    for seed in range(20):
        warped, labels = warp(jax.random.key(seed), image, mask)
        assert warped.shape == (8, *size, 1)
        assert (np.asarray(labels) == 1).all()  # nothing from outside


def test_the_crop_of_a_frame_is_its_centre():
    """Without changes, `random_affine` to a smaller size cuts the middle, or a mirror image."""
    frame = np.random.default_rng(0).integers(0, 256, (4, 20, 26, 2), np.uint8)
    mask = (frame[..., :1] > 99).astype(np.uint8)
    still = {"rotation": 0.0, "scale": 1.0, "shear": 0.0, "shift": 0.0}
    warp = jax.jit(partial(augment.random_affine, size=(12, 10), **still))
    image, labels = warp(jax.random.key(0), frame, mask)
    for k in range(4):
        middle = frame[k, 4:16, 8:18] / np.float32(255)
        mirrored = [middle, middle[::-1], middle[:, ::-1], middle[::-1, ::-1]]
        assert any(np.allclose(image[k], each, atol=1e-6) for each in mirrored)
        np.testing.assert_array_equal(labels[k], np.rint(image[k, ..., :1] * 255) > 99)


def test_tiles_of_whole_pictures_count_each_pixel_once(source):
    arrays = crops.whole(source, (12, 10), **READ)
    assert arrays.image.shape[1:] == (12, 10, 3) and len(arrays.image) == 8 + 5 + 2
    for i, (image, mask) in enumerate(decoded(source)):
        seen = np.zeros(mask.shape, int)
        for name, tile, labels in zip(arrays.name, arrays.image, arrays.mask, strict=True):
            number, _, top, left = name.replace(",", "").split()
            if number == str(i):
                top, left = int(top), int(left)
                expected = frame_by_loops(image, top, left, (12, 10), 0)
                np.testing.assert_array_equal(tile, expected)
                for row, column, _ in np.argwhere(labels != IGNORE):
                    assert labels[row, column] == mask[top + row, left + column]
                    seen[top + row, left + column] += 1
        assert (seen == 1).all()


def test_a_training_on_crops_resumes_exactly_and_learns(source):
    """The foreground is bright, the background is not: a network can tell them apart."""
    rng, examples = np.random.default_rng(0), []
    for i, size in enumerate(SIZES):
        mask = np.zeros(size, np.uint8)
        mask[2:7, 1:7] = 1
        image = mask[..., None] * np.uint8(120) + rng.integers(0, 99, (*size, 3), np.uint8)
        examples.append({"name": str(i), "image": encode(image), "mask": encode(mask)})
    read = {"mask_format": MaskFormat(values=((0, 0), (1, 1))), "image_format": images.RGB}
    size, affine = (8, 8), {"rotation": 90.0, "scale": 1.2, "shear": 0.0, "shift": 0.0}
    frame = crops.frame_of(size, affine)
    cut = crops.crops_of(crops.areas(examples), size, frame, 5)
    resident = crops.load(examples, **read, padding=frame[1])
    model, tx = Pixel(), optax.adam(0.1)
    options = {
        "batches": partial(crops.batches, resident, cut, 4),
        "key": jax.random.key(1),
        "seed": 5,
        "batch_size": 4,
        "augment": partial(augment.random_affine, size=size, outside=IGNORE, **affine),
        "check_values": False,
    }

    def state():
        return train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))

    run = partial(fit.fit, model, tx, losses.bce)
    whole = [
        (epoch.metrics, jax.tree.map(np.array, epoch.state.params))
        for epoch in run(state(), len(cut), epochs=12, **options)
    ]
    assert whole[-1][0]["dice_pooled"] > whole[0][0]["dice_pooled"] + 0.3
    steps = []
    stopped = list(
        run(
            state(),
            len(cut),
            epochs=12,
            stop=lambda: len(steps) == 2,
            on_step=lambda *step: steps.append(step),
            **options,
        )
    )[-1]
    assert stopped.metrics is None
    rest = list(run(stopped.state, len(cut), epochs=12, records=stopped.records, **options))
    for a, b in zip(
        jax.tree.leaves(rest[-1].state.params), jax.tree.leaves(whole[-1][1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_more_pixels_than_an_index_can_have_are_refused(source):
    with pytest.raises(data.DataError, match="too many for a device"):
        crops.load(source, **READ, padding=2**30)
