"""Synthetic polyps are reproducible, well formed, and cannot be found by colour alone."""

import io
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tfds_kvasir
from tfds_kvasir.examples import boxes, encode_mask
from tfds_kvasir.synthetic_polyps.draw import draw
from tfds_kvasir.synthetic_polyps.synthetic_polyps_dataset_builder import SIZES, examples


def decode(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    builder = tfds.builder("synthetic_polyps", data_dir=tmp_path_factory.mktemp("data"))
    builder.download_and_prepare(file_format="array_record")
    return builder


@pytest.fixture(scope="module")
def stored(builder) -> dict[str, list[dict]]:
    """{split: examples}, with the undecoded files of images and masks."""
    encoded = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
    return {split: list(builder.as_data_source(split, decoders=encoded)) for split in SIZES}


@pytest.fixture(scope="module")
def masks(stored) -> np.ndarray:
    return np.stack([decode(e["mask"]) for split in stored.values() for e in split])


def test_draw_depends_only_on_the_generator():
    image, mask = draw(np.random.default_rng(3), 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert mask.shape == (64, 64) and mask.dtype == bool
    np.random.seed(1)  # NumPy's global state has no effect
    again, mask_again = draw(np.random.default_rng(3), 64)
    np.testing.assert_array_equal(again, image)
    np.testing.assert_array_equal(mask_again, mask)


@pytest.mark.parametrize("size", [32, 95, 256])
def test_draw_at_several_sizes(size):
    image, mask = draw(np.random.default_rng(0), size)
    assert image.shape == (size, size, 3) and mask.shape == (size, size)
    assert mask.any() and not mask.all()


def test_draw_refuses_a_size_below_32():
    with pytest.raises(ValueError, match="at least 32, got 31"):
        draw(np.random.default_rng(0), 31)


def test_split_names_and_sizes(builder, stored):
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == SIZES
    assert {name: len(split) for name, split in stored.items()} == SIZES
    assert SIZES.keys() == {"train", "validation", "test"}


def test_same_seed_gives_the_same_files(stored):
    # The stored files were drawn by the builder; draw them again.
    for again, example in zip(examples("validation", seed=0), stored["validation"], strict=True):
        assert again["image"] == example["image"]
        assert again["mask"] == example["mask"]
        assert again["name"] == example["name"].decode()


def test_another_seed_gives_other_files(stored):
    for other, example in zip(examples("validation", seed=1), stored["validation"], strict=True):
        assert other["image"] != example["image"] and other["mask"] != example["mask"]


def test_no_duplicates(stored):
    for key in ("image", "mask", "name"):
        assert len({e[key] for split in stored.values() for e in split}) == sum(SIZES.values())


def test_images_are_rgb_jpeg_of_one_size(stored):
    for example in stored["train"]:
        image = Image.open(io.BytesIO(example["image"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))


def test_masks_are_png_of_0_and_1(stored):
    for example in stored["train"]:
        mask = Image.open(io.BytesIO(example["mask"]))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (128, 128))
        assert set(np.unique(mask)) == {0, 1}


def test_masks_have_one_to_three_components(masks):
    # There are at most as many components as polyps: polyps may overlap, and none is cut in two.
    counts = [ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks]
    assert set(counts) == {1, 2, 3}


def test_fraction_of_foreground(masks):
    fraction = masks.mean((1, 2))
    assert 0.01 < fraction.min() < 0.03 and 0.4 < fraction.max() < 0.7
    assert 0.10 < fraction.mean() < 0.20
    assert np.quantile(fraction, 0.9) / np.quantile(fraction, 0.1) > 5


def test_boxes_enclose_the_components(stored):
    for example in stored["test"]:
        mask = decode(example["mask"]).astype(bool)
        expected = np.array(sorted(flooded_boxes(mask)), np.float32)
        np.testing.assert_array_equal(sorted(map(tuple, example["bboxes"])), expected)


def flooded_boxes(mask):
    """Bounding boxes by flood fill: grow each component from a seed pixel until it is complete."""
    remaining = mask.copy()
    height, width = mask.shape
    while remaining.any():
        component = np.zeros_like(mask)
        component.flat[remaining.argmax()] = True
        size = 0
        while component.sum() > size:
            size = component.sum()
            padded = np.pad(component, 1)
            for dy in range(3):
                for dx in range(3):
                    component |= padded[dy : dy + height, dx : dx + width] & mask
        y, x = component.nonzero()
        yield y.min() / height, x.min() / width, (y.max() + 1) / height, (x.max() + 1) / width
        remaining &= ~component


def test_boxes_by_hand():
    mask = np.zeros((4, 8), bool)
    mask[0, 1] = mask[1, 2] = True  # one component: they touch at a corner
    mask[3] = True
    assert boxes(mask) == [
        tfds.features.BBox(ymin=0, xmin=1 / 8, ymax=2 / 4, xmax=3 / 8),
        tfds.features.BBox(ymin=3 / 4, xmin=0, ymax=1, xmax=1),
    ]
    assert boxes(np.zeros((4, 8), bool)) == []


@pytest.mark.parametrize("mask", [np.zeros((4, 8), np.uint8), np.zeros((4, 8, 1), bool)])
def test_mask_must_be_bool_with_two_axes(mask):
    for function in (boxes, encode_mask):
        with pytest.raises(ValueError, match="must be bool"):
            function(mask)


def test_tfds_decodes_the_files(builder, stored):
    decoded = builder.as_data_source("test")[0]
    np.testing.assert_array_equal(decoded["mask"][..., 0], decode(stored["test"][0]["mask"]))
    assert decoded["image"].shape == (128, 128, 3) and decoded["image"].dtype == np.uint8
    assert "drawn by code" in builder.info.description


def test_colour_alone_is_not_enough(stored):
    """Logistic regression on RGB and blurred RGB stays below a Dice of 0.7."""

    def colours(examples):  # [N, H, W, 9]
        image = np.stack([decode(e["image"]) for e in examples]) / 255
        blurred = [ndimage.gaussian_filter(image, sigma, axes=(1, 2)) for sigma in (2, 8)]
        return np.concatenate([image, *blurred], axis=-1)

    def labels(examples):
        return np.stack([decode(e["mask"]) for e in examples]).astype(bool)

    def dice(mask, label):  # per image and pooled
        both, all_ = 2 * (mask & label).sum((1, 2)), mask.sum((1, 2)) + label.sum((1, 2))
        return (both / all_).mean(), both.sum() / all_.sum()

    train, label = colours(stored["train"][:160]), labels(stored["train"][:160])
    pixels = np.random.default_rng(0).choice(label.size, 50_000, replace=False)
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    classifier.fit(train.reshape(-1, 9)[pixels], label.ravel()[pixels])

    def logits(colour):
        return classifier.decision_function(colour.reshape(-1, 9)).reshape(colour.shape[:3])

    train_logits, test_logits = logits(train), logits(colours(stored["test"]))
    assert roc_auc_score(label.ravel()[::16], train_logits.ravel()[::16]) > 0.55  # above chance
    thresholds = np.linspace(-4, 1, 21)
    per_image, pooled = np.argmax([dice(train_logits > t, label) for t in thresholds], axis=0)
    assert dice(test_logits > thresholds[per_image], labels(stored["test"]))[0] < 0.7
    assert dice(test_logits > thresholds[pooled], labels(stored["test"]))[1] < 0.7


def test_a_damaged_data_set_and_a_full_disk_are_named(builder, tmp_path, monkeypatch):
    shutil.copytree(builder.data_path, tmp_path / "synthetic_polyps" / "1.0.0")
    (info,) = tmp_path.rglob("dataset_info.json")
    for content in ("", "{", '{"splits": 3}'):
        info.write_text(content)
        with pytest.raises(ValueError, match="synthetic_polyps is damaged: delete it, and it will"):
            tfds_kvasir.sources("synthetic_polyps", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "synthetic_polyps")

    def full(*args, **options):
        raise RuntimeError("write() failed: No space left on device")

    def lacking(*args, **options):
        raise AssertionError("Manual directory does not exist")

    for fails, words in ((full, ".*No space"), (lacking, "Manual directory")):
        with monkeypatch.context() as patch:
            patch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fails)
            with pytest.raises(OSError, match=f"synthetic_polyps cannot be prepared: {words}"):
                tfds_kvasir.sources("synthetic_polyps", data_dir=tmp_path)
    assert len(tfds_kvasir.sources("synthetic_polyps", data_dir=tmp_path)["train"]) > 0
