from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage
from scipy.spatial.transform import Rotation

from flax_unet import augment
from flax_unet.jpeg import LUMA
from flax_unet.pictures import as_float


def images(n, size=(5, 7)):
    image = jax.random.bits(jax.random.key(1), (n, *size, 3), jnp.uint8)
    return image, (image[..., :1] > 128).astype(jnp.uint8)


def smooth(size=(24, 32)):
    """An image without hard edges: float32 [H, W, 3] in [0.15, 0.75]."""
    y, x = np.mgrid[: size[0], : size[1]] / 5
    waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(2 * x)], -1)
    return (0.45 + 0.3 * waves).astype(np.float32)


each_augmentation = pytest.mark.parametrize(
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


def test_each_image_and_its_mask_are_flipped_alike_in_one_of_four_ways():
    image, mask = images(400)
    flipped, flipped_mask = jax.jit(augment.random_flips)(jax.random.key(0), image, mask)
    assert (flipped.dtype, flipped_mask.dtype) == (jnp.uint8, jnp.uint8)
    counts = np.zeros(4, int)
    for x, m, y, n in zip(*map(np.asarray, (image, mask, flipped, flipped_mask)), strict=True):
        candidates = [
            (x, m),
            (x[::-1], m[::-1]),
            (x[:, ::-1], m[:, ::-1]),
            (x[::-1, ::-1], m[::-1, ::-1]),
        ]
        matches = [(a == y).all() and (b == n).all() for a, b in candidates]
        assert sum(matches) == 1
        counts += matches
    assert (abs(counts - 100) < 40).all()  # more than four standard deviations


def test_no_key_is_consumed_twice():
    augmentation = augment.chain(
        augment.random_flips,
        partial(augment.random_affine, elastic=0.05),
        augment.random_colour,
        augment.random_blur,
        augment.random_noise,
        augment.random_cutout,
        augment.random_light,
        augment.random_jpeg,
    )
    image, mask = images(2)
    with jax.debug_key_reuse(True):
        jax.jit(augmentation)(jax.random.key(0), image, mask)


@pytest.mark.parametrize(
    "name", ["random_light", "random_blur", "random_noise", "random_cutout", "random_jpeg"]
)
def test_changes_of_some_images_depend_on_the_key_and_on_no_other_image(name):
    change = getattr(augment, name)
    image, mask = (x.repeat(64, 0) for x in images(1, (16, 16)))
    first, other = (np.asarray(change(jax.random.key(s), image, mask)[0]) for s in (0, 1))
    assert (first != other).any((1, 2, 3)).sum() > 16
    assert len({x.tobytes() for x in first}) > 8
    alone, _ = change(jax.random.key(0), image[:1], mask[:1])
    np.testing.assert_allclose(first[:1], alone, atol=1e-6)


@each_augmentation
def test_the_rest_of_the_batch_does_not_matter(change):
    image, mask = images(6)
    for seed in range(8):
        together = change(jax.random.key(seed), image, mask)
        alone = change(jax.random.key(seed), image[:1], mask[:1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[:1], b, atol=1e-6)


@each_augmentation
def test_every_image_and_every_key_has_different_changes(change):
    image, mask = (x.repeat(32, 0) for x in images(1))
    results = [np.asarray(change(jax.random.key(seed), image, mask)[0]) for seed in (0, 1)]
    assert (results[0] != results[1]).any()
    distinct = {x.tobytes() for x in results[0]}
    assert len(distinct) == (4 if change is augment.random_flips else 32)


def test_neutral_parameters_change_nothing():
    image, _ = images(1)
    image = image[0] / jnp.float32(255)
    np.testing.assert_array_equal(augment.warp(image, augment.affine()), image)
    np.testing.assert_array_equal(augment.recolour(image), image)


@pytest.mark.parametrize(
    ("parameters", "move"),
    [
        ({"rotation": 90}, lambda x: np.rot90(x)),
        ({"rotation": -180}, lambda x: x[::-1, ::-1]),
        ({"scale": np.array([-1, 1])}, lambda x: x[::-1]),
        ({"scale": np.array([1, -1])}, lambda x: x[:, ::-1]),
        ({"shift": np.array([2, -3])}, lambda x: np.pad(x, ((2, 0), (0, 3), (0, 0)))[:-2, 3:]),
        ({"shear": 45}, lambda x: np.stack([np.roll(r, i - 4, 0) for i, r in enumerate(x)])),
    ],
    ids=["rotate", "rotate back", "flip rows", "flip columns", "shift", "shear"],
)
def test_warps_equal_the_same_moves_in_numpy(parameters, move):
    image = np.zeros((9, 9, 3), np.float32)
    image[2:7, 3:6] = np.random.default_rng(0).random((5, 3, 3))
    result = augment.warp(jnp.asarray(image), augment.affine(**parameters))
    np.testing.assert_allclose(result, move(image), atol=1e-5)


def test_a_warp_equals_scipy_with_the_composed_matrix():
    image = smooth()
    centre = (np.array(image.shape[:2]) - 1) / 2
    angle, slope = np.deg2rad(35), np.tan(np.deg2rad(12))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = rotation @ [[1, 0], [slope, 1]] @ np.diag([-1.3, 0.8])
    inverse, shift = np.linalg.inv(forward), np.array([3.5, -2.25])
    expected = np.stack(
        [
            ndimage.affine_transform(
                channel.astype(np.float64),
                inverse,
                centre - inverse @ (centre + shift),
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


def test_a_rotation_equals_pillow():
    image = (255 * smooth((32, 32))).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).rotate(30, Image.Resampling.BILINEAR))
    result = augment.warp(image / jnp.float32(255), augment.affine(rotation=30))
    inside = np.asarray(expected.min(-1) > 0)
    inside = ndimage.binary_erosion(inside, iterations=2)  # Pillow treats the border differently
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
    # Scales are between 0.8 and 1.25, shear preserves areas, and some discs leave the image.
    area = np.asarray(mask).sum((1, 2, 3)) / disc[0].sum()
    assert area.max() < 1.25**2 * 1.05 and 0.8**2 * 0.95 < np.median(area)
    assert area.max() > 1.2 and area.min() < 0.75
    assert len({ndimage.center_of_mass(m) for m in np.asarray(mask)}) == 64


def test_random_moves_have_the_stated_distributions():
    n, size = 400, (33, 49)
    rows, columns = (np.linspace(0, 1, k, dtype=np.float32) for k in size)
    # The values of a linear gradient tell where each of its pixels was sampled.
    gradient = np.stack([*np.meshgrid(rows, columns, indexing="ij"), np.ones(size)], -1)
    image = jnp.broadcast_to(jnp.asarray(gradient, jnp.float32), (n, *size, 3))
    stated = {"rotation": 30.0, "scale": 1.25, "shear": 10.0, "shift": 0.1}
    warped, _ = jax.jit(lambda *x: augment.random_affine(*x, **stated))(
        jax.random.key(0), image, image[..., :1] > 2
    )
    centre = (np.array(size) - 1) / 2
    target = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) - centre
    estimates = []
    for x in np.asarray(warped, np.float64):
        inside = x[..., 2] > 1 - 1e-6
        source = x[inside, :2] * (np.array(size) - 1) - centre
        homogeneous = np.column_stack([target[inside], np.ones(inside.sum())])
        solution, *_ = np.linalg.lstsq(homogeneous, source, rcond=None)
        np.testing.assert_allclose(homogeneous @ solution, source, atol=1e-3)
        forward = np.linalg.inv(solution[:2].T)
        shift = -forward @ solution[2] / size
        # forward = rotation @ shear @ diag(scale): the second column is only scaled and rotated
        column_scale = np.sign(forward[1, 1]) * np.hypot(*forward[:, 1])
        angle = np.arctan2(-forward[0, 1] / column_scale, forward[1, 1] / column_scale)
        back = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        row_scale, slope = np.array(back) @ forward[:, 0]
        shear, log_scale = np.arctan(slope / row_scale), np.log(abs(row_scale))
        estimates.append([angle, shear, log_scale, *shift, row_scale < 0, column_scale < 0])
        assert abs(column_scale) == pytest.approx(abs(row_scale), rel=1e-3)
    *uniform, flipped_rows, flipped_columns = np.array(estimates).T
    bounds = *np.deg2rad([stated["rotation"], stated["shear"]]), np.log(1.25), 0.1, 0.1
    for values, bound in zip(uniform, bounds, strict=True):
        assert abs(values).max() <= bound * 1.001
        # uniform: the standard deviation of 400 values is within 4 standard errors
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(values.mean()) < 4 * bound / 3**0.5 / n**0.5
    assert abs(flipped_rows.mean() - 0.5) < 0.1 and abs(flipped_columns.mean() - 0.5) < 0.1
    # independent of each other
    assert abs(np.corrcoef(np.array(estimates).T) - np.eye(7)).max() < 0.25


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_random_colours_have_the_stated_ranges(name):
    image = jnp.asarray(smooth())
    unchanged = dict.fromkeys(["brightness", "contrast", "saturation", "hue"], 0.0)
    mask = jnp.zeros((200, *image.shape[:2], 1))
    changed, _ = augment.random_colour(
        jax.random.key(0),
        jnp.broadcast_to(image, (200, *image.shape)),
        mask,
        **unchanged | {name: 0.2},
    )
    # The change is linear in its factor.
    zero = np.asarray(augment.recolour(image, **{name: 0.0})).ravel()
    slope = np.asarray(image).ravel() - zero
    factors = (np.asarray(changed).reshape(200, -1) - zero) @ slope / (slope @ slope)
    np.testing.assert_allclose(
        np.asarray(changed).reshape(200, -1), zero + np.outer(factors, slope), atol=1e-5
    )
    assert abs(factors - 1).max() <= 0.2001
    assert factors.std() == pytest.approx(0.2 / 3**0.5, rel=0.15)


def test_random_hues_have_the_stated_range():
    image = jnp.full((200, 4, 4, 3), jnp.array([0.6, 0.4, 0.5]))
    unchanged = dict.fromkeys(["brightness", "contrast", "saturation"], 0.0)
    changed, _ = augment.random_colour(
        jax.random.key(0), image, image[..., :1], **unchanged, hue=10.0
    )
    red, green, blue = np.asarray(changed)[:, 0, 0].T

    def angle(red, green, blue):  # in the plane perpendicular to the grey axis
        return np.rad2deg(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue))

    rotation = angle(red, green, blue) - angle(0.6, 0.4, 0.5)
    assert abs(rotation).max() <= 10.001
    assert rotation.std() == pytest.approx(10 / 3**0.5, rel=0.15)


def test_random_tints_and_gammas_have_the_stated_ranges():
    colour = np.array([0.6, 0.4, 0.5])
    image = jnp.full((400, 4, 4, 3), colour)
    change = partial(augment.random_colour, brightness=0, contrast=0, saturation=0, hue=0)
    tinted, _ = change(jax.random.key(0), image, image, tint=0.2)
    factors = np.asarray(tinted)[:, 0, 0] / colour
    assert 0.19 < abs(factors - 1).max() <= 0.2001
    assert abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.25  # independent of each other
    curved, _ = change(jax.random.key(0), image, image, gamma=1.5)
    exponents = np.log(np.asarray(curved)[:, 0, 0]) / np.log(colour)
    np.testing.assert_allclose(exponents, exponents[:, :1].repeat(3, 1), rtol=1e-4)
    assert 0.37 < abs(np.log(exponents)).max() <= np.log(1.5) + 1e-4
    assert abs(np.log(exponents).mean()) < 0.06  # uniform in the logarithm
    white, _ = change(jax.random.key(0), jnp.ones((50, 4, 4, 3)), image, tint=0.2)
    assert white.max() == 1
    grey, _ = change(jax.random.key(0), image[..., :1], image, tint=0.2)
    np.testing.assert_allclose(grey, image[..., :1], rtol=1e-6)


def test_without_tint_and_gamma_colours_are_those_of_before():
    image, mask = images(1)
    changed, _ = augment.random_colour(jax.random.key(3), image, mask, hue=0.0, saturation=0.0)
    u = np.asarray(jax.random.uniform(jax.random.fold_in(jax.random.key(3), 0), (4,), minval=-1.0))
    bright = np.asarray(as_float(image[0])) * (1 + 0.2 * u[0])
    mean = (bright.mean((0, 1)) * LUMA).sum()
    expected = np.clip(mean + (1 + 0.2 * u[1]) * (bright - mean), 0, 1)
    np.testing.assert_allclose(changed[0], expected, atol=1e-5)


def test_light_is_smooth_and_shade_darkens_and_haze_brightens():
    image = jnp.full((200, 32, 48, 3), 0.5)
    shaded, _ = augment.random_light(jax.random.key(0), image, None, shade=0.5, haze=0.0)
    hazy, _ = augment.random_light(jax.random.key(0), image, None, shade=0.0, haze=0.3)
    loss, gain = 1 - np.asarray(shaded) / 0.5, (np.asarray(hazy) - 0.5) / 0.5
    for amount, most in ((loss, 0.5), (gain, 0.3)):
        assert amount.min() > -1e-6 and 0.6 * most < amount.max() <= most + 1e-6
        np.testing.assert_allclose(amount, amount[..., :1].repeat(3, -1), atol=1e-6)  # no colour
        assert 70 < (amount.max((1, 2, 3)) < 1e-6).sum() < 130  # about half
        steps = [abs(np.diff(amount, axis=axis)).max() for axis in (1, 2)]
        assert max(steps) < most / 5 and amount.std((1, 2, 3)).max() > most / 8
    both = (loss.max((1, 2, 3)) > 0) & (gain.max((1, 2, 3)) > 0)
    assert 25 < both.sum() < 75  # independent of each other


def test_a_share_is_a_sigma_for_any_size():
    image, mask = (jax.random.uniform(jax.random.key(i), (8, 20, 30, 3)) for i in range(2))
    by_share, _ = augment.random_blur(jax.random.key(0), image, mask, sigma=0.5, share=0.05)
    by_sigma, _ = augment.random_blur(jax.random.key(0), image, mask, sigma=1.5)
    np.testing.assert_array_equal(by_share, by_sigma)


def test_a_draw_of_zero_does_not_flip(monkeypatch):
    image, mask = images(1)
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
def test_brightness_contrast_and_saturation_equal_pillow(name, enhance, factor):
    image = (255 * smooth()).astype(np.uint8)
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor), np.float32)
    result = 255 * np.asarray(augment.recolour(image / jnp.float32(255), **{name: factor}))
    assert abs(result - expected).max() < 1.6  # Pillow rounds the grey, then truncates


def test_hue_rotates_the_colours_about_the_grey_axis():
    image = jnp.asarray(smooth())
    rotated = augment.recolour(image, hue=120)
    np.testing.assert_allclose(rotated, jnp.roll(image, 1, axis=-1), atol=1e-6)
    axis = np.deg2rad(25) * np.ones(3) / np.sqrt(3)
    expected = Rotation.from_rotvec(axis).apply(np.asarray(image).reshape(-1, 3))
    result = augment.recolour(image, hue=25)
    np.testing.assert_allclose(result.reshape(-1, 3), expected.clip(0, 1), atol=1e-6)


def test_colours_change_in_the_stated_order():
    changes = {"brightness": 0.9, "contrast": 1.2, "saturation": 0.7, "hue": 20.0}
    image = expected = jnp.asarray(smooth())
    for name, value in changes.items():
        expected = augment.recolour(expected, **{name: value})
    assert 0 < expected.min() and expected.max() < 1  # no step clipped anything
    np.testing.assert_allclose(augment.recolour(image, **changes), expected, atol=1e-5)


def test_colours_stay_in_their_range_and_the_mask_is_unchanged():
    image, mask = images(16, (16, 16))
    changed, same = augment.random_colour(
        jax.random.key(0), image, mask, brightness=0.9, contrast=0.9
    )
    np.testing.assert_array_equal(same, mask)
    assert changed.dtype == jnp.float32 and changed.min() == 0 and changed.max() == 1


def test_a_displaced_warp_equals_scipy():
    image = smooth()
    displacement = np.random.default_rng(0).normal(0, 2, (24, 32, 2)).astype(np.float32)
    matrix = augment.affine(rotation=20.0, scale=1.2)
    y, x = np.mgrid[:24, :32]
    centred = np.stack([y - 11.5, x - 15.5, np.ones((24, 32))])
    positions = np.einsum("ij,jhw->ihw", np.asarray(matrix, np.float64), centred)
    positions += np.array([11.5, 15.5])[:, None, None] + np.moveaxis(displacement, -1, 0)
    expected = [
        ndimage.map_coordinates(channel, positions, order=1, mode="grid-constant")
        for channel in np.moveaxis(image, -1, 0)
    ]
    warped = augment.warp(jnp.asarray(image), matrix, jnp.asarray(displacement))
    np.testing.assert_allclose(warped, np.stack(expected, -1), atol=2e-5)


def test_elastic_deformation_is_smooth_and_moves_image_and_mask_together():
    y, x = np.mgrid[:64, :64]
    disc = ((y - 31.5) ** 2 + (x - 31.5) ** 2 < 400)[None, ..., None].astype(np.uint8)
    image = (200 * disc.repeat(3, -1)).astype(np.uint8)
    no_affine = dict(rotation=0.0, scale=1.0, shear=0.0, shift=0.0)
    bent, mask = augment.random_affine(jax.random.key(0), image, disc, **no_affine, elastic=0.03)
    inside = np.asarray(bent)[..., :1] > 100 / 255
    assert (inside == np.asarray(mask)).mean() > 0.99
    assert 0.01 < (np.asarray(mask) != disc).mean() < 0.2
    _, n_components = ndimage.label(np.asarray(mask)[0, ..., 0])
    assert n_components == 1


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.5])
def test_blur_equals_scipys_gaussian(sigma):
    image = smooth()
    expected = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest", radius=3)
    np.testing.assert_allclose(
        augment.blur(jnp.asarray(image), sigma, radius=3), expected, atol=1e-5
    )
    np.testing.assert_array_equal(augment.blur(jnp.asarray(image), 0.0, radius=3), image)


def test_about_half_of_the_images_are_blurred_noisy_or_cut_and_no_mask_is():
    image, mask = (x.repeat(64, 0) for x in images(1, (16, 16)))
    original = np.asarray(as_float(image[0]))
    changes = augment.random_blur, augment.random_noise, augment.random_cutout
    for change in (*changes, partial(augment.random_light, haze=0.0), augment.random_jpeg):
        changed, same = change(jax.random.key(0), image, mask)
        assert same is mask
        n_unchanged = (np.asarray(changed) == original).all((1, 2, 3)).sum()
        assert 16 < n_unchanged < 48, change  # four standard deviations


def test_blocks_of_random_jpeg_start_anywhere_and_are_as_large_as_stated():
    image = np.tile(0.2 * smooth((64, 64))[..., :1], (32, 1, 1, 1))
    for share, side in ((8 / 64, 8), (4 / 64, 4), (0.0, 2)):
        # So coarse that a block has one value.
        coded, _ = augment.random_jpeg(jax.random.key(0), image, None, quality=0.01, share=share)
        edges = [abs(np.diff(x, axis=0)).max(1) > 1e-3 for x in np.asarray(coded)[..., 0]]
        starts = [set((np.flatnonzero(edge) + 1) % side) for edge in edges if not edge.all()]
        assert all(len(places) == 1 for places in starts)
        assert len(set.union(*starts)) > side / 2


def test_opposite_borders_do_not_mix_in_random_jpeg():
    image = jnp.asarray(smooth((32, 32))[None, ..., :1].repeat(32, 0))
    coded, same = (
        augment.random_jpeg(jax.random.key(0), x, None, share=8 / 32)[0]
        for x in (image, image.at[:, 16:].set(1.0).at[:, :, 16:].set(1.0))
    )
    np.testing.assert_array_equal(coded[:, :8, :8], same[:, :8, :8])
    assert (coded != image)[:, :8, :8].any()


@pytest.mark.parametrize("quality", [-1, 0, 51])
def test_a_quality_that_does_not_exist_is_refused(quality):
    with pytest.raises(ValueError, match="up to 50"):
        augment.random_jpeg(jax.random.key(0), *images(1), quality=quality)


def test_noise_has_the_stated_deviation_and_independent_channels():
    image = jnp.full((200, 32, 32, 3), 0.5)
    noisy, _ = augment.random_noise(jax.random.key(0), image, None, deviation=0.04)
    deviation = np.asarray(noisy - image).std((1, 2, 3))
    assert deviation.max() < 0.041 and deviation.max() > 0.035
    positive = deviation[deviation > 0]
    assert abs(positive.mean() - 0.02) < 0.006  # uniform from 0 to 0.04
    assert abs(float(noisy.mean()) - 0.5) < 1e-3
    grey = np.asarray(noisy - image).mean(-1).std((1, 2))  # mean of three independent ones
    np.testing.assert_allclose(grey[deviation > 0], positive / 3**0.5, rtol=0.1)


def test_a_cutout_is_one_rectangle_in_the_mean_colour():
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


def test_without_colours_brightness_and_contrast_change_as_in_grey():
    grey = smooth()[None, ..., :1]
    key, mask = jax.random.key(3), jnp.zeros((1, 24, 32, 1), jnp.uint8)
    expected, _ = augment.random_colour(key, grey.repeat(3, -1), mask, saturation=0, hue=0)
    changed, _ = augment.random_colour(key, grey, mask)
    assert changed.shape == grey.shape and abs(changed - grey).max() > 0.02
    np.testing.assert_allclose(changed, expected[..., :1], atol=1e-5)
    five, _ = augment.random_colour(
        key, np.concatenate([smooth(), grey[0], grey[0]], -1)[None], mask
    )
    assert five.shape == (1, 24, 32, 5)


def test_upright_images_are_flipped_left_to_right_only():
    ramp = jnp.broadcast_to(jnp.linspace(0.2, 1, 16)[None, :, None, None], (64, 16, 16, 1))
    across = ramp.swapaxes(1, 2)
    image, mask = jnp.concatenate([ramp, across], -1), jnp.zeros((64, 16, 16, 1), jnp.uint8)
    still = dict(rotation=0.0, scale=1.0, shear=0.0, shift=0.0)
    for upright in (False, True):
        moved, _ = augment.random_affine(jax.random.key(0), image, mask, upright=upright, **still)
        down = (moved[:, -1, :, 0] > moved[:, 0, :, 0]).all(1)
        right = (moved[:, :, -1, 1] > moved[:, :, 0, 1]).all(1)
        assert 16 < right.sum() < 48
        assert down.all() if upright else 16 < down.sum() < 48
