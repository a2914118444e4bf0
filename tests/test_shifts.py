"""The shifts: what each one does, that it is the same each time, and `evaluate --shifted`."""

import hashlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from flax_unet import augment, data, evaluate, formats, metrics, shifts
from flax_unet.classes import IGNORE
from flax_unet.images import RGB, ImageFormat
from flax_unet.losses import bce, cross_entropy
from flax_unet.model import UNet
from flax_unet.pictures import DataError
from flax_unet.shifts import SHIFTS, Shifted
from flax_unet_cli import evaluate as program
from flax_unet_cli import train
from tests.drawn import discs, encode
from tfds_kvasir.synthetic_polyps.draw import draw

GREY = ImageFormat(channels=1)
MOVED = "crop", "zoom"
COLOURED = [name for name in SHIFTS if name not in MOVED]


class Coins(np.random.Generator):
    """Random numbers, but for single ones of `random`, which are given: 0 is a sign of 1."""

    def __init__(self, *coins):
        super().__init__(np.random.PCG64(0))
        self.coins = list(coins)

    def random(self, *size):
        return self.coins.pop(0) if not size and self.coins else super().random(*size)


UP, DOWN = 0.0, 1.0


@pytest.fixture(scope="module")
def polyp():
    """A drawn image of 127 x 150 pixels, and its mask of 0, 1 and what does not count."""
    image, mask = draw(np.random.default_rng(3), 150)
    mask = mask.astype(np.uint8)
    mask[:5, :9] = IGNORE
    return image[:127], mask[:127, :, None]


def entries(n, side=48, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [draw(rng, side) for _ in range(n)]
    return [
        {"name": str(i), "image": encode(image), "mask": encode(mask.astype(np.uint8))}
        for i, (image, mask) in enumerate(pairs)
    ]


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("name", SHIFTS)
def test_sizes_types_and_values_of_masks_stay(name, grey, polyp):
    image, mask = polyp
    image = image[..., 1:2] if grey else image
    before = image.copy(), mask.copy()
    for seed in range(4):
        shifted, moved = SHIFTS[name](np.random.default_rng(seed), image, mask)
        assert (shifted.shape, shifted.dtype) == (image.shape, np.uint8)
        assert (moved.shape, moved.dtype) == (mask.shape, np.uint8)
        assert {*np.unique(moved)} <= {0, 1, IGNORE} and (moved == 1).any()
        if name in COLOURED:
            np.testing.assert_array_equal(moved, mask)
        if (name, grey) != ("hue", True):
            assert 3 < abs(shifted.astype(int) - image).mean() < 80
        if name in COLOURED:  # a surgeon still sees what there is
            assert np.corrcoef(shifted.ravel(), image.ravel())[0, 1] > 0.85
    np.testing.assert_array_equal(before[0], image)
    np.testing.assert_array_equal(before[1], mask)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_picture_is_shifted_the_same_each_time_and_in_any_order(name):
    source = entries(6)
    shifted = Shifted(source, name, formats.BINARY, RGB)
    assert len(shifted) == 6 and [x["name"] for x in shifted] == [x["name"] for x in source]
    first = list(shifted)
    backwards = [Shifted(source[::-1], name, formats.BINARY, RGB)[i] for i in range(6)]
    assert backwards[::-1] == first
    assert Shifted(source[4:5], name, formats.BINARY, RGB)[0] == first[4]


def test_random_numbers_come_from_the_name_of_the_shift_and_the_bytes_of_the_picture(monkeypatch):
    source, states = entries(2), []

    def spy(rng, image, mask):
        states.append(rng.random())
        return image, mask

    expected = []
    for name in ("gamma", "crop"):
        monkeypatch.setitem(SHIFTS, name, spy)
        for x in source:
            Shifted([x], name, formats.BINARY, RGB)[0]
            seed = hashlib.sha256(name.encode() + x["image"]).hexdigest()
            expected.append(np.random.default_rng(int(seed, 16)).random())
    assert states == expected and len({*states}) == 4


# Each one


@pytest.mark.parametrize("turn, sign", [(UP, 1), (DOWN, -1)])
@pytest.mark.parametrize("warm, tint", [(UP, 1.25), (DOWN, 1 / 1.25)])
def test_hue_turns_as_augmentation_does_and_tints(turn, sign, warm, tint):
    image = np.random.default_rng(0).integers(60, 180, (8, 9, 3), np.uint8)
    shifted, _ = shifts.hue(Coins(turn, warm), image, None)
    turned = np.asarray(augment.recolour(jnp.asarray(image, jnp.float32) / 255, hue=25 * sign))
    expected = 255 * turned * (tint, 1, 1 / tint)
    np.testing.assert_allclose(shifted, np.clip(expected, 0, 255), atol=0.51)


def test_hue_leaves_an_image_without_colours_as_it_is():
    grey = np.random.default_rng(0).integers(0, 256, (8, 9, 1), np.uint8)
    for image in (grey, grey.repeat(3, -1)):
        shifted, _ = shifts.hue(np.random.default_rng(0), image, None)
        np.testing.assert_array_equal(shifted, image)


@pytest.mark.parametrize("coin, power", [(UP, 2), (DOWN, 1 / 2)])
@pytest.mark.parametrize("strength", [1, 0.5])
def test_gamma_is_a_power_of_the_fraction_of_255(coin, power, strength):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    shifted, _ = shifts.gamma(Coins(coin), image, None, strength)
    expected = [255 * (v / 255) ** (power**strength) for v in range(256)]
    np.testing.assert_allclose(shifted.ravel(), expected, atol=0.501)


@pytest.mark.parametrize("strength", [1, 0.5])
def test_blur_is_close_to_a_gaussian_of_a_fraction_of_the_shorter_side(strength):
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    shifted, _ = shifts.blur(None, image, None, strength)
    errors = []
    for sigma in (2 * strength, 2.4 * strength, 2.8 * strength):  # 1.2 % of 200 is 2.4
        gaussian = ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="nearest")
        errors.append(abs(shifted - gaussian).mean())
    assert errors[1] < 0.9 and errors[1] < 0.6 * min(errors[0], errors[2])


def test_vignette_only_darkens_with_the_distance_from_the_centre():
    image = np.full((41, 61, 3), 200, np.uint8)
    shifted, _ = shifts.vignette(None, image, None)
    y, x = np.mgrid[-1:1:41j, -1:1:61j]
    order = np.argsort((x**2 + y**2).ravel(), kind="stable")
    assert (np.diff(shifted[..., 0].ravel()[order].astype(int)) <= 0).all()
    assert (shifted == shifted[::-1, ::-1]).all() and (shifted == shifted[..., :1]).all()
    assert [*shifted[[20, 0, 0, 20], [30, 0, 30, 0], 0]] == [200, 40, 120, 120]
    assert shifts.vignette(None, image, None, 0.5)[0][0, 0, 0] == 120


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength, quality", [(1, 10), (0.5, 20)])
def test_jpeg_is_what_pillow_decodes(channels, strength, quality, polyp):
    image = polyp[0][..., :channels]
    shifted, _ = shifts.jpeg(None, image, None, strength)
    stream = io.BytesIO(encode(image if channels == 3 else image[..., 0], "jpeg", quality=quality))
    expected = np.asarray(Image.open(stream))
    np.testing.assert_array_equal(shifted, expected.reshape(image.shape))


def test_smoke_is_light_smooth_and_not_in_the_dark():
    y, x = np.mgrid[:90, :120]
    image = np.where((x < 10)[..., None], 0, 100).repeat(3, -1).astype(np.uint8)
    for seed in range(5):
        shifted = shifts.smoke(np.random.default_rng(seed), image, None)[0].astype(int)
        assert (shifted[:, :10] == 0).all()
        assert shifted[:, 10:].min() >= 100 and shifted.max() <= 100 + 0.75 * 120 + 1
        assert abs(np.diff(shifted[:, 10:], axis=1)).max() <= 5 and np.ptp(shifted[:, 10:]) > 30
    bright = shifts.smoke(np.random.default_rng(0), np.full((9, 9, 1), 255, np.uint8), None)[0]
    assert bright.min() >= 255 - 0.75 * 35 - 1


def test_together_is_five_of_them_at_half_strength(polyp):
    image, mask = polyp
    for seed in range(3):
        expected, rng = image, np.random.default_rng(seed)
        for name in ("blur", "vignette", "hue", "gamma", "jpeg"):
            expected, _ = getattr(shifts, name)(rng, expected, mask, 0.5)
        shifted, _ = shifts.together(np.random.default_rng(seed), image, mask)
        np.testing.assert_array_equal(shifted, expected)


# Those that move


def blob(height, width, top, left, size=20):
    """A mask of an oblong with one corner cut, which looks the same from no two sides."""
    mask = np.zeros((height, width, 1), np.uint8)
    mask[top : top + size, left : left + 2 * size] = 1
    mask[top : top + size // 2, left : left + size // 2] = 0
    return mask


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("seed", range(6))
def test_image_and_mask_move_together(name, seed):
    mask = blob(120, 160, 40, 50)
    shifted, moved = SHIFTS[name](np.random.default_rng(seed), 255 * mask, mask)
    assert (moved != mask).any()
    there, bright = moved[..., 0] == 1, shifted[..., 0] / 255
    # A pixel that is half covered may be either; so may one at a corner. An outline has over 90.
    assert ((bright > 0.51) & ~there).sum() <= 8 and ((bright < 0.49) & there).sum() <= 8


def test_zoom_enlarges_or_shrinks_about_the_centre():
    mask = blob(120, 160, 40, 50)
    image = np.full((120, 160, 1), 200, np.uint8)
    image[59:61, 79:81] = 0
    for coin, scale in ((UP, 4 / 3), (DOWN, 3 / 4)):
        shifted, moved = shifts.zoom(Coins(coin), image, mask)
        np.testing.assert_allclose((moved == 1).sum() / mask.sum(), scale**2, rtol=0.05)
        centre = np.array(ndimage.center_of_mass(mask[..., 0])) - (59.5, 79.5)
        found = np.array(ndimage.center_of_mass(moved[..., 0] == 1)) - (59.5, 79.5)
        np.testing.assert_allclose(found, scale * centre, atol=0.3)
        dark = 200.0 - shifted[40:80, 60:100, 0]
        np.testing.assert_allclose(ndimage.center_of_mass(dark), (19.5, 19.5), atol=0.1)
        outside = moved == IGNORE
        if coin == DOWN:  # of the border nothing counts, and nothing is seen there
            assert outside.mean() == pytest.approx(1 - 9 / 16, abs=0.02)
            assert (shifted[outside] == 0).all() and (shifted[~outside] > 0).mean() > 0.99
        else:
            assert not outside.any()
    for coin in (UP, DOWN):  # enlarging would lose what is at the border
        _, moved = shifts.zoom(Coins(coin), image, blob(120, 160, 0, 0, 10))
        assert (moved == IGNORE).any() and (moved == 1).any()


def test_crop_shows_a_part_of_each_side_at_random_places():
    ramp = np.stack([x.astype(np.uint8) for x in np.mgrid[:200, :200]], -1)
    image, mask = ramp[..., [0, 1, 1]], np.zeros((200, 200, 1), np.uint8)
    places, sides = [], []
    for seed in range(40):
        shifted, moved = shifts.crop(np.random.default_rng(seed), image, mask)
        assert not moved.any()  # nothing from outside
        lower, upper = (shifted[..., c].min().astype(int) for c in (0, 1))
        extent = [np.ptp(shifted[..., c].astype(int)) + 1 for c in (0, 1)]
        assert abs(extent[0] - extent[1]) <= 2  # not distorted
        places.append((lower, upper))
        sides.append(extent[0] / 200)
    assert 0.69 <= min(sides) < 0.72 and 0.78 < max(sides) <= 0.81
    assert np.min(places) < 10 and np.max(places) > 40
    assert abs(np.corrcoef(np.transpose(places))[0, 1]) < 0.5


@pytest.mark.parametrize("channel", [0, 1])
def test_crop_keeps_half_of_the_objects_if_it_can(channel):
    mask = np.zeros((100, 100, 2), np.uint8)
    mask[:, :10, 0] = IGNORE  # does not count, so it is no object
    mask[80:, 70:, channel] = 3
    for seed in range(40):
        _, moved = shifts.crop(np.random.default_rng(seed), mask[..., :1], mask)
        enlarged = 1 / 0.75**2
        assert (moved == 3).sum() > 0.5 * 0.85 * enlarged * 600


def test_crop_never_loses_all_objects():
    mask = np.zeros((100, 100, 1), np.uint8)
    mask[[0, 0, 99, 99], [0, 99, 0, 99]] = 1  # no part has two of these
    for seed in range(20):
        _, moved = shifts.crop(np.random.default_rng(seed), mask, mask)
        assert (moved == 1).any()


# The source


def test_masks_of_any_format_are_the_same_classes():
    rng, image = np.random.default_rng(0), encode(np.zeros((30, 40, 3), np.uint8))
    index = rng.integers(0, 3, (30, 40), np.uint8)
    colours = np.array([[0, 0, 0], [9, 200, 3], [255, 255, 255]], np.uint8)
    names = "background", "a", "b"
    values = tuple((tuple(colour), i) for i, colour in enumerate(colours.tolist()))
    by_colour = formats.MaskFormat(names, values)
    ignored = formats.MaskFormat(values=((7, 1), (0, IGNORE)), rest=0)
    soft = formats.MaskFormat(values=(), threshold=127.5)
    each = formats.MaskFormat(names, ((0, 0), (255, 1)), separate=True)
    files = [(i, encode((index == i) * np.uint8(255))) for i in (1, 2)]
    overlap = [(1, files[0][1]), (2, encode((index > 0) * np.uint8(255)))]
    overlapping = formats.MaskFormat(names, ((0, 0), (255, 1)), None, None, True, True)
    for mask_format, mask in (
        (by_colour, encode(colours[index])),
        (ignored, encode(index * np.uint8(7))),
        (soft, encode(index * np.uint8(100), "jpeg")),
        (each, files),
        (overlapping, overlap),
    ):
        source = [{"name": "x", "image": image, "mask": mask}]
        _, expected = data.decode_pair(source[0], mask_format, RGB)
        for name in ("jpeg", "zoom"):
            shifted = Shifted(source, name, mask_format, RGB)
            assert shifted.mask_format.learned == mask_format.learned
            assert shifted.mask_format.channels == mask_format.channels
            _, found = data.decode_pair(shifted[0], shifted.mask_format, RGB)
            if name == "jpeg":
                np.testing.assert_array_equal(found, expected)
            assert found.shape == expected.shape
            assert {*np.unique(found)} <= {*np.unique(expected), IGNORE}


@pytest.mark.parametrize(
    "image_format",
    [
        ImageFormat(channels=4),
        ImageFormat(channels=3, pages=True),
        ImageFormat(kind="integers", high=(4095.0,)),
        ImageFormat(kind="floats", high=(1.0,)),
        ImageFormat(kind=None, percentiles=(1, 99)),
    ],
    ids=str,
)
def test_other_pictures_are_refused(image_format):
    with pytest.raises(DataError, match="grey or colours of 8 bits.*leave out --shifted"):
        Shifted([], "hue", formats.BINARY, image_format)


def test_an_unknown_shift_is_refused():
    with pytest.raises(DataError, match="no shift 'fog': choose one of hue, gamma"):
        Shifted([], "fog", formats.BINARY, RGB)


# Scores


def counts(rng, n):
    return metrics.Confusion(*rng.integers(1, 100, (4, n, 2)))


def test_the_summary_has_means_over_images_and_a_paired_drop():
    rng = np.random.default_rng(0)
    plain, shifted = counts(rng, 30), {"a": counts(rng, 30), "b": counts(rng, 30)}
    content = shifts.summary(plain, shifted)
    assert [*content] == ["a", "b", "mean", "drop"]
    for key, ratio in (("dice_per_image", metrics.dice), ("iou_per_image", metrics.iou)):
        p, a, b = (ratio(x).mean(-1) for x in (plain, *shifted.values()))
        for name, values in (("a", a), ("b", b), ("mean", (a + b) / 2), ("drop", p - (a + b) / 2)):
            assert content[name][key] == pytest.approx(values.mean())
            interval = metrics.bootstrap_interval(values)
            assert content[name][f"{key}_interval"] == pytest.approx(interval)
    same = shifts.summary(plain, {"a": plain, "b": plain})
    assert same["drop"]["dice_per_image_interval"] == (0, 0)


@pytest.mark.parametrize("overlapping", [False, True])
def test_several_classes_are_scored(overlapping):
    """A border that does not count, and batches that are padded, change no number."""
    rng, names = np.random.default_rng(0), ("background", "a", "b")
    source, channels = [], 2 if overlapping else 3
    for i in range(5):
        parts = [encode(rng.integers(0, high, (40, 40), np.uint8)) for high in (2, 2, 3)]
        mask = [*enumerate(parts[:2], 1)] if overlapping else parts[2]
        image = encode(rng.integers(0, 256, (40, 40, 3), np.uint8))
        source.append({"name": str(i), "image": image, "mask": mask})
    values = (0, 0), (1, 1), *(() if overlapping else ((2, 2),))
    mask_format = formats.MaskFormat(names, values, separate=overlapping, overlapping=overlapping)
    model = UNet(features=(4, 8), num_classes=channels, overlapping=overlapping)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    shifted = Shifted(source, "zoom", mask_format, RGB)
    how = {"batch_size": 3, "loss_fn": bce if overlapping else cross_entropy}
    scored = evaluate.score(model, variables, shifted, 16, shifted.mask_format, RGB, **how)
    found = evaluate.counts_of(batches := list(scored))
    _, expected, _ = evaluate.report(batches, mask_format.learned)
    arrays = data.load(shifted, 16, shifted.mask_format, RGB)
    assert (arrays.mask == IGNORE).any()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    counted = (arrays.mask != IGNORE).sum((1, 2))
    np.testing.assert_array_equal(sum(found), np.broadcast_to(counted, (5, channels)))


# The program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = discs(tmp_path_factory.mktemp("discs"), 30, 32)
    places = "--images", str(root / "images"), "--masks", str(root / "masks")
    size = "--image-size", "32", "--features", "4", "8", "--learning-rate", "0.01"
    flags = "--dataset", "folder", *places, *size, "--epochs", "3"
    assert train.main(["--workdir", str(root / "run"), *flags]) == 0
    return root


@pytest.mark.parametrize("window", [(), ("--window", "16")])
def test_evaluate_scores_each_shift_of_the_same_pictures(run, window, tmp_path, capsys):
    flags = ["--workdir", str(run / "run"), "--out", str(tmp_path), *window]
    assert program.main(flags) == 0
    assert program.main([*flags, "--shifted"]) == 0
    output = capsys.readouterr().out
    end = "-window-16x16" if window else ""
    plain = json.loads((tmp_path / f"evaluation-test{end}.json").read_text())
    content = json.loads((tmp_path / f"evaluation-test{end}-shifted.json").read_text())
    scores = content.pop("shifted")
    assert [*scores] == [*SHIFTS, "mean", "drop"]
    del plain["cost"], content["cost"]  # seconds
    assert content == plain

    # A shift as pictures in a folder, scored as any others.
    source = data.FolderSource(run / "images", run / "masks", "test")
    mask_format = formats.find(source)
    for name in ("gamma", "crop"):
        folder = tmp_path / name
        shifted = Shifted(source, name, mask_format, RGB)
        for i in range(len(source)):
            image, mask = data.decode_pair(shifted[i], shifted.mask_format, RGB)
            for part, array in (("images", image), ("masks", mask[..., 0])):
                (folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / part / f"{i}.png")
        others = "--images", str(folder / "images"), "--masks", str(folder / "masks")
        assert program.main([*flags, *others, "--foreground", "1"]) == 0
        (file,) = tmp_path.glob(f"evaluation-folder-{name}-images*.json")
        expected = json.loads(file.read_text())
        for key in scores[name]:
            assert scores[name][key] == pytest.approx(expected[key])

    dice = {name: each["dice_per_image"] for name, each in scores.items()}
    assert dice["mean"] == pytest.approx(np.mean([dice[name] for name in SHIFTS]))
    assert dice["drop"] == pytest.approx(plain["dice_per_image"] - dice["mean"])
    for name, value in dice.items():
        assert f"    {name:<18}{value:.4f}" in output
    page = (tmp_path / f"report-test{end}-shifted.html").read_text()
    assert f"{scores['drop']['iou_per_image']!r}" in page.partition("<h2>Shifted</h2>")[2]


def test_evaluate_refuses_shifts_of_other_pictures_before_it_predicts(run, tmp_path, capsys):
    flags = ["--workdir", str(run / "run"), "--out", str(tmp_path), "--percentiles", "1", "99"]
    assert program.main([*flags, "--shifted"]) == 1
    output = capsys.readouterr()
    assert "leave out --shifted" in output.err and "predicting" not in output.out
