"""Decoding, converting and resizing of pictures."""

import io
import os
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import encode, rgb
from PIL import Image

from flax_unet import pictures
from flax_unet.pictures import DataError, open_content, open_picture


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
        (b"", "eye: not a readable picture .unknown format: use BMP, GIF, JPEG"),
        # A format of Pillow's that starts another program, Ghostscript.
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "eye: .*unknown format",
        ),
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


def test_a_file_that_is_no_file_or_too_large_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (("pipe.png", "not a file"), ("gone.png", "No such file or directory.$")):
        with pytest.raises(DataError, match=f"pipe: not a readable picture .{words}"):
            open_picture(tmp_path / name, "pipe")
    (tmp_path / "eye.png").write_bytes(encode(rgb()))
    assert open_picture(tmp_path / "eye.png", "eye").size == (8, 8)
    monkeypatch.setattr(pictures, "MAX_BYTES", 20)
    with pytest.raises(DataError, match="eye: .* bytes, more than 20: make it smaller"):
        open_picture(tmp_path / "eye.png", "eye")


def test_a_picture_with_damaged_exif_is_named(monkeypatch):
    def broken(picture):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", broken)
    with pytest.raises(DataError, match="eye: not a readable picture"):
        open_picture(encode(rgb()), "eye")


def test_a_mask_is_resized_by_area():
    mask = np.random.default_rng(0).integers(0, 2, (12, 20), np.uint8)
    fraction = mask.reshape(4, 3, 5, 4).mean((1, 3))
    small = pictures.resize_mask(mask[..., None], (4, 5))
    assert small.shape == (4, 5, 1) and small.dtype == np.uint8
    clear = abs(fraction - 0.5) > 0.01
    np.testing.assert_array_equal(small[..., 0][clear], (fraction > 0.5)[clear])


def test_a_pixel_of_a_resized_mask_has_the_class_that_covers_most_of_it():
    rng = np.random.default_rng(1)
    mask = rng.choice(np.array([0, 1, 4, 255], np.uint8), (12, 20))
    small = pictures.resize_mask(mask[..., None], (4, 5))
    for i, j in np.ndindex(4, 5):
        square = mask[3 * i : 3 * i + 3, 4 * j : 4 * j + 4]
        number = np.bincount(square.ravel(), minlength=256)
        assert number[small[i, j, 0]] == number.max()
    both = np.stack([mask, mask[::-1]], -1)
    np.testing.assert_array_equal(pictures.resize_mask(both, (12, 20)), both)


@pytest.mark.parametrize(("kind", "pages"), [("tiff", 3), ("gif", 2), ("webp", 2), ("png", 2)])
def test_a_picture_of_several_pages_or_frames_is_refused(kind, pages):
    frames = [Image.fromarray(rgb(i)) for i in range(pages)]
    several = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=f"stack: .*{pages} (pages|frames): save each one"):
        open_picture(several, "stack")


def test_an_image_is_resized_with_antialiasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[..., None].repeat(3, -1)
    small = pictures.resize_image(stripes, (16, 16))
    assert small.shape == (16, 16, 3)
    assert abs(small.astype(int) - 127.5).max() < 20  # without antialiasing: 0 or 255


def test_colours_and_single_channels_are_resized_alike():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 5), np.uint8)
    small = pictures.resize_image(image, (10, 12))
    assert small.shape == (10, 12, 5) and small.dtype == np.uint8
    np.testing.assert_array_equal(small[..., :3], pictures.resize_image(image[..., :3], (10, 12)))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.array([[0, 7], [255, 3]], np.uint8), "L"),
        (np.array([[0, 7], [65535, 3]], np.uint16), "I;16"),
        (np.array([[-5, 7], [2**31 - 1, 3]], np.int64), "I"),
        (np.array([[0.5, -7], [1e6, 3]], np.float64), "F"),
        (np.array([[0.5, -7], [1e6, 3]], np.float32), "F"),
        (np.array([[True, False], [False, False]]), "1"),
    ],
)
def test_an_array_file_of_one_channel_is_a_picture(array, mode):
    for content in (array, array[..., None]):
        picture = open_picture(npy(content), "a.npy")
        assert picture.mode == mode
        np.testing.assert_array_equal(np.asarray(picture), array)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(np.zeros((2, 2, 2, 2))), r"a.npy: .*its shape is \(2, 2, 2, 2\)"),
        (npy(np.zeros((0, 3))), r"its shape is \(0, 3\)"),
        (npy(np.zeros((2, 2), complex)), "its type is complex128"),
        (npy(np.array([[{}]])), "its type is object"),
        (npy(np.full((2, 2), 2**40)), "its values reach 1099511627776"),
        (npy(np.zeros((9, 9)))[:-8], "a.npy: not a readable picture"),
    ],
)
def test_an_array_file_that_is_no_picture_is_refused(content, words):
    with pytest.raises(DataError, match=words):
        open_content(content, "a.npy")


def test_an_array_file_is_refused_by_its_header_before_memory_is_allocated():
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match="1000000 x 1000000 pixels, more than"):
        open_content(file.getvalue(), "a.npy")


def test_an_array_file_of_several_channels_is_no_mask():
    with pytest.raises(DataError, match=r"a.npy: its shape is \(2, 3, 4\): it must be \[H, W\]"):
        open_picture(npy(np.zeros((2, 3, 4))), "a.npy")


def test_floats_are_resized_per_channel_and_bilinearly():
    ramp = np.linspace(0, 1, 8, dtype=np.float32)
    proba = np.stack([np.tile(ramp, (4, 1)), np.tile(1 - ramp, (4, 1))], -1)
    large = pictures.resize_image(proba, (8, 16))
    assert large.shape == (8, 16, 2) and large.dtype == np.float32
    np.testing.assert_allclose(large[..., 0] + large[..., 1], 1, atol=1e-6)
    # Pixel centres at twice the density, constant beyond the outermost.
    expected = np.interp(np.arange(16) / 2 - 0.25, np.arange(8), ramp)
    np.testing.assert_allclose(large[3, :, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(pictures.resize_image(proba, (4, 8)), proba)


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
