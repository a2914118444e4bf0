"""Kvasir-SEG: 1000 pictures of polyps, their masks, and the splits that papers use."""

import contextlib
import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image

from tfds_kvasir.examples import SegmentationBuilder, boxes, encode_mask, features

URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
THRESHOLD = 127  # JPEG left no grey of any mask in 11..244
LIMIT = 64_000_000  # pixels of a picture and bytes of its file; the largest real one has 2 million

WAYS = """\
Download it where there is a network, then
- pass its path: --kvasir-zip kvasir-seg.zip, or in Python
  tfds.builder("kvasir_seg", kvasir_zip="kvasir-seg.zip"), or
- name its path in the environment variable KVASIR_SEG_ZIP, or
- put it, as kvasir-seg.zip, into TFDS' manual_dir (<data_dir>/downloads/manual).
`make demo` needs none of it."""


@dataclasses.dataclass(eq=False)
class Protocol(tfds.core.BuilderConfig):
    """The names of every split, in order: {"train": [...], "validation": [...], ...}.

    Any other division of the images, such as a fold of a cross-validation, is one more of these:
    `tfds.builder("kvasir_seg", config=Protocol(name="fold0", splits={...}))`.
    """

    splits: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


_DESCRIPTIONS = {
    "article": "603/67/330: a third of the sorted names for the test, the last tenth of the rest.",
    "medico": "880/120: the authors' own lists for MediaEval Medico 2020; there is no test split.",
    "effisegnet": "800/100/100: the lists that EffiSegNet ships.",
    "sorted42": "800/100/100: sklearn's train_test_split of the sorted names, random_state=42.",
}
_SPLITS = json.loads(Path(__file__).with_name("splits.json").read_text())


class Builder(SegmentationBuilder):
    """Kvasir-SEG; README.md beside this file says what is in it."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {
        "1.0.0": "Original JPEG images; masks are grey > 127, as 1-channel PNG of 0 and 1."
    }
    BUILDER_CONFIGS = [
        Protocol(name=name, description=description, splits=_SPLITS[name])
        for name, description in _DESCRIPTIONS.items()
    ]

    def __init__(self, *, kvasir_zip: str | os.PathLike[str] | None = None, **kwargs):
        """Args beyond those of every `SegmentationBuilder`:

        kvasir_zip: path of kvasir-seg.zip. Without it: the environment variable KVASIR_SEG_ZIP,
            then kvasir-seg.zip in TFDS' manual_dir, then the download. It is read only where
            the dataset is not prepared yet.
        """
        super().__init__(**kwargs)
        self._kvasir_zip = kvasir_zip

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features(),
            supervised_keys=("image", "mask"),
            homepage="https://datasets.simula.no/kvasir-seg/",
            license="Research and education only; commercial use needs prior written permission.",
            disable_shuffling=True,  # the order is the protocol's
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        path = self._zip_path(dl_manager)
        protocol = self.builder_config
        assert isinstance(protocol, Protocol)
        pairs = _pairs(path)
        names = [name for split in protocol.splits.values() for name in split]
        if missing := [name for name in names if name not in pairs]:
            raise ValueError(
                f"{path}: {len(missing)} of the {len(names)} images of {protocol.name} are not in "
                f"it, the first is images/{missing[0]}.jpg; get {URL} again"
            )
        return {
            split: self._generate_examples(path, [(name, *pairs[name]) for name in names])
            for split, names in protocol.splits.items()
        }

    def _generate_examples(self, path: Path, members: Sequence[tuple[str, str, str]]):
        with zipfile.ZipFile(path) as archive:
            for key, (name, image_member, mask_member) in enumerate(members):
                encoded, image = _read(archive, image_member)
                _, grey = _read(archive, mask_member)
                if image.size != grey.size:
                    raise ValueError(
                        f"{path}: {image_member} is {image.width}x{image.height} but "
                        f"{mask_member} is {grey.width}x{grey.height}; they must be equal"
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
        given = {"kvasir_zip": self._kvasir_zip, "KVASIR_SEG_ZIP": os.environ.get("KVASIR_SEG_ZIP")}
        for source, value in given.items():
            if value:
                path = Path(value).expanduser()
                if not path.is_file():
                    raise FileNotFoundError(f"{source} is {path}, which is not a file")
                return path
        # dl_manager.manual_dir asks for MANUAL_DOWNLOAD_INSTRUCTIONS, which are for datasets that
        # cannot be downloaded; and TFDS would hold the user's zip against the checksum.
        manual_dir = dl_manager._manual_dir
        if manual_dir and (manual := Path(manual_dir) / "kvasir-seg.zip").is_file():
            return manual
        # TFDS retries for minutes and has no timeout: see first whether anyone answers.
        if not any((dl_manager.download_dir / self.name).glob("*.zip")):
            try:
                with requests.get(URL, stream=True, timeout=5) as response:
                    response.raise_for_status()
            except requests.RequestException as error:
                raise ConnectionError(
                    f"Kvasir-SEG is not here and {URL} cannot be reached. {WAYS}"
                ) from error
        try:
            return Path(dl_manager.download(URL))
        except Exception as error:  # TFDS' own, and those of what it downloads with
            raise ValueError(f"{URL}: {error}\n{WAYS}") from error


def _pairs(path: Path) -> dict[str, tuple[str, str]]:
    """{name: (member of the image, member of its mask)} of a zip with images/ and masks/."""
    members: dict[str, dict[str, str]] = {"images": {}, "masks": {}}
    with _bad(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            # Windows' reading of a path knows both slashes and drives.
            parts = PureWindowsPath(member).parts
            if PureWindowsPath(member).anchor or ".." in parts:
                raise ValueError(f"{member!r} leaves the folder; do not trust this zip")
            folder, file = parts[-2:] if len(parts) > 1 else ("", "")
            if folder in members and file.endswith(".jpg"):
                name = file.removesuffix(".jpg")
                if name in members[folder]:
                    raise ValueError(f"{member} is there twice")
                members[folder][name] = member
        images, masks = members["images"], members["masks"]
        if not images and not masks:
            raise ValueError("no images/*.jpg in it, so it is not Kvasir-SEG; get " + URL)
        if odd := sorted(images.keys() ^ masks.keys()):
            here, there = ("images", "masks") if odd[0] in images else ("masks", "images")
            raise ValueError(f"{here}/{odd[0]}.jpg is without its {there}/{odd[0]}.jpg")
    return {name: (images[name], masks[name]) for name in images}


def _read(archive: zipfile.ZipFile, member: str) -> tuple[bytes, Image.Image]:
    """The bytes of a JPEG in the zip, and the same decoded."""
    with _bad(f"{archive.filename}: {member}"):
        if (size := archive.getinfo(member).file_size) > LIMIT:
            raise ValueError(f"{size} bytes, more than {LIMIT}")
        encoded = archive.read(member)
        picture = Image.open(io.BytesIO(encoded), formats=["JPEG"])
        if picture.width * picture.height > LIMIT:
            raise ValueError(f"{picture.width}x{picture.height}, more than {LIMIT} pixels")
        picture.load()
    return encoded, picture


@contextlib.contextmanager
def _bad(what: object) -> Iterator[None]:
    """Makes one ValueError, naming the file, of the dozen that zipfile and Pillow may raise."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {error}") from error
