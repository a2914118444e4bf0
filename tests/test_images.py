"""Channels and the range of values of pictures."""

import io
import zlib
from dataclasses import replace

import numpy as np
import pytest
from drawn import encode, rgb
from PIL import Image

from flax_unet import formats, images, pictures
from flax_unet.images import RGB, ImageFormat
from flax_unet.pictures import DataError, open_content, open_picture, resize_image

GREY = ImageFormat(channels=1)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(*pages):
    first, *others = (Image.fromarray(page) for page in pages)
    return encode(first, "tiff", save_all=True, append_images=others)


def source(*files):
    return [
        {"name": f"p{i}", "image": x if isinstance(x, bytes) else encode(x, "tiff")}
        for i, x in enumerate(files)
    ]


def read(file, image_format=RGB):
    return images.read(open_content(file, "eye"), image_format, "eye")


def test_a_picture_of_any_mode_becomes_rgb():
    colour = rgb()
    grey = colour[..., 0]
    np.testing.assert_array_equal(read(encode(colour)), colour)
    np.testing.assert_array_equal(read(encode(grey)), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(read(encode(np.dstack([colour, grey]))), colour)
    palette = Image.fromarray(colour).quantize(200)
    np.testing.assert_array_equal(read(encode(palette)), np.asarray(palette.convert("RGB")))
    black = np.zeros((4, 4, 4), np.uint8)  # no ink in any of the four channels is white
    cmyk = read(encode(Image.fromarray(black, "CMYK"), "tiff"))
    np.testing.assert_array_equal(cmyk, np.full((4, 4, 3), 255))
    bits = read(encode(Image.fromarray(grey > 100)))
    np.testing.assert_array_equal(bits[..., 1], np.where(grey > 100, 255, 0))


def test_grey_pictures_have_one_channel_and_their_own_values():
    grey = rgb()[..., 0]
    found = images.find(source(grey, grey // 2))
    assert found == GREY
    np.testing.assert_array_equal(read(encode(grey), found), grey[..., None])
    # Three equal channels are grey, too.
    np.testing.assert_array_equal(read(encode(np.dstack([grey] * 3)), found), grey[..., None])
    with pytest.raises(DataError, match="eye: it has 3 channels, and the images should have 1"):
        read(encode(rgb()), found)


def test_grey_and_coloured_pictures_together_have_three_channels():
    assert images.find(source(rgb()[..., 0], rgb())) == ImageFormat(channels=3)


def test_colours_become_grey_if_that_is_declared():
    declared = images.find(source(rgb()), channels=1)
    luma = (rgb() * [0.299, 0.587, 0.114]).sum(-1)
    np.testing.assert_allclose(read(encode(rgb()), declared)[..., 0], luma, atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_a_choice(mode):
    rgba = np.dstack([rgb(), rgb()[..., 0]])
    picture = Image.fromarray(rgba)
    if mode == "P":  # one of the colours is transparent
        picture = Image.fromarray(rgb()).quantize(16)
        picture.info["transparency"] = 3
        file = encode(picture, transparency=3)
    else:
        file = encode(picture.convert(mode))
    found = images.find(source(file))
    assert found.channels == (1 if mode == "LA" else 3)
    with pytest.raises(
        DataError, match="eye: it has transparent pixels: .*train with --channels 3, which reads"
    ):
        read(file, found)
    dropped = read(file, images.find(source(file), channels=3))
    expected = np.asarray(open_content(file, "x").convert("RGBA"))
    np.testing.assert_array_equal(dropped, expected[..., :3])
    kept = read(file, images.find(source(file), channels=4))
    np.testing.assert_array_equal(kept, expected)


def test_opaque_alpha_needs_no_choice():
    opaque = np.dstack([rgb(), np.full(rgb().shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(read(encode(opaque), ImageFormat()), rgb())


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_the_range_of_more_than_8_bits_is_measured_once_over_all_pictures(dtype):
    rng = np.random.default_rng(0)
    first = rng.uniform(400, 1200, (50, 60)).astype(dtype)
    second = rng.uniform(800, 1600, (50, 60)).astype(dtype)
    second[0, 0] = 60000  # a hot pixel
    found = images.find(source(first, second))
    assert found.kind == ("floats" if dtype is np.float32 else "integers")
    assert found.channels == 1 and not found.convert
    np.testing.assert_allclose((found.low[0], found.high[0]), (400, 1600), atol=3)
    low, high = np.percentile(first, 0.1), np.percentile(second, 99.9)
    image = read(encode(second, "tiff"), found)
    assert image.shape == (50, 60, 1) and image.dtype == np.float32
    expected = np.clip((second.astype(float) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(image[..., 0], expected, atol=1e-6)
    assert len(np.unique(image)) > 500  # not 256 levels


def test_the_range_of_each_channel_is_its_own():
    rng = np.random.default_rng(0)
    low, high = np.array([0, -50, 1000.0, 5, 5]), np.array([1, 50, 3000.0, 6, 5.5])
    array = rng.uniform(low, high, (70, 80, 5)).astype(np.float32)
    found = images.find(source(npy(array)))
    np.testing.assert_allclose(found.low, np.percentile(array, 0.1, axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.high, np.percentile(array, 99.9, axis=(0, 1)), rtol=1e-6)
    image = read(npy(array), found)
    assert image.shape == (70, 80, 5)
    np.testing.assert_allclose(image.mean((0, 1)), 0.5, atol=0.02)
    array[..., 4] = 7
    with pytest.raises(DataError, match="channel 4 of all training pictures is 7: .*--value-range"):
        images.find(source(npy(array)))


def test_a_declared_range_is_used_for_its_kind_of_values_alone():
    grey = np.array([[0, 2000, 4095, 5000]], np.uint16)
    declared = images.find(source(grey), value_range=(0, 4095))
    np.testing.assert_allclose(read(encode(grey), declared)[0, :, 0], [0, 2000 / 4095, 1, 1])
    with pytest.raises(DataError, match="eye: its values are 8 bits"):  # would be nearly black
        read(encode(np.array([[255]], np.uint8)), declared)
    bytes_declared = images.find(source(grey.astype(np.uint8)), value_range=(0, 51))
    np.testing.assert_allclose(read(encode(np.array([[17]], np.uint8)), bytes_declared), 1 / 3)
    pairs = images.find(source(npy(np.zeros((2, 2, 2)))), value_range=(0, 1, 10, 20))
    np.testing.assert_allclose(read(npy(np.full((1, 1, 2), 0.5)), pairs)[0, 0], [0.5, 0])


def test_a_picture_that_becomes_white_gives_a_warning():
    rng = np.random.default_rng(0)
    found = images.find(source(npy(rng.uniform(0, 1, (50, 60)).astype(np.float32))))
    dark, bright, other = np.zeros((2, 2)), np.ones((2, 2)), rng.uniform(0, 255, (50, 60))
    read(npy(dark.astype(np.float32)), found)
    read(npy(bright.astype(np.float32)), found)
    with pytest.warns(UserWarning, match="more than half of it becomes white.*--value-range"):
        read(npy(other.astype(np.float32)), found)
    declared = replace(found, kind=None, low=(0.0,), high=(255.0,))
    read(npy(other.astype(np.float32)), declared)


def test_percentiles_scale_each_picture_by_itself():
    rng = np.random.default_rng(0)
    found = images.find(source(rng.integers(0, 9, (4, 4)).astype(np.uint16)), percentiles=(1, 99))
    for scale in (10, 3000):
        grey = rng.uniform(scale, 3 * scale, (64, 64)).astype(np.float32)
        low, high = np.percentile(grey, [1, 99])
        image = read(encode(grey, "tiff"), found)
        expected = np.clip((grey - low) / (high - low), 0, 1)
        np.testing.assert_allclose(image[..., 0], expected, atol=1e-5)


def test_percentiles_are_those_of_each_channel():
    array = np.stack([np.linspace(0, 1, 400), np.linspace(50, 90, 400)], -1).reshape(20, 20, 2)
    found = images.find(source(npy(array)), percentiles=(0, 100))
    image = read(npy(array), found)
    assert (image.min((0, 1)) == 0).all() and (image.max((0, 1)) == 1).all()


def test_a_later_page_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    small, large = np.zeros((1, 1), np.uint8), np.zeros((30, 20), np.uint8)
    with pytest.raises(DataError, match="20 x 30 x 2 pixels, more than 1,000"):
        open_content(tiff(small, large), "eye")


def test_pages_are_channels_if_that_is_declared():
    pages = [rgb(seed)[..., 0].astype(np.uint16) * 16 for seed in range(5)]
    with pytest.raises(DataError, match="p0: it has 5 pages: --channels 5 reads them as channels"):
        images.find(source(tiff(*pages)))
    found = images.find(source(tiff(*pages)), channels=5, value_range=(0, 4080))
    np.testing.assert_allclose(read(tiff(*pages), found), np.stack(pages, -1) / 4080, rtol=1e-6)
    with pytest.raises(DataError, match="eye: 3 pages: save each one"):  # not as red, green, blue
        read(tiff(*pages[:3]), RGB)
    with pytest.raises(DataError, match="eye: it has 4 channels, and the images should have 5"):
        read(tiff(*pages[:4]), found)
    with pytest.raises(DataError, match="eye: its pages have colours or several sizes"):
        read(tiff(rgb(), rgb()), replace(found, channels=2))


WIDE = np.full((4, 4), 300, np.uint16)
STACK = np.arange(48, dtype=np.uint16).reshape(4, 4, 3)


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        ((WIDE, WIDE.astype(np.float32)), {}, "kind: .*p0 has integers and .*p1 floats"),
        (
            (WIDE, WIDE.astype(np.uint8)),
            {},
            "p0 has integers and .*p1 8 bits: convert some, or .*--percent",
        ),
        ((npy(np.zeros((4, 4, 5))), WIDE), {}, "channels: .*p0 has 5 and .*p1 1"),
        ((tiff(WIDE, WIDE), WIDE), {"channels": 2}, "pages: .*p0 has True and .*p1 False"),
        ((tiff(WIDE, WIDE, WIDE), rgb()), {"channels": 3}, "pages: .*p0 has True and .*p1 False"),
        ((npy(STACK),), {"channels": 1}, "p0: it has 3 channels, and not 1"),
        ((), {}, "there are no training pictures"),
        ((np.full((4, 4), np.inf, np.float32),), {}, "p0: it has values that are not finite"),
        ((WIDE,), {"channels": 0}, "--channels 0: it must be positive"),
        ((WIDE,), {"value_range": (1,)}, "--value-range 1: give LOW HIGH"),
        ((WIDE,), {"value_range": (5, 5)}, "--value-range 5 5: give LOW HIGH"),
        ((WIDE,), {"value_range": (0, 1, 0, 1)}, "there are 2 ranges for 1 channels"),
        ((WIDE,), {"percentiles": (99, 1)}, "--percentiles 99 1: use two such as 1 99"),
        ((WIDE,), {"percentiles": (1, 99), "value_range": (0, 1)}, "give only one of"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(files, flags, words):
    with pytest.raises(DataError, match=words):
        images.find(source(*files), **flags)


def test_a_picture_that_contradicts_the_format_is_refused_with_the_flag():
    with pytest.raises(DataError, match="eye: its values are integers .300 to 300.*--value-range"):
        read(encode(WIDE), RGB)
    measured = images.find(source(WIDE + np.arange(4, dtype=np.uint16)))
    with pytest.raises(DataError, match="eye: its values are 8 bits.*--value-range"):
        read(encode(WIDE.astype(np.uint8)), measured)
    floats = images.find(source(np.eye(4, dtype=np.float32)))
    with pytest.raises(DataError, match="eye: it has values that are not finite"):
        read(encode(np.full((2, 2), np.nan, np.float32), "tiff"), floats)


def test_wide_grey_with_a_transparent_value_is_refused():
    png = bytearray(encode(WIDE))
    chunk = b"tRNS" + (300).to_bytes(2, "big")
    where = png.index(b"IDAT") - 4
    png[where:where] = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    with pytest.raises(DataError, match="eye: it has 16 bits and a transparent grey"):
        read(bytes(png), ImageFormat(1, None))
    with pytest.raises(DataError, match="mask: it has 16 bits and a transparent grey"):
        formats.read(open_picture(bytes(png), "mask"), formats.MaskFormat(values=((300, 1),)))


def test_wide_grey_and_wide_colours_together_have_three_ranges():
    found = images.find(source(npy(STACK), WIDE))
    assert found.channels == 3 and len(found.low) == len(found.high) == 3
    assert min(found.high) == 300
    np.testing.assert_allclose(read(encode(WIDE), found), np.ones((4, 4, 3)), rtol=1e-6)


def test_doubles_keep_their_precision_until_they_are_scaled():
    fine = 1e6 + np.arange(64).reshape(8, 8) * 1e-5
    found = images.find(source(npy(fine)), value_range=(1e6, 1e6 + 64e-5))
    assert found.channels == 1
    np.testing.assert_allclose(
        read(npy(fine), found)[..., 0], np.arange(64).reshape(8, 8) / 64, atol=1e-4
    )
    assert read(npy(fine), replace(found, channels=3, convert=True)).shape == (8, 8, 3)


def test_an_array_of_bits_is_black_and_white():
    bits = np.array([[[True, False, True]]])
    np.testing.assert_array_equal(read(npy(bits)), [[[255, 0, 255]]])
    np.testing.assert_array_equal(read(npy(bits[..., 0])), [[[255, 255, 255]]])


def test_pages_with_a_palette_are_refused():
    page = Image.fromarray(rgb()).quantize(8)
    several = encode(page, "tiff", save_all=True, append_images=[page])
    with pytest.raises(DataError, match="its pages have colours or several sizes"):
        images.find(source(several), channels=2)


def test_a_format_survives_json():
    for each in (RGB, GREY, ImageFormat(2, None, (0.5, 1), (2, 3), (1.0, 99.0), True, True)):
        assert images.from_json(images.to_json(each)) == each


def test_the_usual_pictures_are_resized_like_all_others():
    colour = rgb(size=(30, 40))
    expected = resize_image(colour, (12, 16))
    np.testing.assert_array_equal(read(encode(colour)), colour)
    for picture in (colour, np.dstack([colour, np.full((30, 40), 255, np.uint8)])):
        content = open_content(encode(picture), "eye")
        np.testing.assert_array_equal(images.read(content, size=(12, 16)), expected)
