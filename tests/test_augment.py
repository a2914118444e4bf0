from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage
from scipy.spatial.transform import Rotation

from flax_unet import augment
from flax_unet.data import as_float


def pictures(n, size=(5, 7)):
    image = jax.random.bits(jax.random.key(1), (n, *size, 3), jnp.uint8)
    return image, (image[..., :1] > 128).astype(jnp.uint8)


def smooth(size=(24, 32)):
    """A picture without hard edges: float32 [H, W, 3] in [0.15, 0.75]."""
    y, x = np.mgrid[: size[0], : size[1]] / 5
    waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(2 * x)], -1)
    return (0.45 + 0.3 * waves).astype(np.float32)


every = pytest.mark.parametrize(
    "change",
    [
        augment.random_flips,
        augment.random_affine,
        augment.random_colour,
        augment.chain(augment.random_affine, augment.random_colour),
        partial(augment.random_affine, elastic=0.05),
    ],
    ids=["flips", "affine", "colour", "chain", "elastic"],
)


def test_each_image_is_one_of_its_four_mirrorings_and_its_mask_the_same():
    image, mask = pictures(400)
    flipped, flipped_mask = jax.jit(augment.random_flips)(jax.random.key(0), image, mask)
    assert (flipped.dtype, flipped_mask.dtype) == (jnp.uint8, jnp.uint8)
    seen = np.zeros(4, int)
    for x, m, y, n in zip(*map(np.asarray, (image, mask, flipped, flipped_mask)), strict=True):
        ways = [
            (x, m),
            (x[::-1], m[::-1]),
            (x[:, ::-1], m[:, ::-1]),
            (x[::-1, ::-1], m[::-1, ::-1]),
        ]
        way = [i for i, (a, b) in enumerate(ways) if (a == y).all() and (b == n).all()]
        assert len(way) == 1
        seen[way[0]] += 1
    assert (abs(seen - 100) < 40).all()  # more than four standard deviations


@every
def test_an_image_alone_is_changed_as_in_a_batch(change):
    image, mask = pictures(6)
    for seed in range(8):
        together = change(jax.random.key(seed), image, mask)
        alone = change(jax.random.key(seed), image[:1], mask[:1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[:1], b, atol=1e-6)


@every
def test_images_and_keys_are_changed_each_in_its_own_way(change):
    image, mask = (x.repeat(32, 0) for x in pictures(1))
    results = [np.asarray(change(jax.random.key(seed), image, mask)[0]) for seed in (0, 1)]
    assert (results[0] != results[1]).any()
    kinds = {one.tobytes() for one in results[0]}
    assert len(kinds) == (4 if change is augment.random_flips else 32)


def test_parameters_that_change_nothing_change_nothing():
    image, _ = pictures(1)
    image = image[0] / jnp.float32(255)
    np.testing.assert_array_equal(augment.warp(image, augment.affine()), image)
    np.testing.assert_array_equal(augment.recolour(image), image)


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"rotation": 90}, lambda x: np.rot90(x)),
        ({"rotation": -180}, lambda x: x[::-1, ::-1]),
        ({"scale": np.array([-1, 1])}, lambda x: x[::-1]),
        ({"scale": np.array([1, -1])}, lambda x: x[:, ::-1]),
        ({"shift": np.array([2, -3])}, lambda x: np.pad(x, ((2, 0), (0, 3), (0, 0)))[:-2, 3:]),
        ({"shear": 45}, lambda x: np.stack([np.roll(r, i - 4, 0) for i, r in enumerate(x)])),
    ],
    ids=["turn", "turn back", "mirror rows", "mirror columns", "shift", "shear"],
)
def test_moves_that_can_be_made_by_hand(change, moved):
    image = np.zeros((9, 9, 3), np.float32)
    image[2:7, 3:6] = np.random.default_rng(0).random((5, 3, 3))
    result = augment.warp(jnp.asarray(image), augment.affine(**change))
    np.testing.assert_allclose(result, moved(image), atol=1e-5)


def test_a_warp_is_scipys_of_the_composed_matrix():
    image = smooth()
    middle = (np.array(image.shape[:2]) - 1) / 2
    turn, lean = np.deg2rad(35), np.tan(np.deg2rad(12))
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    forward = turned @ [[1, 0], [lean, 1]] @ np.diag([-1.3, 0.8])
    inverse, shift = np.linalg.inv(forward), np.array([3.5, -2.25])
    expected = np.stack(
        [
            ndimage.affine_transform(
                channel.astype(np.float64),
                inverse,
                middle - inverse @ (middle + shift),
                order=1,
                mode="grid-constant",
            )
            for channel in np.moveaxis(image, -1, 0)
        ],
        axis=-1,
    )
    matrix = augment.affine(rotation=35, scale=jnp.array([-1.3, 0.8]), shear=12, shift=shift)
    result = jax.jit(augment.warp)(image, matrix)
    assert (expected == 0).any() and (expected > 0).mean() > 0.5
    np.testing.assert_allclose(result, expected, atol=2e-5)


def test_a_rotation_is_pillows():
    image = (255 * smooth((32, 32))).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).rotate(30, Image.Resampling.BILINEAR))
    result = augment.warp(image / jnp.float32(255), augment.affine(rotation=30))
    inside = np.asarray(expected.min(-1) > 0)
    inside = ndimage.binary_erosion(inside, iterations=2)  # Pillow treats the frame in its own way
    assert inside.mean() > 0.5
    assert abs(255 * np.asarray(result) - expected)[inside].max() < 1.01


def test_image_and_mask_move_together_and_masks_stay_0_and_1():
    y, x = np.mgrid[:64, :64]
    disc = ((y - 24) ** 2 + (x - 38) ** 2 < 15**2).astype(np.uint8)[None, ..., None]
    disc = disc.repeat(64, 0)
    image = 255 * disc.repeat(3, -1)
    warped, mask = jax.jit(augment.random_affine)(jax.random.key(0), image, disc)
    assert warped.dtype == jnp.float32 and mask.dtype == jnp.uint8
    assert set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(mask[..., 0] == 1, np.asarray(warped)[..., 0] >= 0.5)
    # a scale is between 0.8 and 1.25, and the shear keeps areas; some discs leave the frame
    area = np.asarray(mask).sum((1, 2, 3)) / disc[0].sum()
    assert area.max() < 1.25**2 * 1.05 and 0.8**2 * 0.95 < np.median(area)
    assert area.max() > 1.2 and area.min() < 0.75
    assert len({ndimage.center_of_mass(m) for m in np.asarray(mask)}) == 64


def test_the_random_moves_are_mirrorings_and_the_stated_ranges():
    n, size = 400, (33, 49)
    rows, columns = (np.linspace(0, 1, k, dtype=np.float32) for k in size)
    # A bilinear picture of straight slopes tells where each of its pixels was taken.
    slopes = np.stack([*np.meshgrid(rows, columns, indexing="ij"), np.ones(size)], -1)
    image = jnp.broadcast_to(jnp.asarray(slopes, jnp.float32), (n, *size, 3))
    stated = {"rotation": 30.0, "scale": 1.25, "shear": 10.0, "shift": 0.1}
    warped, _ = jax.jit(lambda *x: augment.random_affine(*x, **stated))(
        jax.random.key(0), image, image[..., :1] > 2
    )
    middle = (np.array(size) - 1) / 2
    here = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) - middle
    found = []
    for one in np.asarray(warped, np.float64):
        inside = one[..., 2] > 1 - 1e-6
        there = one[inside, :2] * (np.array(size) - 1) - middle
        at = np.column_stack([here[inside], np.ones(inside.sum())])
        solution, *_ = np.linalg.lstsq(at, there, rcond=None)
        np.testing.assert_allclose(at @ solution, there, atol=1e-3)
        forward = np.linalg.inv(solution[:2].T)
        shift = -forward @ solution[2] / size
        # forward = turn @ shear @ diag(scale): its second column is turned and scaled alone
        mirrored = np.sign(forward[1, 1])
        wide = mirrored * np.hypot(*forward[:, 1])
        turn = np.arctan2(-forward[0, 1] / wide, forward[1, 1] / wide)
        back = [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
        tall, lean = np.array(back) @ forward[:, 0]
        found.append([turn, np.arctan(lean / tall), np.log(abs(tall)), *shift, tall < 0, wide < 0])
        assert abs(wide) == pytest.approx(abs(tall), rel=1e-3)
    turn, shear, scale, down, right, *mirrored = np.array(found).T
    bounds = np.deg2rad([stated["rotation"], stated["shear"]])
    for values, bound in zip(
        (turn, shear, scale, down, right), (*bounds, np.log(1.25), 0.1, 0.1), strict=True
    ):
        assert abs(values).max() <= bound * 1.001
        # uniform: the deviation of 400 is within 4 standard errors
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(values.mean()) < 4 * bound / 3**0.5 / n**0.5
    for share in map(np.mean, mirrored):
        assert abs(share - 0.5) < 0.1
    # each on its own
    assert abs(np.corrcoef(np.array(found).T) - np.eye(7)).max() < 0.25


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_the_random_colours_have_the_stated_ranges(name):
    image = jnp.asarray(smooth())
    nothing = dict.fromkeys(["brightness", "contrast", "saturation", "hue"], 0.0)
    mask = jnp.zeros((200, *image.shape[:2], 1))
    changed, _ = augment.random_colour(
        jax.random.key(0),
        jnp.broadcast_to(image, (200, *image.shape)),
        mask,
        **nothing | {name: 0.2},
    )
    # The change is linear in its factor.
    none = np.asarray(augment.recolour(image, **{name: 0.0})).ravel()
    slope = np.asarray(image).ravel() - none
    factors = (np.asarray(changed).reshape(200, -1) - none) @ slope / (slope @ slope)
    np.testing.assert_allclose(
        np.asarray(changed).reshape(200, -1), none + np.outer(factors, slope), atol=1e-5
    )
    assert abs(factors - 1).max() <= 0.2001
    assert factors.std() == pytest.approx(0.2 / 3**0.5, rel=0.15)


def test_the_random_hue_has_the_stated_range():
    image = jnp.full((200, 4, 4, 3), jnp.array([0.6, 0.4, 0.5]))
    nothing = dict.fromkeys(["brightness", "contrast", "saturation"], 0.0)
    changed, _ = augment.random_colour(
        jax.random.key(0), image, image[..., :1], **nothing, hue=10.0
    )
    red, green, blue = np.asarray(changed)[:, 0, 0].T

    def angle(red, green, blue):  # in the plane of equal grey
        return np.rad2deg(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue))

    turned = angle(red, green, blue) - angle(0.6, 0.4, 0.5)
    assert abs(turned).max() <= 10.001
    assert turned.std() == pytest.approx(10 / 3**0.5, rel=0.15)


def test_a_mirroring_is_one_or_the_other_even_for_a_zero(monkeypatch):
    image, mask = pictures(1)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: jnp.zeros(shape))
    same, _ = augment.random_affine(jax.random.key(0), image, mask)
    np.testing.assert_allclose(255 * same, image, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.3])
def test_brightness_contrast_and_saturation_are_pillows(name, enhance, factor):
    image = (255 * smooth()).astype(np.uint8)
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor), np.float32)
    result = 255 * np.asarray(augment.recolour(image / jnp.float32(255), **{name: factor}))
    assert abs(result - expected).max() < 1.6  # Pillow rounds the grey, and the result down


def test_hue_turns_the_colours_about_the_grey_axis():
    image = jnp.asarray(smooth())
    third = augment.recolour(image, hue=120)
    np.testing.assert_allclose(third, jnp.roll(image, 1, axis=-1), atol=1e-6)
    axis = np.deg2rad(25) * np.ones(3) / np.sqrt(3)
    expected = Rotation.from_rotvec(axis).apply(np.asarray(image).reshape(-1, 3))
    result = augment.recolour(image, hue=25)
    np.testing.assert_allclose(result.reshape(-1, 3), expected.clip(0, 1), atol=1e-6)


def test_colours_are_changed_in_the_order_that_is_stated():
    changes = {"brightness": 0.9, "contrast": 1.2, "saturation": 0.7, "hue": 20.0}
    image = expected = jnp.asarray(smooth())
    for name, value in changes.items():
        expected = augment.recolour(expected, **{name: value})
    assert 0 < expected.min() and expected.max() < 1  # nothing was clipped on the way
    np.testing.assert_allclose(augment.recolour(image, **changes), expected, atol=1e-5)


def test_colours_leave_the_mask_and_the_range():
    image, mask = pictures(16, (16, 16))
    changed, same = augment.random_colour(
        jax.random.key(0), image, mask, brightness=0.9, contrast=0.9
    )
    np.testing.assert_array_equal(same, mask)
    assert changed.dtype == jnp.float32 and changed.min() == 0 and changed.max() == 1


def test_an_elastic_warp_takes_each_pixel_from_where_it_is_said():
    image = smooth()
    way = np.random.default_rng(0).normal(0, 2, (24, 32, 2)).astype(np.float32)
    matrix = augment.affine(rotation=20.0, scale=1.2)
    y, x = np.mgrid[:24, :32]
    centred = np.stack([y - 11.5, x - 15.5, np.ones((24, 32))])
    places = np.einsum("ij,jhw->ihw", np.asarray(matrix, np.float64), centred)
    places += np.array([11.5, 15.5])[:, None, None] + np.moveaxis(way, -1, 0)
    expected = [
        ndimage.map_coordinates(channel, places, order=1, mode="grid-constant")
        for channel in np.moveaxis(image, -1, 0)
    ]
    warped = augment.warp(jnp.asarray(image), matrix, jnp.asarray(way))
    np.testing.assert_allclose(warped, np.stack(expected, -1), atol=2e-5)


def test_an_elastic_change_bends_image_and_mask_together_and_smoothly():
    y, x = np.mgrid[:64, :64]
    disc = ((y - 31.5) ** 2 + (x - 31.5) ** 2 < 400)[None, ..., None].astype(np.uint8)
    image = (200 * disc.repeat(3, -1)).astype(np.uint8)
    still = dict(rotation=0.0, scale=1.0, shear=0.0, shift=0.0)
    bent, mask = augment.random_affine(jax.random.key(0), image, disc, **still, elastic=0.03)
    inside = np.asarray(bent)[..., :1] > 100 / 255
    assert (inside == np.asarray(mask)).mean() > 0.99
    assert 0.01 < (np.asarray(mask) != disc).mean() < 0.2
    _, pieces = ndimage.label(np.asarray(mask)[0, ..., 0])
    assert pieces == 1


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.5])
def test_blur_is_a_gaussian(sigma):
    image = smooth()
    expected = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest", radius=3)
    np.testing.assert_allclose(
        augment.blur(jnp.asarray(image), sigma, radius=3), expected, atol=1e-5
    )
    np.testing.assert_array_equal(augment.blur(jnp.asarray(image), 0.0, radius=3), image)


def test_about_half_of_the_pictures_are_blurred_noisy_or_cut_and_the_masks_stay():
    image, mask = (x.repeat(64, 0) for x in pictures(1, (16, 16)))
    original = np.asarray(as_float(image[0]))
    for change in (augment.random_blur, augment.random_noise, augment.random_cutout):
        changed, same = change(jax.random.key(0), image, mask)
        assert same is mask
        still = (np.asarray(changed) == original).all((1, 2, 3)).sum()
        assert 16 < still < 48, change  # four standard deviations


def test_noise_has_its_deviation_in_each_channel_alone():
    image = jnp.full((200, 32, 32, 3), 0.5)
    noisy, _ = augment.random_noise(jax.random.key(0), image, None, deviation=0.04)
    deviation = np.asarray(noisy - image).std((1, 2, 3))
    assert deviation.max() < 0.041 and deviation.max() > 0.035
    drawn = deviation[deviation > 0]
    assert abs(drawn.mean() - 0.02) < 0.006  # uniform from 0 to 0.04
    assert abs(float(noisy.mean()) - 0.5) < 1e-3
    grey = np.asarray(noisy - image).mean(-1).std((1, 2))  # of three that do not know each other
    np.testing.assert_allclose(grey[deviation > 0], drawn / 3**0.5, rtol=0.1)


def test_a_cutout_is_one_rectangle_of_the_mean_colour():
    image = np.asarray(jax.random.uniform(jax.random.key(1), (1, 24, 32, 3))).repeat(64, 0)
    cut, _ = augment.random_cutout(jax.random.key(0), jnp.asarray(image), None, side=0.5)
    for before, after in zip(image, np.asarray(cut), strict=True):
        hidden = (before != after).any(-1)
        if not hidden.any():
            continue
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        assert hidden[np.ix_(rows, columns)].all() and (np.diff(rows) == 1).all()
        assert len(rows) <= 12 and len(columns) <= 16
        np.testing.assert_allclose(
            after[hidden], np.tile(before.mean((0, 1)), (hidden.sum(), 1)), atol=1e-5
        )
