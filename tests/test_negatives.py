"""Parts without an object: which they are, and `evaluate --negatives`."""

import json
from itertools import product

import numpy as np
import pytest
from PIL import Image

from flax_unet import data, formats, metrics, negatives, predict, runs
from flax_unet.classes import IGNORE
from flax_unet.images import RGB, ImageFormat
from flax_unet.negatives import Negatives, largest_part, largest_rectangle
from flax_unet.pictures import DataError
from flax_unet_cli import evaluate as program
from flax_unet_cli import train
from tests.drawn import discs, encode

GREY = np.full((120, 150, 3), 120, np.uint8)


# The rectangle


def brute_force(free):
    """The area of the largest free rectangle with sides at most 1 to 2, of all there are."""
    height, width = free.shape
    best = 0
    for top, left in product(range(height), range(width)):
        for bottom, right in product(range(top + 1, height + 1), range(left + 1, width + 1)):
            tall, wide = bottom - top, right - left
            if max(tall, wide) <= 2 * min(tall, wide) and free[top:bottom, left:right].all():
                best = max(best, tall * wide)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_the_rectangle_is_as_large_as_any(seed):
    rng = np.random.default_rng(seed)
    free = rng.random(rng.integers(1, 10, 2)) < rng.choice([0.3, 0.6, 0.8, 0.95])
    top, left, height, width = largest_rectangle(free)
    inside = free[top : top + height, left : left + width]
    assert inside.all() and inside.shape == (height, width)
    assert max(height, width) <= 2 * min(height, width)
    assert height * width == brute_force(free)


def test_a_long_rectangle_is_cut_at_both_ends_and_none_is_zero():
    assert largest_rectangle(np.ones((2, 10), bool)) == (0, 3, 2, 4)
    assert largest_rectangle(np.ones((10, 2), bool)) == (3, 0, 4, 2)
    assert largest_rectangle(np.zeros((3, 4), bool)) == (0, 0, 0, 0)


def test_a_square_is_preferred_to_a_longer_strip_that_is_larger():
    free = np.zeros((8, 40), bool)
    free[0] = True  # 40 cells, of which 2 may be kept
    free[3:6, 30:33] = True
    assert largest_rectangle(free) == (3, 30, 3, 3)


# The part


def distance_to(mask, box):
    """The least distance of a pixel of the box from one of the mask, by loops."""
    top, left, height, width = box
    return min(
        np.hypot(y - y.clip(top, top + height - 1), x - x.clip(left, left + width - 1))
        for y, x in np.argwhere(mask)
    )


@pytest.mark.parametrize("value", [1, 4, IGNORE])
@pytest.mark.parametrize("seed", range(8))
def test_a_part_keeps_its_distance_from_objects(seed, value):
    rng = np.random.default_rng(seed)
    mask = np.zeros((120, 150, 2), np.uint8)
    y, x = rng.integers(0, 90, 2)
    mask[y : y + 25, x : x + 30, seed % 2] = value
    box = largest_part(GREY, mask)
    assert box is not None
    least = 0.05 * np.hypot(120, 150)
    distance = distance_to(mask.any(-1), box)
    assert distance > least
    # Cells have 2 pixels: one side of the largest part is as near as cells allow.
    assert distance < least + 2 * 2 or min(box[2:]) >= 118
    assert max(box[2:]) <= 2 * min(box[2:]) and min(box[2:]) >= 30


def test_a_whole_picture_without_an_object_is_a_part_of_its_own():
    assert largest_part(GREY, np.zeros((120, 150, 1), np.uint8)) == (0, 0, 120, 150)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_what_is_black_beside_the_view_is_in_no_part(kind):
    image = np.full((120, 150, 3), 90, np.uint8)
    image[:, :30] = 15  # in no channel is it brighter
    image[:10] = 3
    image[60:63, 80:83] = 0  # inside of the view, but not a cell of 2 pixels that is all black
    image[60:63, 80:83][::2, ::2] = 200
    image = image if kind == np.uint8 else (image / 255).astype(kind)
    assert largest_part(image, np.zeros((120, 150, 1), np.uint8)) == (10, 30, 110, 120)


def test_alpha_is_no_light():
    image = np.full((60, 80, 4), 255, np.uint8)
    image[:, :30, :3] = 0
    part = largest_part(image, np.zeros((60, 80, 1), np.uint8))
    assert part == largest_part(image[..., :3], np.zeros((60, 80, 1), np.uint8)) == (0, 30, 60, 50)


def test_a_picture_full_of_object_or_black_has_no_part():
    mask = np.ones((120, 150, 1), np.uint8)
    assert largest_part(GREY, mask) is None
    assert largest_part(GREY, IGNORE * mask) is None
    assert largest_part(0 * GREY, 0 * mask) is None
    # A strip of less than a quarter of the shorter side, 30, is too narrow: 9.6 are the margin.
    for width, there in ((38, False), (42, True)):
        strip = mask.copy()
        strip[:, :width] = 0
        assert (largest_part(GREY, strip) is not None) == there


# The source


def entries(masks, image=GREY):
    return [
        {"name": str(i), "image": encode(image), "mask": encode(x)} for i, x in enumerate(masks)
    ]


def test_pictures_without_a_part_are_left_out_and_counted():
    full, empty = np.ones((120, 150), np.uint8), np.zeros((120, 150), np.uint8)
    half = np.where(np.arange(150) < 75, full, 0).astype(np.uint8)
    parts = Negatives(entries([full, half, full, empty]), formats.BINARY, RGB)
    assert [each["name"] for each in parts] == ["1", "3"]
    assert (len(parts), parts.without) == (2, 2)
    with pytest.raises(DataError, match="no picture has a part without an object.*--negatives"):
        Negatives(entries([full]), formats.BINARY, RGB)


FORMATS = {
    "8 bits": (RGB, lambda x: encode(x)),
    "grey": (ImageFormat(1), lambda x: encode(x[..., 0])),
    "scaled": (ImageFormat(1, "integers", (0.0,), (4095.0,)), lambda x: array(16 * x[..., 0])),
    "percentiles": (
        ImageFormat(5, None, (0.0,), (1.0,), (1, 99)),
        lambda x: array(x.repeat(2, -1)[..., :5].astype(np.float32)),
    ),
}


def array(values):
    return data._encode(values.astype(np.uint16) if values.dtype.kind == "i" else values)


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_is_what_the_picture_shows_there(name):
    """Also if the picture's values are scaled: they are not scaled a second time."""
    image_format, save = FORMATS[name]
    rng = np.random.default_rng(0)
    image = rng.integers(60, 250, (120, 150, 3), np.uint8)
    mask = np.zeros((120, 150), np.uint8)
    mask[40:60, 30:50] = 1
    content = save(image if name in ("8 bits", "grey") else image.astype(int))
    source = [{"name": "a", "image": content, "mask": encode(mask)}]
    whole, full = data.decode_pair(source[0], formats.BINARY, image_format)
    parts = Negatives(source, formats.BINARY, image_format)
    box = largest_part(whole, full)
    assert box is not None
    top, left, height, width = box
    part, none = data.decode_pair(parts[0], parts.mask_format, parts.image_format)
    np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])
    assert part.dtype == whole.dtype and none.shape == (height, width, 1) and not none.any()


def test_an_object_is_any_class_but_the_first_and_what_does_not_count_is_in_no_part():
    index = np.zeros((120, 150), np.uint8)
    index[:30], index[-30:], index[:, :30] = 1, 2, 7
    names = "background", "a", "b"
    one = formats.MaskFormat(names, ((0, 0), (1, 1), (2, 2), (7, IGNORE)))
    overlapping = formats.MaskFormat(names, ((0, 0), (1, 1)), separate=True, overlapping=True)
    files = [(i, encode((index == i).astype(np.uint8))) for i in (1, 2)]
    for mask_format, mask, left in ((one, encode(index), 40), (overlapping, files, 0)):
        source = [{"name": "a", "image": encode(GREY), "mask": mask}]
        parts = Negatives(source, mask_format, RGB)
        assert parts.mask_format.learned == mask_format.learned
        (_, (top, x, height, width)), *_ = parts._parts
        assert (top, height) == (40, 40) and x >= left and width == 80
        _, decoded = data.decode_pair(parts[0], parts.mask_format, parts.image_format)
        assert decoded.shape == (40, 80, mask_format.channels - (left > 0) * 2)
        assert not decoded.any()


# The numbers


def counts(claimed, pixels):
    """Counts of parts without an object in which so many pixels of each class are claimed."""
    fp = np.array(claimed)
    return metrics.Confusion(0 * fp, fp, 0 * fp, pixels - fp)


def parts_of(names=("background", "polyp"), overlapping=False, n=4):
    values = ((0, 0), (1, 1))
    mask_format = formats.MaskFormat(names, values, separate=overlapping, overlapping=overlapping)
    empty = np.zeros((120, 150), np.uint8)
    masks = [(1, encode(empty)), (2, encode(empty))] if overlapping else encode(empty)
    source = [{"name": "a", "image": encode(GREY), "mask": masks}] * n
    return Negatives(source, mask_format, RGB)


def test_claims_are_counted_by_their_area():
    content = negatives.summary(parts_of(), counts([[0], [1], [2], [600]], 1000))
    assert (content["crops"], content["pictures_without"]) == (4, 0)
    claims = {area: each["mean"] for area, each in content["claims"].items()}
    assert claims == {"0": 0.75, "0.001": 0.5, "0.01": 0.25, "0.05": 0.25}
    assert content["claimed_area"]["mean"] == pytest.approx(603 / 4000)
    expected = metrics.bootstrap_interval(np.array([0, 0.001, 0.002, 0.6]))
    assert content["claimed_area"]["interval"] == pytest.approx(expected)
    assert content["claims"]["0"]["interval"] == metrics.wilson_interval(3, 4)


def test_claims_of_several_classes():
    exclusive = metrics.Confusion(  # of 100 pixels, 90 and 100 are of the first class
        np.array([[90, 0, 0], [100, 0, 0]]),
        np.array([[0, 4, 6], [0, 0, 0]]),
        np.array([[10, 0, 0], [0, 0, 0]]),
        np.array([[0, 96, 94], [0, 100, 100]]),
    )
    content = negatives.summary(parts_of(("background", "a", "b")), exclusive)
    assert content["claims"]["0.05"]["mean"] == 0.5
    assert content["claimed_area"]["mean"] == pytest.approx(0.05)
    both = parts_of(("background", "a", "b"), overlapping=True)
    content = negatives.summary(both, counts([[4, 6], [0, 0]], 100))
    assert content["claimed_area"]["mean"] == pytest.approx(0.03)


def test_the_interval_of_a_fraction_is_wilsons():
    for k, n in ((0, 20), (3, 20), (20, 20), (41, 97)):
        p, z = k / n, 1.959963984540054
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        expected = centre - half, centre + half
        assert metrics.wilson_interval(k, n) == pytest.approx(expected, abs=1e-12)


# The program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = discs(tmp_path_factory.mktemp("discs"), 40, 48)
    places = "--images", str(root / "images"), "--masks", str(root / "masks")
    size = "--image-size", "32", "--features", "4", "8", "--learning-rate", "0.01"
    flags = "--dataset", "folder", *places, *size, "--epochs", "2"
    assert train.main(["--workdir", str(root / "run"), *flags]) == 0
    return root


@pytest.mark.parametrize("window", [(), ("--window", "16")], ids=["resized", "window"])
def test_evaluate_counts_claims_in_parts_of_the_same_pictures(run, window, tmp_path, capsys):
    # Each part, cut and predicted by hand.
    trained = runs.load_model(run / "run")
    model, size = trained.predictor(window=16 if window else None)
    probas, without = [], 0
    source = data.FolderSource(run / "images", run / "masks", "train")
    for i in range(len(source)):
        image, mask = data.decode_pair(source[i], formats.find(source), RGB)
        if (box := largest_part(image, mask)) is None:
            without += 1
            continue
        top, left, height, width = box
        part = image[top : top + height, left : left + width]
        if size is not None:
            part = np.asarray(Image.fromarray(part).resize(size[::-1], Image.Resampling.BILINEAR))
        probas.append(np.asarray(predict.predict_proba(model, trained.variables, part)))
    # About half of the parts have a claim.
    threshold = round(float(np.median([proba.max() for proba in probas])), 3)
    areas = np.array([(proba > threshold).mean() for proba in probas])
    assert without < len(areas) and 0.2 < (areas > 0).mean() < 0.8

    flags = ["--workdir", str(run / "run"), "--out", str(tmp_path), "--split", "train"]
    flags += ["--checkpoint", "best", *window, "--threshold", str(threshold)]
    assert program.main(flags) == 0
    assert program.main([*flags, "--negatives"]) == 0
    output = capsys.readouterr().out
    stem = f"train{'-window-16x16' * bool(window)}-threshold-{threshold}"
    plain = json.loads((tmp_path / f"evaluation-{stem}.json").read_text())
    content = json.loads((tmp_path / f"evaluation-{stem}-negatives.json").read_text())
    found = content.pop("negatives")
    del plain["cost"], content["cost"]  # seconds
    assert content == plain
    assert (found["crops"], found["pictures_without"]) == (len(areas), without)
    expected = {f"{least:g}": (areas > least).mean() for least in (0, 0.001, 0.01, 0.05)}
    assert {k: x["mean"] for k, x in found["claims"].items()} == pytest.approx(expected)
    assert found["claimed_area"]["mean"] == pytest.approx(areas.mean())
    assert f"in {len(areas)} parts without one" in output
    assert f"    {'above 0.1 %':<18}{expected['0.001']:.4f}" in output
    page = (tmp_path / f"report-{stem}-negatives.html").read_text()
    assert f"{found['claimed_area']['mean']!r}" in page.partition("<h2>Negatives</h2>")[2]


def test_evaluate_refuses_pictures_that_have_no_part_before_it_predicts(run, tmp_path, capsys):
    for part, values in (("images", GREY), ("masks", np.full((120, 150), 255, np.uint8))):
        (tmp_path / part).mkdir()
        Image.fromarray(values).save(tmp_path / part / "a.png")
    places = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    flags = ["--workdir", str(run / "run"), "--out", str(tmp_path / "out"), *places]
    assert program.main([*flags, "--foreground", "255", "--negatives"]) == 1
    output = capsys.readouterr()
    assert "leave out --negatives" in output.err and "predicting" not in output.out
    assert not (tmp_path / "out").exists()
