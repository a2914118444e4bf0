"""Decoding, converting and resizing of pictures."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import encode, rgb
from PIL import Image

from flax_unet import pictures
from flax_unet.pictures import DataError, open_picture, to_mask, to_rgb


def decoded_rgb(*picture):
    return np.asarray(to_rgb(open_picture(encode(*picture), "x")))


def test_a_picture_of_any_mode_becomes_rgb():
    colour = rgb()
    grey = colour[..., 0]
    np.testing.assert_array_equal(decoded_rgb(colour), colour)
    np.testing.assert_array_equal(decoded_rgb(grey), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(decoded_rgb(np.dstack([colour, grey])), colour)
    palette = Image.fromarray(colour).quantize(200)
    np.testing.assert_array_equal(decoded_rgb(palette), np.asarray(palette.convert("RGB")))
    black = np.zeros((4, 4, 4), np.uint8)  # no ink in any of the four channels is white
    cmyk = decoded_rgb(Image.fromarray(black, "CMYK"), "tiff")
    np.testing.assert_array_equal(cmyk, np.full((4, 4, 3), 255))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_grey_over_the_full_range_of_16_bits_is_rescaled(dtype):
    grey = np.arange(256, dtype=dtype).reshape(16, 16) * 257
    expected = np.stack([np.arange(256).reshape(16, 16)] * 3, -1)
    suffix = "png" if dtype is np.uint16 else "tiff"
    np.testing.assert_array_equal(decoded_rgb(grey, suffix), expected)
    between = np.array([[0, 128, 129, 65535]], dtype)  # 257 is one step: rounded to the nearest
    np.testing.assert_array_equal(decoded_rgb(between, suffix)[..., 0], [[0, 0, 1, 255]])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("values", [[0, 4095], [16, 255], [1, 1], [0, 32767]])
def test_grey_that_does_not_fill_16_bits_is_refused_with_its_range(dtype, values):
    picture = Image.fromarray(np.array([values], dtype))
    with pytest.raises(DataError, match=f"eye: .* are {values[0]} to {values[1]} of an unknown"):
        to_rgb(picture, "eye")


@pytest.mark.parametrize("values", [[-1, 40000], [0, 65536]])
def test_grey_beyond_16_bits_is_refused_with_its_range(values):
    picture = Image.fromarray(np.array([values], np.int32))
    with pytest.raises(DataError, match=f"eye: .* are {values[0]} to {values[1]} of an unknown"):
        to_rgb(picture, "eye")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_picture_of_zeros_is_black_in_every_type(dtype):
    black = np.asarray(to_rgb(Image.fromarray(np.zeros((2, 3), dtype))))
    np.testing.assert_array_equal(black, np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colours_are_refused_because_pillow_drops_half_of_their_bits(colour, channels):
    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)
    rows = (b"\0" + b"\0\xff" * 2 * channels) * 2
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    with pytest.raises(DataError, match="a.png: .*16-bit colours"):
        pictures.open_picture(png, "a.png")


def test_the_exif_orientation_is_applied():
    colour = rgb(size=(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    upright = open_picture(encode(colour, exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(colour, -1))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b"", "eye: not a readable picture .unknown format"),
        (b"GIF89a", "eye: not a readable picture"),
        (encode(rgb())[:-30], "eye: not a readable picture"),
    ],
)
def test_bytes_that_are_not_a_picture_are_named(broken, words):
    with pytest.raises(DataError, match=words):
        open_picture(broken, "eye")


def test_a_huge_picture_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 63)
    with pytest.raises(DataError, match="eye: .*8 x 8 pixels, more than 63"):
        open_picture(encode(rgb()), "eye")


@pytest.mark.parametrize(
    "values",
    [[0, 1], [0, 255], [1, 1], [0, 0], [255, 255], [3, 250]],
    ids=str,
)
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_masks_of_0_and_1_or_0_and_the_largest_value_are_read(values, mode):
    mask = np.array([values], np.uint8)
    picture = Image.fromarray(mask)
    if mode == "I;16":
        picture = Image.fromarray(mask.astype(np.uint16) * (257 if max(values) > 1 else 1))
    elif mode == "RGB":
        picture = picture.convert("RGB")
    expected = mask > 127 if max(values) > 1 else mask == 1
    np.testing.assert_array_equal(np.asarray(to_mask(picture, "m")) == 255, expected)


def test_a_palette_and_a_bilevel_mask_are_read():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    np.testing.assert_array_equal(np.asarray(to_mask(palette, "m")), [[0, 255]])
    bilevel = Image.fromarray(np.array([[False, True]]))
    np.testing.assert_array_equal(np.asarray(to_mask(bilevel, "m")), [[0, 255]])


@pytest.mark.parametrize(
    ("values", "words"),
    [([0, 128, 255], "128"), ([0, 1, 2], "0, 1, 2"), ([0, 76, 76], "76")],
)
def test_other_values_of_a_mask_are_refused_and_listed(values, words):
    with pytest.raises(DataError, match=f"mask polyp7: .*has {words}"):
        to_mask(Image.fromarray(np.array([values], np.uint8)), "mask polyp7")


def test_a_black_and_white_palette_is_read_by_its_colours():
    inverted = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(np.asarray(to_mask(inverted)), [[255, 0]])


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 100, 200, 300]], np.uint16),
        np.array([[0, 0.6]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[-1, 0, 1]], np.int32),
    ],
)
def test_other_values_of_16_bit_and_float_masks_are_refused(values):
    with pytest.raises(DataError, match="mask m: a mask must have"):
        to_mask(Image.fromarray(values), "mask m")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_mask_with_transparent_pixels_is_refused(mode):
    white = Image.new(mode, (2, 1), (255,) * len(mode))
    np.testing.assert_array_equal(np.asarray(to_mask(white, "m")), [[255, 255]])
    white.putpixel((0, 0), (255,) * (len(mode) - 1) + (0,))
    with pytest.raises(DataError, match="mask m: a mask must be opaque"):
        to_mask(white, "mask m")


def test_float_grey_is_read_from_0_to_1():
    grey = np.array([[0, 0.5, 1]], np.float32)
    np.testing.assert_array_equal(
        np.asarray(to_rgb(Image.fromarray(grey)))[..., 0], [[0, 128, 255]]
    )
    for bad in (2.0, -0.1, np.nan):
        with pytest.raises(DataError, match="eye: its float grey values must be in"):
            to_rgb(Image.fromarray(np.array([[bad]], np.float32)), "eye")


def test_a_picture_with_damaged_exif_is_named(monkeypatch):
    def broken(picture):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", broken)
    with pytest.raises(DataError, match="eye: not a readable picture"):
        open_picture(encode(rgb()), "eye")


def test_a_mask_is_resized_by_area():
    mask = np.random.default_rng(0).integers(0, 2, (12, 20), np.uint8)
    fraction = mask.reshape(4, 3, 5, 4).mean((1, 3))
    small = pictures.resize_mask(Image.fromarray(mask * np.uint8(255)), (4, 5))
    assert small.shape == (4, 5, 1) and small.dtype == np.uint8
    clear = abs(fraction - 0.5) > 0.01
    np.testing.assert_array_equal(small[..., 0][clear], (fraction > 0.5)[clear])


def test_an_image_is_resized_with_antialiasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[..., None].repeat(3, -1)
    small = pictures.resize_image(Image.fromarray(stripes), (16, 16))
    assert small.shape == (16, 16, 3)
    assert abs(small.astype(int) - 127.5).max() < 20  # without antialiasing: 0 or 255


def test_a_jpeg_mask_of_0_and_1_is_refused_because_it_may_be_noise():
    labels = np.zeros((16, 16), np.uint8)
    labels[4:12, 4:12] = 1
    for values in (labels, np.ones((16, 16), np.uint8)):
        saved = open_picture(encode(values, "jpeg", quality=100), "m")
        assert saved.format == "JPEG" and set(np.unique(saved)) <= {0, 1}
        with pytest.raises(DataError, match="mask m: a JPEG of 0 and 1 may .*: save masks as PNG"):
            to_mask(saved, "mask m")


def test_a_jpeg_mask_of_zeros_is_empty():
    mask = to_mask(open_picture(encode(np.zeros((16, 16), np.uint8), "jpeg"), "m"))
    assert not np.asarray(mask).any()


def test_a_jpeg_mask_of_0_and_255_is_read():
    disc = np.add.outer(np.arange(-16, 16) ** 2, np.arange(-16, 16) ** 2) < 100
    saved = open_picture(encode(disc * np.uint8(255), "jpeg", quality=95), "m")
    assert len(np.unique(saved)) > 2  # blurred edges
    np.testing.assert_array_equal(np.asarray(to_mask(saved)) == 255, disc)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_a_mask_of_0_and_1_in_a_lossless_format_is_read(suffix):
    labels = np.random.default_rng(0).integers(0, 2, (16, 16), np.uint8)
    mask = to_mask(open_picture(encode(labels, suffix), "m"))
    np.testing.assert_array_equal(np.asarray(mask), 255 * labels)


def test_probabilities_are_resized_per_channel_and_bilinearly():
    ramp = np.linspace(0, 1, 8, dtype=np.float32)
    proba = np.stack([np.tile(ramp, (4, 1)), np.tile(1 - ramp, (4, 1))], -1)
    large = pictures.resize_proba(proba, (8, 16))
    assert large.shape == (8, 16, 2) and large.dtype == np.float32
    np.testing.assert_allclose(large[..., 0] + large[..., 1], 1, atol=1e-6)
    # Pixel centres at twice the density, constant beyond the outermost.
    expected = np.interp(np.arange(16) / 2 - 0.25, np.arange(8), ramp)
    np.testing.assert_allclose(large[3, :, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(pictures.resize_proba(proba, (4, 8)), proba)


def test_as_float_accepts_uint8_and_float():
    image = jnp.array([[0, 51, 255]], jnp.uint8)
    np.testing.assert_allclose(pictures.as_float(image), [[0, 0.2, 1]])
    for dtype in (jnp.float32, jnp.bfloat16):
        same = pictures.as_float(jnp.array([0.0, 0.5, 1.0], dtype))
        assert same.dtype == jnp.float32
        np.testing.assert_array_equal(same, [0, 0.5, 1])
    for dtype in (jnp.int32, jnp.uint16, bool):
        with pytest.raises(ValueError, match="use uint8 in 0..255 or float"):
            jax.eval_shape(pictures.as_float, jnp.zeros(3, dtype))
