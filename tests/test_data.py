import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flax_unet import data
from flax_unet.data import Arrays, DataError, FolderSource


def encode(array, suffix="png", **options):
    stream = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(stream, suffix, **options)
    return stream.getvalue()


def rgb(seed=0, size=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def entry(image, mask, name="a"):
    return {"name": name, "image": encode(image), "mask": encode(mask)}


@pytest.fixture
def folders(tmp_path):
    """Twelve pairs: images/ as PNG, masks/ of 0 and 255."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(12):
        (tmp_path / "images" / f"p{i:02d}.png").write_bytes(encode(rgb(i)))
        mask = np.zeros((8, 8), np.uint8)
        mask[: 1 + i % 7] = 255
        (tmp_path / "masks" / f"p{i:02d}.png").write_bytes(encode(mask))
    return tmp_path / "images", tmp_path / "masks"


def to_rgb(picture):
    return np.asarray(data.to_rgb(data.open_picture(encode(*picture), "x")))


def test_pictures_of_every_mode_become_rgb():
    colour = rgb()
    grey = colour[..., 0]
    np.testing.assert_array_equal(to_rgb((colour,)), colour)
    np.testing.assert_array_equal(to_rgb((grey,)), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(to_rgb((np.dstack([colour, grey]),)), colour)
    palette = Image.fromarray(colour).quantize(200)
    np.testing.assert_array_equal(to_rgb((palette,)), np.asarray(palette.convert("RGB")))
    sixteen = (grey.astype(np.uint16) * 257,)
    np.testing.assert_array_equal(to_rgb(sixteen), np.stack([grey] * 3, -1))
    black = np.zeros((4, 4, 4), np.uint8)  # no ink in any of the four channels: white
    cmyk = to_rgb((Image.fromarray(black, "CMYK"), "tiff"))
    np.testing.assert_array_equal(cmyk, np.full((4, 4, 3), 255))


def test_a_rotated_picture_is_turned_upright():
    colour = rgb(size=(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    upright = data.open_picture(encode(colour, exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(colour, -1))


@pytest.mark.parametrize(
    ("broken", "words"),
    [(b"", "eye: not a picture"), (b"GIF89a", "eye: not a"), (encode(rgb())[:-30], "eye: not a")],
)
def test_what_is_no_picture_is_named(broken, words):
    with pytest.raises(DataError, match=words):
        data.open_picture(broken, "eye")


def test_a_huge_picture_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 63)
    with pytest.raises(DataError, match="eye: .*8 x 8 pixels are too many"):
        data.open_picture(encode(rgb()), "eye")


@pytest.mark.parametrize(
    "values",
    [[0, 1], [0, 255], [1, 1], [0, 0], [255, 255], [3, 250]],
    ids=str,
)
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_masks_of_one_or_255_are_read(values, mode):
    mask = np.array([values], np.uint8)
    picture = Image.fromarray(mask)
    if mode == "I;16":
        picture = Image.fromarray(mask.astype(np.uint16) * (257 if max(values) > 1 else 1))
    elif mode == "RGB":
        picture = picture.convert("RGB")
    expected = mask > 127 if max(values) > 1 else mask == 1
    np.testing.assert_array_equal(np.asarray(data.to_mask(picture, "m")) == 255, expected)


def test_a_palette_and_a_bilevel_mask_are_read():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    np.testing.assert_array_equal(np.asarray(data.to_mask(palette, "m")), [[0, 255]])
    bilevel = Image.fromarray(np.array([[False, True]]))
    np.testing.assert_array_equal(np.asarray(data.to_mask(bilevel, "m")), [[0, 255]])


@pytest.mark.parametrize(
    ("values", "words"),
    [([0, 128, 255], "128"), ([0, 1, 2], "0, 1, 2"), ([0, 76, 76], "76")],
)
def test_other_values_of_a_mask_are_listed(values, words):
    with pytest.raises(DataError, match=f"mask polyp7: .*has {words}"):
        data.to_mask(Image.fromarray(np.array([values], np.uint8)), "mask polyp7")


def test_a_black_and_white_palette_is_read_by_its_colours():
    inverted = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(np.asarray(data.to_mask(inverted)), [[255, 0]])


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 100, 200, 300]], np.uint16),
        np.array([[0, 0.6]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[-1, 0, 1]], np.int32),
    ],
)
def test_wide_masks_of_other_values_are_refused(values):
    with pytest.raises(DataError, match="mask m: a mask must have"):
        data.to_mask(Image.fromarray(values), "mask m")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_mask_that_is_drawn_in_transparency_is_refused(mode):
    white = Image.new(mode, (2, 1), (255,) * len(mode))
    np.testing.assert_array_equal(np.asarray(data.to_mask(white, "m")), [[255, 255]])
    white.putpixel((0, 0), (255,) * (len(mode) - 1) + (0,))
    with pytest.raises(DataError, match="mask m: a mask must be opaque"):
        data.to_mask(white, "mask m")


def test_float_pictures_are_read_from_0_to_1():
    grey = np.array([[0, 0.5, 1]], np.float32)
    np.testing.assert_array_equal(
        np.asarray(data.to_rgb(Image.fromarray(grey)))[..., 0], [[0, 128, 255]]
    )
    for bad in (2.0, -0.1, np.nan):
        with pytest.raises(DataError, match="eye: its grey values"):
            data.to_rgb(Image.fromarray(np.array([[bad]], np.float32)), "eye")


def test_a_picture_with_broken_exif_is_named(monkeypatch):
    def broken(picture):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(data.ImageOps, "exif_transpose", broken)
    with pytest.raises(DataError, match="eye: not a picture"):
        data.open_picture(encode(rgb()), "eye")


def test_a_mask_is_resized_by_area():
    mask = np.random.default_rng(0).integers(0, 2, (12, 20), np.uint8)
    share = mask.reshape(4, 3, 5, 4).mean((1, 3))
    small = data.resize_mask(Image.fromarray(mask * np.uint8(255)), (4, 5))
    assert small.shape == (4, 5, 1) and small.dtype == np.uint8
    sure = abs(share - 0.5) > 0.01
    np.testing.assert_array_equal(small[..., 0][sure], (share > 0.5)[sure])


def test_an_image_is_resized_with_antialiasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[..., None].repeat(3, -1)
    small = data.resize_image(Image.fromarray(stripes), (16, 16))
    assert small.shape == (16, 16, 3)
    assert abs(small.astype(int) - 127.5).max() < 20  # a nearest pixel would be 0 or 255


def test_load_keeps_names_and_pixels():
    masks = [np.eye(8, dtype=np.uint8), 255 * np.eye(8, dtype=np.uint8)[::-1]]
    arrays = data.load([entry(rgb(i), masks[i], f"n{i}") for i in range(2)], 8)
    np.testing.assert_array_equal(arrays.image, np.stack([rgb(0), rgb(1)]))
    np.testing.assert_array_equal(arrays.mask[..., 0], np.stack([np.eye(8), np.eye(8)[::-1]]))
    assert arrays.name == ["n0", "n1"]
    assert arrays.mask.dtype == arrays.image.dtype == np.uint8


def test_load_refuses_sizes_that_differ_and_emptiness():
    with pytest.raises(DataError, match="image a is .8, 8. pixels and its mask .6, 8."):
        data.load([entry(rgb(), np.zeros((8, 6), np.uint8))], 8)
    with pytest.raises(DataError, match="empty"):
        data.load([], 8)


def test_the_cache_gives_the_same_and_follows_content_and_size(tmp_path, monkeypatch):
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(3)]
    first = data.load(source, 4, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    data.load(source, 8, cache=tmp_path)
    data.load(source[:2], 4, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(data, "decode_pair", None)  # the second time nothing is decoded
    again = data.load(source, 4, cache=tmp_path)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_truncated_cache_is_made_anew(tmp_path):
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(3)]
    first = data.load(source, 8, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:200], b"", whole[:-100]):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(data.load(source, 8, cache=tmp_path).image, first.image)
        assert len(file.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_is_only_warned_of(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        arrays = data.load([entry(rgb(), np.eye(8, dtype=np.uint8))], 8, cache=tmp_path / "file")
    assert len(arrays.image) == 1


def test_a_cache_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="not kept for next time: no space left"):
        data.load([entry(rgb(), np.eye(8, dtype=np.uint8))], 8, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_names_images_and_masks():
    base = entry(rgb(), np.eye(8, dtype=np.uint8))
    changed = [base | {"name": "b"}, base | {"image": b"x"}, base | {"mask": b"x"}]
    assert len({data.fingerprint([e]) for e in [base, *changed]}) == 4
    assert data.fingerprint([base]) == data.fingerprint([dict(base)])


def test_a_folder_is_paired_by_stem_and_split_for_good(folders):
    images, masks = folders
    (images / "p03.png").rename(images / "p03.JPG")  # another suffix, the same stem
    (images / "notes.txt").write_text("not a picture")
    (images / ".hidden.png").write_text("not a picture")
    (images / "folder.png").mkdir()
    everything = FolderSource(images, masks)
    assert [e["name"] for e in everything] == [f"p{i:02d}" for i in range(12)]
    assert everything[3]["mask"] == (masks / "p03.png").read_bytes()
    parts = {s: {e["name"] for e in FolderSource(images, masks, s)} for s in data.SPLITS}
    assert set.union(*parts.values()) == {e["name"] for e in everything}
    assert sum(map(len, parts.values())) == 12
    (images / "p05.png").unlink(), (masks / "p05.png").unlink()
    for split in data.SPLITS:
        assert {e["name"] for e in FolderSource(images, masks, split)} == parts[split] - {"p05"}


def test_the_splits_are_about_80_10_10():
    found = [data._split_of(f"picture-{i}") for i in range(5000)]
    for split, share in zip(data.SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(found.count(split) / 5000 - share) < 0.02


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda i, m: (m / "p04.png").unlink(), "'p04' is only in .*images"),
        (lambda i, m: (i / "p04.png").unlink(), "'p04' is only in .*masks"),
        (lambda i, m: (i / "p04.bmp").write_bytes(b""), "p04.* have one stem"),
        (lambda i, m: [f.unlink() for f in [*i.iterdir(), *m.iterdir()]], "has no pictures"),
        (lambda i, m: i.rename(i.with_name("elsewhere")), "images is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_paired_is_named(folders, spoil, words):
    spoil(*folders)
    with pytest.raises(DataError, match=words):
        FolderSource(*folders)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_a_file_of_a_folder_that_cannot_be_used_is_named(folders, part):
    bad = folders[0].with_name(part) / "p04.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"{bad}: not a picture.*of no known format"):
        data.load(FolderSource(*folders), 8)


def test_a_folder_works_where_tfds_is_not_installed(folders):
    program = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from flax_unet import data, predict, train\n"
        "arrays = data.load(data.FolderSource(*sys.argv[1:]), 8)\n"
        "print(arrays.image.shape)"
    )
    command = [sys.executable, "-c", program, *map(str, folders)]
    assert subprocess.check_output(command, text=True).strip() == "(12, 8, 8, 3)"


def test_batches_have_one_shape_and_the_filling_no_weight():
    arrays = Arrays(np.arange(7 * 3).reshape(7, 1, 1, 3), np.arange(7).reshape(7, 1, 1, 1), [], "")
    order = np.array([6, 5, 4, 3, 2, 1, 0])
    dealt = list(data.batches(arrays, 4, order))
    assert [b["image"].shape for b in dealt] == [(4, 1, 1, 3)] * 2
    np.testing.assert_array_equal(dealt[1]["weight"], [1, 1, 1, 0])
    seen = np.concatenate([b["mask"][b["weight"] > 0].ravel() for b in dealt])
    np.testing.assert_array_equal(seen, order)
    assert [len(b["mask"]) for b in data.batches(arrays, 16)] == [16]


def test_arrays_on_a_device_are_dealt_out_by_index():
    arrays = Arrays(np.arange(7 * 3).reshape(7, 1, 1, 3), np.arange(7).reshape(7, 1, 1, 1), [], "")
    order, resident = np.array([6, 5, 4, 3, 2, 1, 0]), data.to_device(arrays)
    pairs = zip(data.batches(arrays, 4, order), data.batches(resident, 4, order), strict=True)
    for batch, held in pairs:
        assert held["image"] is resident.image and held["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"], held["image"][held["index"]])
        np.testing.assert_array_equal(batch["mask"], held["mask"][held["index"]])
        np.testing.assert_array_equal(batch["weight"], held["weight"])


def test_a_stream_deals_out_what_arrays_in_memory_do():
    pytest.importorskip("grain")
    masks = [np.eye(12, dtype=np.uint8)[::flip] for flip in (1, -1)]
    source = [entry(rgb(i, (12, 12)), masks[i % 2], f"n{i}") for i in range(30)]
    order = data.shuffled(30, 0, 0)
    size = 8, 6
    arrays = data.load(source, size)
    pairs = zip(data.stream(source, size, 4, order), data.batches(arrays, 4, order), strict=True)
    for streamed, dealt in pairs:
        assert streamed.keys() == dealt.keys()
        for key in dealt:
            np.testing.assert_array_equal(streamed[key], dealt[key])
            assert streamed[key].dtype == dealt[key].dtype


def test_a_broken_picture_in_a_stream_is_named():
    pytest.importorskip("grain")
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(4)]
    source[2] = source[2] | {"image": b"no picture"}
    with pytest.raises(DataError, match="image n2: not a picture"):
        list(data.stream(source, 8, 2))


def test_the_order_follows_seed_and_epoch_alone():
    a, b = data.shuffled(100, 1, 2), data.shuffled(100, 1, 2)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.sort(a), np.arange(100))
    assert (a != data.shuffled(100, 1, 3)).any() and (a != data.shuffled(100, 2, 2)).any()
    np.testing.assert_array_equal(a[:5], [0, 8, 1, 28, 26])  # a run must not change its order
