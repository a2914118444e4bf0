"""Kvasir-SEG: 1000 pictures of polyps, their masks, and the splits used in papers."""

import contextlib
import dataclasses
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
import tree
from PIL import Image

from tfds_kvasir.examples import SegmentationBuilder, boxes, encode_mask, features

URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
THRESHOLD = 127  # no published mask has a grey level in 11..244
LIMIT = 64_000_000  # pixels of a picture, and bytes of its file; the largest has 2 million pixels

REMEDIES = """\
Download kvasir-seg.zip on a machine with network access, then
- pass its path: --kvasir-zip kvasir-seg.zip, or in Python
  tfds.builder("kvasir_seg", kvasir_zip="kvasir-seg.zip"), or
- set the environment variable KVASIR_SEG_ZIP to its path, or
- put it into TFDS' manual_dir (<data_dir>/downloads/manual) under the name kvasir-seg.zip.
The data set synthetic_polyps needs no download."""


@dataclasses.dataclass(eq=False)
class Protocol(tfds.core.BuilderConfig):
    """The names of every split, in order: {"train": [...], "validation": [...], ...}.

    To split the pictures differently, for example into the folds of a cross-validation, pass your
    own protocol: `tfds.builder("kvasir_seg", config=Protocol(name="fold0", splits={...}))`.
    """

    splits: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError: a name is in two splits, or twice in one."""
        self.splits = {  # TFDS returns names as bytes
            split: [name.decode() if isinstance(name, bytes) else name for name in names]
            for split, names in self.splits.items()
        }
        number = Counter(name for names in self.splits.values() for name in names)
        if twice := [name for name, n in number.items() if n > 1]:
            raise ValueError(
                f"protocol {self.name}: {twice[0]!r} is in two splits, or twice in one "
                f"({len(twice)} such names)"
            )


_DESCRIPTIONS = {
    "article": "603/67/330, as in the tutorial: a random third of the sorted names for test, the "
    "last tenth of the rest for validation.",
    "medico": "880/120: the lists of the data set's authors for MediaEval Medico 2020; no test "
    "split.",
    "effisegnet": "800/100/100: the lists published with EffiSegNet.",
    "sorted42": "800/100/100: sklearn's train_test_split of the sorted names, random_state=42.",
}
_SPLITS = json.loads(Path(__file__).with_name("splits.json").read_text())


#: The configuration of the copy that all protocols read: every picture of the zip, sorted by name.
PICTURES = Protocol(name="pictures", description="All pictures, in one split.")


class Rows(Sequence):
    """Some rows of a sequence, in an order of their own."""

    def __init__(self, source: Sequence[Any], rows: Sequence[int]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self._source, self._rows[index])
        return self._source[self._rows[index]]


class Builder(SegmentationBuilder):
    """Kvasir-SEG, described in README.md in this folder."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {
        "1.0.0": "Original JPEG files; masks are 1-channel PNG, 1 where grey > 127, otherwise 0."
    }
    BUILDER_CONFIGS = [
        Protocol(name=name, description=description, splits=_SPLITS[name])
        for name, description in _DESCRIPTIONS.items()
    ] + [PICTURES]

    def __init__(
        self,
        *,
        kvasir_zip: str | os.PathLike[str] | None = None,
        file_format: str | tfds.core.FileFormat | None = None,
        **kwargs,
    ):
        """Args, in addition to those of `SegmentationBuilder`:

        kvasir_zip: path of kvasir-seg.zip. By default the environment variable KVASIR_SEG_ZIP,
            then kvasir-seg.zip in TFDS' manual_dir, then the download. The zip is read only if
            the data set has not been prepared yet.
        file_format: by default array_record, in one copy that all protocols read (configuration
            `pictures`); "tfrecord" writes the pictures of this protocol to files of its own.
        """
        super().__init__(file_format=file_format, **kwargs)
        self._kvasir_zip = kvasir_zip
        self._pictures: Builder | None = None  # the builder of the copy, if this one reads it
        self._protocol: Any = self.builder_config  # whose pictures the zip must have
        tfrecord = self.info.file_format != tfds.core.FileFormat.ARRAY_RECORD
        if self._protocol.name != PICTURES.name and not tfrecord and not self.data_path.exists():
            self._pictures = Builder(
                config=PICTURES, data_dir=self._data_dir_root, kvasir_zip=kvasir_zip
            )
            self._pictures._protocol = self._protocol
            self._data_dir = self._pictures._data_dir
            self.info.set_splits(
                tfds.core.SplitDict(
                    tfds.core.SplitInfo(name=split, shard_lengths=[len(names)], num_bytes=0)
                    for split, names in self._protocol.splits.items()
                )
            )
            self.info.update_data_dir(self._data_dir)
            self.info._identity.data_dir = self._data_dir

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features(),
            supervised_keys=("image", "mask"),
            homepage="https://datasets.simula.no/kvasir-seg/",
            license="Research and education only; commercial use needs prior written permission.",
            disable_shuffling=True,  # keep the protocol's order
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        path, protocol = self._zip_path(dl_manager), self._protocol
        pairs = _pairs(path)
        names = [name for split in protocol.splits.values() for name in split]
        if missing := [name for name in names if name not in pairs]:
            raise ValueError(
                f"{path}: {len(missing)} of the {len(names)} pictures of {protocol.name} are "
                f"missing, the first is images/{missing[0]}.jpg; download {URL} again"
            )
        splits: Any = protocol.splits
        metadata: Any = self.info.metadata
        if self.builder_config is PICTURES:
            splits = {PICTURES.name: sorted(pairs)}
            metadata["names"] = splits[PICTURES.name]
        return {
            split: self._generate_examples(path, [(name, *pairs[name]) for name in names])
            for split, names in splits.items()
        }

    def download_and_prepare(  # pyright: ignore[reportIncompatibleVariableOverride]  # decorated
        self, *, file_format=None, **kwargs
    ) -> None:
        """As TFDS, but all protocols share one copy of the pictures.

        Raises:
            ValueError: file_format is another one than the builder's, or the zip is invalid.
        """
        if self._pictures is None:
            super().download_and_prepare(file_format=file_format, **kwargs)
        elif file_format in (None, "array_record", tfds.core.FileFormat.ARRAY_RECORD):
            self._pictures.download_and_prepare(**kwargs)
        else:
            raise ValueError(
                f"to prepare {file_format}, ask for it when the builder is made: "
                f"tfds.builder('kvasir_seg', file_format={str(file_format)!r})"
            )

    def as_data_source(  # pyright: ignore[reportIncompatibleVariableOverride]  # decorated
        self, split=None, **kwargs
    ):
        """As TFDS: a sequence of the examples of a split, in the protocol's order.

        Raises:
            ValueError: the copy lacks a picture of the protocol.
        """
        if self._pictures is None:
            return super().as_data_source(split, **kwargs)  # pyright: ignore[reportCallIssue]
        pictures: Any = self._pictures.as_data_source(PICTURES.name, **kwargs)
        metadata: Any = self._pictures.info.metadata
        row = {name: i for i, name in enumerate(metadata["names"])}
        names = {split: list(names) for split, names in self._protocol.splits.items()}
        if missing := [name for each in names.values() for name in each if name not in row]:
            raise ValueError(
                f"{self.data_path} lacks {len(missing)} pictures of {self._protocol.name}, the "
                f"first is {missing[0]!r}. If these are the names of its files, without .jpg, "
                "delete it, and prepare it again from a complete zip"
            )

        def of(split) -> Rows:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(self.info.splits)
            chosen = [name for p in parts for name in names[p.splitname][p.from_ : p.to]]
            return Rows(pictures, [row[name] for name in chosen])

        return tree.map_structure(of, {each: each for each in names} if split is None else split)

    def _generate_examples(self, path: Path, members: Sequence[tuple[str, str, str]]):
        with zipfile.ZipFile(path) as archive:
            for key, (name, image_member, mask_member) in enumerate(members):
                encoded, image = _read(archive, image_member)
                _, grey = _read(archive, mask_member)
                if image.size != grey.size:
                    raise ValueError(
                        f"{path}: {image_member} is {image.width}x{image.height} but "
                        f"{mask_member} is {grey.width}x{grey.height}; their sizes must be equal"
                    )
                mask = np.asarray(grey.convert("L")) > THRESHOLD
                yield (
                    key,
                    {
                        "image": encoded,
                        "mask": encode_mask(mask),
                        "name": name,
                        "bboxes": boxes(mask),
                    },
                )

    def _zip_path(self, dl_manager: tfds.download.DownloadManager) -> Path:
        paths = {"kvasir_zip": self._kvasir_zip, "KVASIR_SEG_ZIP": os.environ.get("KVASIR_SEG_ZIP")}
        for source, value in paths.items():
            if value:
                path = Path(value).expanduser()
                if not path.is_file():
                    raise FileNotFoundError(f"{source} is {path}, which is not a file")
                return path
        # Not dl_manager.manual_dir: that requires MANUAL_DOWNLOAD_INSTRUCTIONS, which are for
        # data sets without a download, and TFDS would verify the user's zip against our checksum.
        manual_dir = dl_manager._manual_dir
        if manual_dir and (manual := Path(manual_dir) / "kvasir-seg.zip").is_file():
            return manual
        # TFDS retries for minutes and has no timeout, so check first that the server answers.
        if not any((dl_manager.download_dir / self.name).glob("*.zip")):
            try:
                with requests.get(URL, stream=True, timeout=5) as response:
                    response.raise_for_status()
            except requests.RequestException as error:
                raise ConnectionError(
                    f"no kvasir-seg.zip was found and {URL} cannot be reached. {REMEDIES}"
                ) from error
        try:
            return Path(dl_manager.download(URL))
        except Exception as error:  # from TFDS or a library that it uses
            raise ValueError(f"{URL}: {error}\n{REMEDIES}") from error


def _pairs(path: Path) -> dict[str, tuple[str, str]]:
    """{name: (image member, mask member)} of a zip with the folders images/ and masks/."""
    members: dict[str, dict[str, str]] = {"images": {}, "masks": {}}
    with _naming_errors(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            # A Windows path understands both kinds of slash, and drives.
            parts = PureWindowsPath(member).parts
            if PureWindowsPath(member).anchor or ".." in parts:
                raise ValueError(f"{member!r} points outside the zip; do not trust this zip")
            folder, file = parts[-2:] if len(parts) > 1 else ("", "")
            # macOS adds files ._NAME.jpg that are no pictures.
            if folder in members and file.endswith(".jpg") and not file.startswith("."):
                name = file.removesuffix(".jpg")
                if name in members[folder]:
                    raise ValueError(f"the zip contains two files {folder}/{file}")
                members[folder][name] = member
        images, masks = members["images"], members["masks"]
        if not images and not masks:
            raise ValueError(f"no images/*.jpg in the zip, so it is not Kvasir-SEG; download {URL}")
        if unpaired := sorted(images.keys() ^ masks.keys()):
            name = unpaired[0]
            present, missing = ("images", "masks") if name in images else ("masks", "images")
            raise ValueError(
                f"{present}/{name}.jpg has no {missing}/{name}.jpg; download {URL} again"
            )
    return {name: (images[name], masks[name]) for name in images}


def _read(archive: zipfile.ZipFile, member: str) -> tuple[bytes, Image.Image]:
    """The bytes of a JPEG in the zip, and the decoded image."""
    with _naming_errors(f"{archive.filename}: {member}"):
        if (size := archive.getinfo(member).file_size) > LIMIT:
            raise ValueError(f"{size} bytes, more than {LIMIT}")
        encoded = archive.read(member)
        picture = Image.open(io.BytesIO(encoded), formats=["JPEG"])
        if picture.width * picture.height > LIMIT:
            raise ValueError(f"{picture.width}x{picture.height}, more than {LIMIT} pixels")
        picture.load()
    return encoded, picture


@contextlib.contextmanager
def _naming_errors(file: object) -> Iterator[None]:
    """Turn each of the many exceptions of zipfile and Pillow into a ValueError naming the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error
