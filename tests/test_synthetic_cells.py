"""Synthetic cells are reproducible, well formed, and reach training through TFDS alone."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import ndimage

import tfds_kvasir
from flax_unet import data, images
from flax_unet.formats import find
from flax_unet_cli import train
from tfds_kvasir.synthetic_cells.draw import CLASSES, IGNORE, draw
from tfds_kvasir.synthetic_cells.synthetic_cells_dataset_builder import SIZES, examples


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def sources(data_dir):
    return tfds_kvasir.sources("synthetic_cells", data_dir=data_dir)


@pytest.fixture(scope="module")
def pairs(sources):
    return [
        [np.asarray(Image.open(io.BytesIO(entry[key]))) for key in ("image", "mask")]
        for source in sources.values()
        for entry in source
    ]


def test_the_splits_have_their_sizes_names_and_classes(sources):
    assert {name: len(source) for name, source in sources.items()} == SIZES
    for name, source in sources.items():
        assert (source.classes, source.ignore) == (CLASSES, (IGNORE,))
        assert [entry["name"] for entry in source] == [f"{name}_{i:03}" for i in range(SIZES[name])]


def test_a_seed_gives_the_same_pictures_and_another_one_others(sources):
    again = list(examples("validation", seed=0))
    assert [e["image"] for e in again] == [e["image"] for e in sources["validation"]]
    assert [e["mask"] for e in again] == [e["mask"] for e in sources["validation"]]
    others = {e["image"] for e in examples("validation", seed=1)}
    assert not others & {e["image"] for e in again}
    state = np.random.default_rng(3)
    image, mask = draw(state)
    np.random.seed(1)  # NumPy's global state has no effect
    np.testing.assert_array_equal(draw(np.random.default_rng(3))[0], image)


def test_pictures_have_12_bits_in_16_and_masks_three_classes_and_a_rim(pairs):
    for image, mask in pairs:
        assert image.shape == mask.shape == (120, 160) and image.dtype == np.uint16
        assert 100 < image.min() and image.max() <= 4095
        assert {*np.unique(mask)} <= {0, 1, 2, IGNORE}
    found = {int(value) for _, mask in pairs for value in np.unique(mask)}
    assert found == {0, 1, 2, IGNORE}


def test_the_rim_separates_touching_cells_and_cells_from_the_background(pairs):
    touching = 0
    for _, mask in pairs:
        counted = mask != IGNORE
        # No two pixels of different classes are neighbours.
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert not ((a != b) & (a != IGNORE) & (b != IGNORE)).any()
        cells, n = ndimage.label(counted & (mask > 0))
        blobs, m = ndimage.label(mask > 0)
        touching += n > m
        assert n >= m >= 1
    assert touching > 0.9 * len(pairs)


def test_there_are_spots_of_a_few_pixels_and_large_cells_of_both_kinds(pairs):
    sizes = {1: [], 2: []}
    for _, mask in pairs:
        for kind, found in sizes.items():
            regions, _ = ndimage.label(mask == kind)
            found += np.bincount(regions.ravel())[1:].tolist()
    spots = [np.mean(np.array(found) < 20) for found in sizes.values()]
    assert spots[0] > 0.15 and max(sizes[1]) > 200 and max(sizes[2]) > 100


def test_kinds_of_cells_differ_in_shape_and_not_in_brightness(pairs):
    brightness = {kind: [image[mask == kind].mean() for image, mask in pairs] for kind in (1, 2)}
    # In how many pictures is a kind the brighter one? In neither nearly all.
    share = np.mean(np.array(brightness[1]) > np.array(brightness[2]))
    assert 0.25 < share < 0.75


def test_the_range_is_found_and_the_levels_are_kept(sources):
    found = images.find(sources["train"])
    assert (found.channels, found.kind) == (1, "integers") and found.high == (4095.0,)
    arrays = data.load(
        sources["validation"], (96, 128), find(names=CLASSES, ignore=(IGNORE,)), found
    )
    assert arrays.image.shape == (40, 96, 128, 1) and arrays.image.dtype == np.float32
    assert len(np.unique(arrays.image[0])) > 1000
    assert {*np.unique(arrays.mask)} == {0, 1, 2, IGNORE}


# Any data set of TFDS


def flags(workdir, data_dir, *more):
    settings = "--image-size 32 --features 4 8 --epochs 1".split()
    return ["--workdir", str(workdir), "--data-dir", str(data_dir), *settings, *more]


def test_a_named_data_set_of_tfds_is_the_same_as_our_own(tmp_path, data_dir, sources):
    records = []
    for name, more in (("synthetic_cells", []), ("tfds:synthetic_cells", ["--ignore", "255"])):
        workdir = tmp_path / name.replace(":", "-")
        assert train.main(flags(workdir, data_dir, "--dataset", name, *more)) == 0
        config = json.loads((workdir / "config.json").read_text())
        assert config["masks"]["names"] == list(CLASSES)
        line = json.loads((workdir / "metrics.jsonl").read_text())
        records.append({k: v for k, v in line.items() if "second" not in k} | config["data"])
    assert records[0] == records[1]


class Stains(tfds.core.GeneratorBasedBuilder):
    """Keys and splits with other names, and masks of 0 and 255 without class names."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        picture = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        mask = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        features = {"photo": picture, "segmentation": mask, "label": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(9)}

    def _generate_examples(self, n):
        for i in range(n):
            rng = np.random.default_rng((n, i))
            mask = np.zeros((32, 32), np.uint8)
            y, x = rng.integers(2, 20, 2)
            mask[y : y + 9, x : x + 9] = 255
            photo = rng.integers(0, 100, (32, 32, 3), np.uint8) + mask[..., None] // 2
            files = []
            for array in (photo, mask):
                file = io.BytesIO()
                Image.fromarray(array).save(file, format="PNG")
                files.append(file.getvalue())
            yield i, {"photo": files[0], "segmentation": files[1], "label": i}


def test_keys_and_slices_of_a_foreign_data_set_are_given_by_flags(tmp_path, capsys):
    def run(*more):
        code = train.main(flags(tmp_path / "run", tmp_path, "--dataset", "tfds:stains", *more))
        return code, capsys.readouterr()

    splits = ["--tfds-splits", "train[:75%]", "train[75%:]", "test"]
    code, (_, error) = run(*splits)
    assert code == 1 and "no image feature 'image': choose from photo, segmentation" in error
    code, (_, error) = run("--image-key", "photo", "--mask-key", "segmentation")
    assert code == 1 and "stains has no split 'validation' but train, test: name" in error
    code, (_, error) = run(*splits, "--image-key", "photo", "--mask-key", "label")
    assert code == 1 and "no image feature 'label'" in error
    code, (out, _) = run(*splits, "--image-key", "photo", "--mask-key", "segmentation")
    assert code == 0 and "foreground 255" in out and "test: 9 pictures" in out
    summary = json.loads((tmp_path / "run/config.json").read_text())["summary"]
    assert [summary[split]["pictures"] for split in ("train", "validation")] == [30, 10]


def test_a_data_set_that_tfds_does_not_know_is_refused(tmp_path, capsys):
    assert train.main(flags(tmp_path / "run", tmp_path, "--dataset", "tfds:no_such_thing")) == 1
    assert "TFDS has no data set 'no_such_thing'" in capsys.readouterr().err
    more = ["--dataset", "synthetic_cells", "--image-key", "photo"]
    assert train.main(flags(tmp_path / "run", tmp_path, *more)) == 1
    assert "--image-key needs --dataset tfds:NAME" in capsys.readouterr().err
