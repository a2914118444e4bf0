"""Tests of the Kvasir-SEG builder against zipfile, Pillow and NumPy.

Most tests read a synthetic zip; those on the real zip need its path in KVASIR_SEG_ZIP.
"""

import functools
import http.server
import importlib.util
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import tfds_kvasir
from tfds_kvasir.kvasir_seg import kvasir_seg_dataset_builder as kvasir_seg
from tfds_kvasir.kvasir_seg.dummy_data.draw import NAMES, draw_zip, jpeg

FOLDER = Path(kvasir_seg.__file__).parent
SIZES = {
    "article": {"train": 603, "validation": 67, "test": 330},
    "medico": {"train": 880, "validation": 120},
    "effisegnet": {"train": 800, "validation": 100, "test": 100},
    "sorted42": {"train": 800, "validation": 100, "test": 100},
}
# These names are neither sorted nor in the zip's order: only the protocol's order passes the tests.
DUMMY = kvasir_seg.Protocol(
    name="dummy", splits={"train": ["rim", "disc", "pair"], "test": ["flat"]}
)
CONFIGS = {config.name: config for config in kvasir_seg.Builder.BUILDER_CONFIGS}
PROTOCOLS = {name: CONFIGS[name].splits for name in tfds_kvasir.datasets()["kvasir_seg"]}
ALL_NAMES = sorted(name for split in PROTOCOLS["article"].values() for name in split)
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "KVASIR_SEG_ZIP"}
REAL = os.environ.get("KVASIR_SEG_ZIP", "")
real = pytest.mark.skipif(not REAL, reason="KVASIR_SEG_ZIP is not set to the real kvasir-seg.zip")


@pytest.fixture(autouse=True)
def no_zip_from_the_environment(monkeypatch):
    monkeypatch.delenv("KVASIR_SEG_ZIP", raising=False)
    monkeypatch.setattr(kvasir_seg, "URL", "http://127.0.0.1:9/kvasir-seg.zip")  # no server
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """The synthetic zip of the dummy data, opened, and a data_dir prepared from it."""
    data_dir = tmp_path_factory.mktemp("dummy")
    path = FOLDER / "dummy_data" / "kvasir-seg.zip"
    tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=data_dir, kvasir_zip=path)
    return zipfile.ZipFile(path), data_dir


@pytest.fixture(scope="module")
def all_names_zip(tmp_path_factory):
    """A zip of tiny synthetic pictures with all 1000 names of Kvasir-SEG."""
    path = tmp_path_factory.mktemp("names") / "synthetic.zip"
    draw_zip(path, ALL_NAMES, size=(6, 8))
    return path


def member(archive, folder, name):
    return archive.read(f"Kvasir-SEG/{folder}/{name}.jpg")


def grey(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("L"))


def boxes_by_rows(mask):
    """(ymin, xmin, ymax, xmax), max exclusive, of the 8-connected components, in any order.

    Row by row, a run of foreground merges all components that it touches in the row above.
    """
    components = []  # lists of runs (y, start, stop)
    for y, row in enumerate(mask):
        for start, stop in np.flatnonzero(np.diff(row, prepend=0, append=0)).reshape(-1, 2):
            component = [(y, start, stop)]
            for other in list(components):
                if any(b == y - 1 and s <= stop and start <= e for b, s, e in other):
                    components.remove(other)
                    component += other
            components.append(component)
    boxes = []
    for component in components:
        y, start, stop = zip(*component, strict=True)
        boxes.append((min(y), min(start), max(y) + 1, max(stop)))
    return boxes


def check_boxes(example, mask):
    height, width = mask.shape
    pixels = np.reshape(example["bboxes"], (-1, 4)) * (height, width, height, width)
    np.testing.assert_allclose(sorted(pixels.tolist()), sorted(boxes_by_rows(mask)), atol=1e-3)


def check_source(source, archive, names):
    """Compare every example with the zip's members of the same name."""
    assert [example["name"] for example in source] == list(names)
    for example in source:
        assert set(example) == {"name", "image", "mask"}
        assert example["image"] == member(archive, "images", example["name"])
        mask = Image.open(io.BytesIO(example["mask"]))
        assert (mask.format, mask.mode) == ("PNG", "L")
        expected = grey(member(archive, "masks", example["name"])) > 127
        np.testing.assert_array_equal(np.asarray(mask), expected.astype(np.uint8))


# Content of the data set


def test_examples_are_paired_by_name_in_protocol_order(dummy):
    archive, data_dir = dummy
    sources = tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=data_dir)
    assert set(sources) == {"train", "test"}
    for split, names in DUMMY.splits.items():
        check_source(sources[split], archive, names)


def test_examples_are_paired_by_name_if_the_zip_lists_masks_backwards(dummy, tmp_path):
    archive, _ = dummy
    path = tmp_path / "backwards.zip"
    masks = [info for info in archive.infolist() if "/masks/" in info.filename]
    images = [info for info in archive.infolist() if "/images/" in info.filename]
    with zipfile.ZipFile(path, "w") as backwards:
        for info in images + masks[::-1]:
            backwards.writestr(info.filename, archive.read(info))
        for name in NAMES:
            backwards.writestr(f"__MACOSX/Kvasir-SEG/images/._{name}.jpg", b"what macOS adds")
            backwards.writestr(f"__MACOSX/Kvasir-SEG/masks/._{name}.jpg", b"what macOS adds")
    sources = tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=tmp_path, kvasir_zip=path)
    check_source(sources["train"], archive, DUMMY.splits["train"])


def test_foreground_is_grey_above_127(tmp_path):
    steps = np.repeat([0, 127, 128, 255], 8)[None, :, None].repeat(8, 0).repeat(3, 2)
    buffer = io.BytesIO()
    Image.fromarray(steps.astype(np.uint8)).save(buffer, format="JPEG", quality=100)
    path = write_zip(tmp_path, {"images/a.jpg": jpeg(np.zeros((8, 32, 3), np.uint8))})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("masks/a.jpg", buffer.getvalue())
    one = kvasir_seg.Protocol(name="one", splits={"train": ["a"]})
    sources = tfds_kvasir.sources("kvasir_seg", one, data_dir=tmp_path, kvasir_zip=path)
    assert grey(sources["train"][0]["mask"]).tolist() == [[0] * 16 + [1] * 16] * 8


def test_boxes_enclose_the_components_of_the_mask(dummy):
    archive, data_dir = dummy
    builder = tfds.builder("kvasir_seg", config=DUMMY, data_dir=data_dir)
    for example in builder.as_data_source("train"):
        name = example["name"].decode()
        check_boxes(example, grey(member(archive, "masks", name)) > 127)
        assert len(example["bboxes"]) == {"disc": 1, "rim": 2, "pair": 1}[name]
        assert example["image"].shape == (24, 32, 3) and example["mask"].shape == (24, 32, 1)


def test_source_is_a_sequence_that_threads_can_share(dummy):
    _, data_dir = dummy
    source = tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=data_dir)["train"]
    assert source[-1] == source[2] != source[0]
    with pytest.raises(IndexError):
        source[3]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, [0, 1, 2] * 300)) == list(source) * 300


# Protocols


@pytest.mark.parametrize("protocol", SIZES)
def test_protocols_split_the_same_1000_names(protocol):
    splits = PROTOCOLS[protocol]
    assert {split: len(names) for split, names in splits.items()} == SIZES[protocol]
    names = [name for split in splits.values() for name in split]
    assert len(set(names)) == 1000 and sorted(names) == ALL_NAMES


def test_protocols_made_with_sklearn_can_be_reproduced():
    def train_test_split(names, test_size):
        """sklearn's, with random_state=42: a permutation whose first names are the test set."""
        shuffled = [names[i] for i in np.random.RandomState(42).permutation(len(names))]
        return shuffled[test_size:], shuffled[:test_size]

    rest, test = train_test_split(ALL_NAMES, 330)
    assert PROTOCOLS["article"] == {"train": rest[:603], "validation": rest[603:], "test": test}
    rest, test = train_test_split(ALL_NAMES, 100)
    train, validation = train_test_split(rest, 100)
    expected = [sorted(names) for names in (train, validation, test)]
    assert [sorted(names) for names in PROTOCOLS["sorted42"].values()] == expected


@pytest.mark.parametrize("protocol", SIZES)
def test_every_protocol_can_be_prepared(all_names_zip, tmp_path, protocol):
    sources = tfds_kvasir.sources(
        "kvasir_seg", protocol, data_dir=tmp_path, kvasir_zip=all_names_zip
    )
    names = {split: [example["name"] for example in source] for split, source in sources.items()}
    assert names == PROTOCOLS[protocol]


def test_a_protocol_of_ones_own_takes_names_as_tfds_returns_them_and_no_overlap():
    protocol = tfds_kvasir.Protocol(name="mine", splits={"train": [b"a", "b"], "test": ["c"]})
    assert protocol.splits == {"train": ["a", "b"], "test": ["c"]}
    for splits in ({"train": ["a", "b"], "test": ["b"]}, {"train": ["b", "b"]}):
        with pytest.raises(ValueError, match="protocol mine: 'b' is in two splits"):
            tfds_kvasir.Protocol(name="mine", splits=splits)


# Where the zip comes from


@pytest.fixture
def zips(tmp_path):
    """Writes zips that differ in the width of their pictures, and reads the width prepared."""

    class Zips:
        data_dir = tmp_path / "data"

        def write(self, width, path=None):
            path = path or tmp_path / f"{width}.zip"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_zip(path, size=(16, width))
            return path

        def prepared_width(self, config=DUMMY, **kwargs):
            sources = tfds_kvasir.sources("kvasir_seg", config, data_dir=self.data_dir, **kwargs)
            return grey(sources["train"][0]["image"]).shape[1]

    return Zips()


def test_argument_takes_precedence_over_environment(zips, monkeypatch):
    monkeypatch.setenv("KVASIR_SEG_ZIP", str(zips.write(24)))
    assert zips.prepared_width(kvasir_zip=zips.write(20)) == 20


def test_environment_takes_precedence_over_manual_dir(zips, monkeypatch):
    zips.write(28, zips.data_dir / "downloads" / "manual" / "kvasir-seg.zip")
    monkeypatch.setenv("KVASIR_SEG_ZIP", str(zips.write(24)))
    assert zips.prepared_width() == 24


def test_manual_dir_takes_precedence_over_download(zips):
    zips.write(28, zips.data_dir / "downloads" / "manual" / "kvasir-seg.zip")
    assert zips.prepared_width() == 28


@pytest.fixture
def server(zips, tmp_path, monkeypatch):
    """A server of a zip with pictures 32 pixels wide; calling the fixture shuts it down."""
    zips.write(32, tmp_path / "www" / "kvasir-seg.zip")
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http_server.server_port}/kvasir-seg.zip"
        monkeypatch.setattr(kvasir_seg, "URL", url)

        def close():
            http_server.shutdown()
            http_server.server_close()

        yield close
        close()


def test_download_with_a_wrong_checksum_is_refused(zips, server, monkeypatch):
    info = tfds.download.checksums.UrlInfo(size=3, checksum="0" * 64, filename="kvasir-seg.zip")
    monkeypatch.setattr(kvasir_seg.Builder, "url_infos", {kvasir_seg.URL: info})
    with pytest.raises(ValueError, match="kvasir-seg.zip: .*checksum") as error:
        zips.prepared_width()
    assert "--kvasir-zip" in str(error.value)
    check_nothing_is_left(zips.data_dir)


def test_download_is_reused_for_the_next_protocol(zips, server):
    assert zips.prepared_width() == 32
    server()
    other = kvasir_seg.Protocol(name="other", splits={"train": ["disc"]})
    assert zips.prepared_width(other) == 32


def test_download_is_verified_against_the_published_checksum():
    (line,) = (FOLDER / "checksums.tsv").read_text().splitlines()
    url, size, checksum, _ = line.split("\t")
    assert url == "https://datasets.simula.no/downloads/kvasir-seg.zip"
    infos = kvasir_seg.Builder.url_infos
    assert infos is not None
    info = infos[url]
    assert (info.size, info.checksum) == (int(size), checksum)
    assert int(size) == 46227172 and checksum.startswith("03b30e21") and len(checksum) == 64


def test_without_network_the_error_is_quick_and_lists_remedies(tmp_path):
    start = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        tfds_kvasir.sources("kvasir_seg", data_dir=tmp_path)
    assert time.monotonic() - start < 10
    for remedy in ("kvasir_zip=", "KVASIR_SEG_ZIP", "manual_dir", "synthetic_polyps"):
        assert remedy in str(error.value)
    check_nothing_is_left(tmp_path)


@pytest.mark.parametrize("source", ["kvasir_zip", "KVASIR_SEG_ZIP"])
def test_missing_zip_is_an_error(zips, monkeypatch, source):
    zips.write(28, zips.data_dir / "downloads" / "manual" / "kvasir-seg.zip")
    kwargs = {}
    if source == "kvasir_zip":
        kwargs = {"kvasir_zip": "no/such.zip"}
    else:
        monkeypatch.setenv("KVASIR_SEG_ZIP", "no/such.zip")
    with pytest.raises(FileNotFoundError, match=f"{source} is no/such.zip"):
        zips.prepared_width(**kwargs)
    check_nothing_is_left(zips.data_dir)


def test_missing_array_record_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="kvasir_seg needs array_record: pip install array-record"):
        tfds_kvasir.sources("kvasir_seg", data_dir=tmp_path)


@pytest.mark.parametrize("size", [None, 0, 100])
def test_error_names_damaged_data(zips, size):
    path = zips.write(24)
    assert zips.prepared_width(kvasir_zip=path) == 24
    for file in zips.data_dir.rglob("*array_record*"):
        os.truncate(file, size) if size is not None else file.unlink()
    with pytest.raises(ValueError, match="kvasir_seg/pictures/1.0.0 cannot be read; if it is"):
        zips.prepared_width(kvasir_zip=path)


# Invalid zips


def write_zip(folder, members):
    path = folder / "bad.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def without(*names):
    return {name: content for name, content in GOOD.items() if name not in names}


def huge(encoded):
    """The JPEG with a header that claims 9000x9000 pixels."""
    at = encoded.index(b"\xff\xc0") + 5
    return encoded[:at] + (9000).to_bytes(2, "big") * 2 + encoded[at + 4 :]


GOOD = read_zip(FOLDER / "dummy_data" / "kvasir-seg.zip")
IMAGE, MASK = "Kvasir-SEG/images/disc.jpg", "Kvasir-SEG/masks/disc.jpg"
BAD = {  # {case: (members of the zip, expected message)}
    "empty": ({}, "no images"),
    "foreign": ({"README.txt": b"another data set"}, "no images"),
    "no mask": (without(MASK), "images/disc.jpg has no masks/disc.jpg; download http"),
    "no image": (without(IMAGE), "masks/disc.jpg has no images/disc.jpg"),
    "no pair": (without(IMAGE, MASK), "1 of the 4 pictures of dummy are missing"),
    "twice": (GOOD | {"images/disc.jpg": GOOD[IMAGE]}, "contains two files images/disc.jpg"),
    "sizes": (
        GOOD | {MASK: jpeg(np.zeros((9, 7, 3), np.uint8))},
        f"{IMAGE} is 32x24 but {MASK} is 7x9",
    ),
    "text": (GOOD | {IMAGE: b"no picture"}, f"{IMAGE}: cannot identify"),
    "half": (GOOD | {IMAGE: GOOD[IMAGE][:-200]}, f"{IMAGE}: image file is truncated"),
    "huge": (GOOD | {IMAGE: huge(GOOD[IMAGE])}, f"{IMAGE}: 9000x9000, more than"),
    "large": (GOOD | {MASK: bytes(kvasir_seg.LIMIT + 1)}, f"{MASK}: {kvasir_seg.LIMIT + 1} bytes"),
    "up": (GOOD | {"images/../../x.jpg": b""}, "points outside the zip"),
    "root": (GOOD | {"/images/x.jpg": b""}, "points outside the zip"),
    "drive": (GOOD | {"C:\\images\\x.jpg": b""}, "points outside the zip"),
}


def check_nothing_is_left(data_dir):
    """Assert that no record is left, nor a folder that TFDS could take for the data set."""
    for pattern in ("*1.0.0*", "*incomplete*", "*record*"):
        assert not list(data_dir.rglob(pattern))


def check_refused(path, data_dir, message):
    with pytest.raises(ValueError) as error:
        tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=data_dir, kvasir_zip=path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    check_nothing_is_left(data_dir)


@pytest.mark.parametrize("case", BAD)
def test_bad_zip_raises_value_error_and_leaves_nothing(tmp_path, case):
    members, message = BAD[case]
    check_refused(write_zip(tmp_path, members), tmp_path, message)


@pytest.mark.parametrize("content", ["truncated", "not a zip", "nothing", "flipped"])
def test_broken_file_raises_value_error_and_leaves_nothing(tmp_path, content):
    good = (FOLDER / "dummy_data" / "kvasir-seg.zip").read_bytes()
    path = tmp_path / "broken.zip"
    path.write_bytes(
        {
            "truncated": good[: len(good) // 2],
            "not a zip": b"<html>a login page</html>",
            "nothing": b"",
            "flipped": good[:400] + bytes([good[400] ^ 255]) + good[401:],
        }[content]
    )
    check_refused(path, tmp_path, "CRC" if content == "flipped" else "not a zip file")


def test_partial_zip_is_refused_for_a_published_protocol(tmp_path):
    path = FOLDER / "dummy_data" / "kvasir-seg.zip"
    with pytest.raises(ValueError, match="1000 of the 1000 pictures of article are missing"):
        tfds_kvasir.sources("kvasir_seg", data_dir=tmp_path, kvasir_zip=path)
    check_nothing_is_left(tmp_path)


# Use through TFDS


def test_builder_by_name_needs_no_tensorflow_and_prints_nothing(all_names_zip, tmp_path):
    program = """
import sys, tensorflow_datasets as tfds, tfds_kvasir
tfds_kvasir.sources("kvasir_seg", data_dir=sys.argv[1])
assert "tensorflow" not in sys.modules
builder = tfds.builder("kvasir_seg", data_dir=sys.argv[1])
assert builder.builder_config.name == "article", builder.builder_config
assert builder.info.file_format.value == "array_record"
assert len(builder.as_data_source("validation")) == 67
assert "tensorflow" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=ENVIRONMENT | {"KVASIR_SEG_ZIP": str(all_names_zip)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_protocols_share_one_copy(all_names_zip, tmp_path):
    written = set()
    for protocol, splits in PROTOCOLS.items():
        builder = tfds.builder(
            "kvasir_seg", config=protocol, data_dir=tmp_path, kvasir_zip=all_names_zip
        )
        builder.download_and_prepare()
        written |= {(file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*array_record*")}
        assert builder.is_prepared() and Path(builder.info.data_dir) == Path(builder.data_path)
        for split, names in builder.as_data_source().items():
            assert [example["name"].decode() for example in names] == splits[split]
    (one,) = written
    assert one[0].parent == tmp_path / "kvasir_seg" / "pictures" / "1.0.0"
    everything = tfds.data_source("kvasir_seg/pictures", split="pictures", data_dir=tmp_path)
    assert [example["name"].decode() for example in everything] == ALL_NAMES


def test_slices_and_sums_of_splits(dummy):
    _, data_dir = dummy
    builder = tfds.builder("kvasir_seg", config=DUMMY, data_dir=data_dir)

    def names(split):
        return [example["name"].decode() for example in builder.as_data_source(split)]

    assert names("train[1:]") == ["disc", "pair"] and names("train[:33%]") == ["rim"]
    assert names("test+train[:1]") == ["flat", "rim"]
    assert names("all") == ["rim", "disc", "pair", "flat"]
    assert builder.info.splits["train[1:]"].num_examples == 2
    first, second = builder.as_data_source(["train", "test"])
    assert (len(first), len(second)) == (3, 1)
    assert [example["name"] for example in first[::-1]] == [b"pair", b"disc", b"rim"]
    with pytest.raises(ValueError, match="validation"):
        names("validation")


def test_a_copy_that_lacks_pictures_of_another_protocol_is_refused(dummy):
    _, data_dir = dummy
    with pytest.raises(ValueError, match="pictures/1.0.0 lacks 1000 pictures of medico"):
        tfds_kvasir.sources("kvasir_seg", "medico", data_dir=data_dir)


def test_a_protocol_that_was_prepared_on_its_own_is_read_as_it_is(dummy, tmp_path, monkeypatch):
    archive, _ = dummy
    path = FOLDER / "dummy_data" / "kvasir-seg.zip"
    monkeypatch.setattr(kvasir_seg, "PICTURES", DUMMY)  # as before there was a shared copy
    monkeypatch.setattr(
        kvasir_seg.Builder,
        "_split_generators",
        lambda self, _: {
            split: self._generate_examples(path, [(n, *kvasir_seg._pairs(path)[n]) for n in names])
            for split, names in DUMMY.splits.items()
        },
    )
    tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=tmp_path, kvasir_zip=path)
    monkeypatch.undo()
    (file,) = tmp_path.rglob("*train.array_record*")
    assert file.parent == tmp_path / "kvasir_seg" / "dummy" / "1.0.0"
    sources = tfds_kvasir.sources("kvasir_seg", DUMMY, data_dir=tmp_path, kvasir_zip="no/such.zip")
    for split, names in DUMMY.splits.items():
        check_source(sources[split], archive, names)


def test_tfrecord_files_belong_to_a_protocol(tmp_path):
    def builder(**kwargs):
        return tfds.builder("kvasir_seg", config=DUMMY, data_dir=tmp_path, **kwargs)

    assert builder().info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    tfrecord = builder(file_format="tfrecord")
    assert tfrecord.info.file_format == tfds.core.FileFormat.TFRECORD
    assert Path(tfrecord.data_path) == tmp_path / "kvasir_seg" / "dummy" / "1.0.0"
    with pytest.raises(ValueError, match=r"file_format='tfrecord'\)"):
        builder().download_and_prepare(file_format="tfrecord")


def test_tf_data_reads_the_same_copy(dummy):
    pytest.importorskip("tensorflow", reason="as_dataset needs TensorFlow")
    _, data_dir = dummy
    builder = tfds.builder("kvasir_seg", config=DUMMY, data_dir=data_dir)
    source = builder.as_data_source("train")
    for one, other in zip(source, builder.as_dataset("train").as_numpy_iterator(), strict=True):
        assert one.keys() == other.keys() and one["name"] == other["name"]
        for key in ("image", "mask", "bboxes"):
            np.testing.assert_array_equal(one[key], other[key])
    skip = {"image": tfds.decode.SkipDecoding()}
    assert int(builder.as_dataset("train[:2]").cardinality()) == 2
    (example,) = builder.as_dataset("test", decoders=skip).as_numpy_iterator()
    assert example["image"] == builder.as_data_source("test", decoders=skip)[0]["image"]
    batch = tfds.load(
        "kvasir_seg",
        data_dir=data_dir,
        split="train[:2]",
        batch_size=2,
        as_supervised=True,
        builder_kwargs={"config": DUMMY},
    )
    ((images, masks),) = batch
    assert images.shape == (2, 24, 32, 3) and masks.shape == (2, 24, 32, 1)


def test_tfds_build_accepts_the_folder(all_names_zip, tmp_path):
    # Only the `build` subcommand of the `tfds` program: the other subcommands import TensorFlow.
    program = """
import simple_parsing
from tensorflow_datasets.scripts.cli import build
parser = simple_parsing.ArgumentParser()
parser.add_arguments(build.Args, dest="build")
parser.parse_args().build.execute()
"""
    run = subprocess.run(
        [sys.executable, "-c", program, "--config=medico", f"--data_dir={tmp_path}"],
        env=ENVIRONMENT
        | {"KVASIR_SEG_ZIP": str(all_names_zip), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=FOLDER,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    builder = tfds.builder("kvasir_seg", config="medico", data_dir=tmp_path)
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == SIZES[
        "medico"
    ]


def test_folder_has_the_metadata_that_tfds_requires():
    metadata = kvasir_seg.Builder.get_metadata()
    assert "15.4 %" in metadata.description and "10.1007/978-3-030-37734-2_37" in metadata.citation
    assert set(metadata.tags) <= {tag.split()[0] for tag in valid_tags()} and metadata.tags


def valid_tags():
    lines = (Path(tfds.__file__).parent / "core" / "valid_tags.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_dummy_data_matches_its_script(tmp_path):
    draw_zip(tmp_path / "again.zip")
    with zipfile.ZipFile(tmp_path / "again.zip") as again:
        drawn = {name: grey(again.read(name)).astype(int) for name in again.namelist()}
    assert GOOD.keys() == drawn.keys()
    for name, content in GOOD.items():  # other JPEG libraries may round differently
        assert np.abs(grey(content) - drawn[name]).max() < 16


# The real zip


@pytest.fixture(scope="module")
def medico(tmp_path_factory):
    """The real zip, opened, and a data_dir with the protocol medico prepared from it."""
    data_dir = tmp_path_factory.mktemp("real")
    tfds_kvasir.sources("kvasir_seg", "medico", data_dir=data_dir, kvasir_zip=REAL)
    return zipfile.ZipFile(REAL), data_dir


@real
def test_real_examples_equal_the_files_of_the_zip(medico):
    archive, data_dir = medico
    sources = tfds_kvasir.sources("kvasir_seg", "medico", data_dir=data_dir)
    assert {split: len(source) for split, source in sources.items()} == SIZES["medico"]
    for split, names in PROTOCOLS["medico"].items():
        check_source(sources[split], archive, names)
    fractions = [grey(e["mask"]).mean() for source in sources.values() for e in source]
    assert abs(np.mean(fractions) - 0.1539) <= 0.0005


@real
def test_real_boxes_enclose_the_components_of_the_mask(medico):
    archive, data_dir = medico
    builder = tfds.builder("kvasir_seg", config="medico", data_dir=data_dir)
    skip = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
    for example in builder.as_data_source("validation", decoders=skip):
        mask = grey(member(archive, "masks", example["name"].decode())) > 127
        check_boxes(example, mask)


@real
def test_real_zip_has_the_names_of_all_protocols():
    with zipfile.ZipFile(REAL) as archive:
        files = [Path(name) for name in archive.namelist()]
    for folder in ("images", "masks"):
        assert sorted(file.stem for file in files if file.parent.name == folder) == ALL_NAMES
