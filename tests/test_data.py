"""Data sets in memory, folders of pictures, batches and streams."""

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from drawn import encode, rgb
from PIL import Image

from flax_unet import data, images
from flax_unet.data import Arrays, FolderSource
from flax_unet.formats import BINARY, MaskFormat
from flax_unet.images import RGB
from flax_unet.pictures import DataError


def entry(image, mask, name="a"):
    return {"name": name, "image": encode(image), "mask": encode(mask)}


@pytest.fixture
def folders(tmp_path):
    """Twelve pairs of PNG files; the masks have the values 0 and 255."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(12):
        (tmp_path / "images" / f"p{i:02d}.png").write_bytes(encode(rgb(i)))
        mask = np.zeros((8, 8), np.uint8)
        mask[: 1 + i % 7] = 255
        (tmp_path / "masks" / f"p{i:02d}.png").write_bytes(encode(mask))
    return tmp_path / "images", tmp_path / "masks"


def test_load_returns_names_and_pixels():
    masks = [255 * np.eye(8, dtype=np.uint8), 255 * np.eye(8, dtype=np.uint8)[::-1]]
    arrays = data.load([entry(rgb(i), masks[i], f"n{i}") for i in range(2)], 8)
    np.testing.assert_array_equal(arrays.image, np.stack([rgb(0), rgb(1)]))
    np.testing.assert_array_equal(arrays.mask[..., 0], np.stack([np.eye(8), np.eye(8)[::-1]]))
    assert arrays.name == ["n0", "n1"]
    assert arrays.mask.dtype == arrays.image.dtype == np.uint8


def test_load_refuses_masks_of_another_size_and_empty_sources():
    with pytest.raises(DataError, match="image a is 8x8 but mask a is 6x8: make them the same"):
        data.load([entry(rgb(), np.eye(8, 6, dtype=np.uint8))], 8)
    with pytest.raises(DataError, match="the source has no examples"):
        data.load([], 8)


def test_the_cache_returns_the_same_arrays_and_depends_on_content_and_size(tmp_path, monkeypatch):
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(3)]
    first = data.load(source, 4, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    data.load(source, 8, cache=tmp_path)
    data.load(source[:2], 4, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(data, "decode_pair", None)  # nothing is decoded the second time
    again = data.load(source, 4, cache=tmp_path)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif", "webp", "bmp", "npy"])
def test_every_kind_of_file_is_an_image_and_a_mask(tmp_path, suffix):
    y, x = np.mgrid[:32, :48]
    disc = (y - 16) ** 2 + (x - 20) ** 2 < 90
    grey = np.where(disc, 200, 40).astype(np.uint8)
    for part, array in {"images": grey, "masks": disc * np.uint8(255)}.items():
        (tmp_path / part).mkdir()
        file = tmp_path / part / f"0.{suffix}"
        if suffix == "npy":
            np.save(file, array)
        else:
            options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}
            Image.fromarray(array).save(file, **options.get(suffix, {}))
    arrays = data.load(FolderSource(tmp_path / "images", tmp_path / "masks"), (32, 48))
    np.testing.assert_array_equal(arrays.mask[0, ..., 0], disc)
    tolerance = 12 if suffix == "jpg" else 0
    np.testing.assert_allclose(arrays.image[0, ..., 0].astype(int), grey, atol=tolerance)
    assert len({*arrays.image[0, 16, 20].tolist()}) == 1  # grey, in however many channels


def test_the_cache_depends_on_what_pictures_and_masks_mean(tmp_path):
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(3)]
    grey = images.find(source, channels=1)
    flipped = MaskFormat(values=((0, 1), (1, 0)))
    for formats in ((BINARY, RGB), (BINARY, grey), (flipped, RGB)):
        cached = data.load(source, 8, *formats, cache=tmp_path)
        fresh = data.load(source, 8, *formats)
        np.testing.assert_array_equal(cached.image, fresh.image)
        np.testing.assert_array_equal(cached.mask, fresh.mask)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_fingerprint_of_separate_masks_has_their_classes_and_bounds():
    def fingerprint(*masks):
        return data.fingerprint([{"name": "a", "image": b"x", "mask": masks}])

    variants = [((1, b"ab"), (2, b"c")), ((1, b"a"), (2, b"bc")), ((2, b"ab"), (1, b"c"))]
    assert len({fingerprint(*masks) for masks in variants}) == 3


def test_a_truncated_cache_is_written_again(tmp_path):
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(3)]
    first = data.load(source, 8, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (content[:200], b"", content[:-100]):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(data.load(source, 8, cache=tmp_path).image, first.image)
        assert len(file.read_bytes()) == len(content)


def test_a_damaged_cache_is_never_taken_for_pictures(tmp_path):
    source = [entry(rgb(i, (64, 64)), np.eye(64, dtype=np.uint8), f"n{i}") for i in range(2)]
    first = data.load(source, 64, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content, directory = file.read_bytes(), file.read_bytes().index(b"PK\1\2")
    for before, after in (
        (b"(2, 64, 64, 3)", b"(2, 64, 64, 1)"),  # the rest of the member, and its CRC, is not read
        (b"(2, 64, 64, 3)", b"(1, 64, 64, 3)"),
        (b"(2, 64, 64, 1)", b"(2, 64, 24, 1)"),
        (content[directory : directory + 10], content[directory : directory + 8] + b"\1\0"),
        (content[directory : directory + 12], content[directory : directory + 10] + b"\7\0"),
    ):
        file.write_bytes(damaged := content.replace(before, after, 1))
        assert damaged != content
        again = data.load(source, 64, cache=tmp_path)
        np.testing.assert_array_equal(again.image, first.image)
        np.testing.assert_array_equal(again.mask, first.mask)


def test_a_cache_that_cannot_be_written_causes_a_warning_only(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be cached"):
        arrays = data.load([entry(rgb(), np.eye(8, dtype=np.uint8))], 8, cache=tmp_path / "file")
    assert len(arrays.image) == 1


def test_a_cache_file_that_fails_half_way_is_removed(tmp_path, monkeypatch):
    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="could not be cached: no space left"):
        data.load([entry(rgb(), np.eye(8, dtype=np.uint8))], 8, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_depends_on_names_images_and_masks():
    base = entry(rgb(), np.eye(8, dtype=np.uint8))
    changed = [base | {"name": "b"}, base | {"image": b"x"}, base | {"mask": b"x"}]
    assert len({data.fingerprint([e]) for e in [base, *changed]}) == 4
    assert data.fingerprint([base]) == data.fingerprint([dict(base)])


def test_a_folder_is_paired_by_stem(folders):
    images, masks = folders
    (images / "p03.png").rename(images / "p03.JPG")  # another suffix, the same stem
    (images / ".hidden.png").write_text("not a picture")
    (images / "folder.png").mkdir()
    everything = FolderSource(images, masks)
    assert [e["name"] for e in everything] == [f"p{i:02d}" for i in range(12)]
    assert everything[3]["mask"] == (masks / "p03.png").read_bytes()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda i, m: (m / "p04.png").unlink(), "without a partner .1.: 'p04' only in .*images"),
        (lambda i, m: (i / "p04.png").unlink(), "without a partner .1.: 'p04' only in .*masks"),
        (lambda i, m: (i / "p04.bmp").write_bytes(b""), "p04.* have the same name"),
        (lambda i, m: [f.unlink() for f in [*i.iterdir(), *m.iterdir()]], "has no pictures"),
        (lambda i, m: i.rename(i.with_name("elsewhere")), "images is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_paired_is_named(folders, damage, words):
    damage(*folders)
    with pytest.raises(DataError, match=words):
        FolderSource(*folders)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_an_unreadable_file_in_a_folder_is_named(folders, part):
    bad = folders[0].with_name(part) / "p04.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"{bad}: not a readable picture .unknown format"):
        data.load(FolderSource(*folders), 8)


def test_a_folder_source_does_not_need_tfds(folders):
    program = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from flax_unet import data, predict, train\n"
        "arrays = data.load(data.FolderSource(*sys.argv[1:]), 8)\n"
        "print(arrays.image.shape)"
    )
    command = [sys.executable, "-c", program, *map(str, folders)]
    assert subprocess.check_output(command, text=True).strip() == "(12, 8, 8, 3)"


def test_batches_have_one_shape_and_padding_has_weight_0():
    arrays = Arrays(
        np.arange(21, dtype=np.uint8).reshape(7, 1, 1, 3), np.arange(7).reshape(7, 1, 1, 1), [], ""
    )
    order = np.array([6, 5, 4, 3, 2, 1, 0])
    batches = list(data.batches(arrays, 4, order))
    assert [b["image"].shape for b in batches] == [(4, 1, 1, 3)] * 2
    np.testing.assert_array_equal(batches[1]["weight"], [1, 1, 1, 0])
    real = np.concatenate([b["mask"][b["weight"] > 0].ravel() for b in batches])
    np.testing.assert_array_equal(real, order)
    assert [len(b["mask"]) for b in data.batches(arrays, 16)] == [16]


def test_batches_of_arrays_on_a_device_are_indices():
    arrays = Arrays(
        np.arange(21, dtype=np.uint8).reshape(7, 1, 1, 3), np.arange(7).reshape(7, 1, 1, 1), [], ""
    )
    order, resident = np.array([6, 5, 4, 3, 2, 1, 0]), data.to_device(arrays)
    pairs = zip(data.batches(arrays, 4, order), data.batches(resident, 4, order), strict=True)
    for batch, rows in pairs:
        assert rows["image"] is resident.image and rows["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"], rows["image"][rows["index"]])
        np.testing.assert_array_equal(batch["mask"], rows["mask"][rows["index"]])
        np.testing.assert_array_equal(batch["weight"], rows["weight"])


def test_a_stream_yields_the_same_batches_as_arrays_in_memory():
    pytest.importorskip("grain")
    masks = [np.eye(12, dtype=np.uint8)[::flip] for flip in (1, -1)]
    source = [entry(rgb(i, (12, 12)), masks[i % 2], f"n{i}") for i in range(30)]
    order = data.shuffled(30, 0, 0)
    size = 8, 6
    arrays = data.load(source, size)
    pairs = zip(
        data.stream(source, size, 4, order, mask_format=BINARY, image_format=RGB),
        data.batches(arrays, 4, order),
        strict=True,
    )
    for streamed, expected in pairs:
        assert streamed.keys() == expected.keys()
        for key in expected:
            np.testing.assert_array_equal(streamed[key], expected[key])
            assert streamed[key].dtype == expected[key].dtype


def test_a_broken_picture_in_a_stream_is_named():
    pytest.importorskip("grain")
    source = [entry(rgb(i), np.eye(8, dtype=np.uint8), f"n{i}") for i in range(4)]
    source[2] = source[2] | {"image": b"no picture"}
    with pytest.raises(DataError, match="image n2: not a readable picture"):
        list(data.stream(source, 8, 2, mask_format=BINARY, image_format=RGB))


def test_the_order_depends_on_seed_and_epoch_only():
    a, b = data.shuffled(100, 1, 2), data.shuffled(100, 1, 2)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.sort(a), np.arange(100))
    assert (a != data.shuffled(100, 1, 3)).any() and (a != data.shuffled(100, 2, 2)).any()
    np.testing.assert_array_equal(
        a[:5], [0, 8, 1, 28, 26]
    )  # old runs must be resumed in this order


def test_a_stream_of_a_million_entries_reads_only_what_comes_next():
    pytest.importorskip("grain")
    reads = []

    class Drawn(Sequence):
        def __len__(self):
            return 1_000_000

        def __getitem__(self, i):
            reads.append(i)
            mask = np.full((4, 4), i % 2, np.uint8)
            picture = np.full((4, 4, 3), i % 256, np.uint8)
            return {"name": str(i), "image": encode(picture), "mask": encode(mask)}

    order = data.shuffled(1_000_000, seed=0, epoch=3)[800_000:]  # the rest of an epoch
    batches = data.stream(Drawn(), 4, 8, order, mask_format=BINARY, image_format=RGB)
    first = next(batches)
    assert first["image"][:, 0, 0, 0].tolist() == [i % 256 for i in order[:8]]
    assert {*reads} <= {*order[:200].tolist()}  # with what is decoded ahead
