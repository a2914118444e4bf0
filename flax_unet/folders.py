"""Folders of pictures and masks: which files belong together, and to which split."""

import csv
import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flax_unet.pictures import DataError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".npy")
#: Folders with these names hold a split, or one half of the pairs.
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | (
    dict.fromkeys(("val", "valid", "validation"), "validation")
)
IMAGE_FOLDERS = ("image", "images", "img", "imgs")
MASK_FOLDERS = ("mask", "masks", "label", "labels", "annotation", "annotations")


class FolderSource(Sequence):
    """Images and masks in two folders, paired and sorted by their names.

    The name of a pair is the path in the folder, without the suffix of the file. If both folders
    are the same one, files in subfolders named as in `IMAGE_FOLDERS` or `MASK_FOLDERS` are paired
    without that part of the path, and otherwise a file with `mask_suffix` is a mask.

    The splits are those of `split_file`; or of subfolders named as in `SPLIT_FOLDERS`; or 80, 10
    and 10 % of the pairs, in the order of a hash of their names, at least one pair each.

    Args:
        images, masks: the folders.
        split: `train`, `validation` or `test`; None for all pairs.
        image_suffix, mask_suffix: end of the file names, before the dot, that is not in the name.
        split_file: a JSON file, {split: [name, ...]} or {name: split}, or a CSV file with the
            columns name and split. Other pairs are left out.
        group: a regular expression. Pairs in whose name it finds the same text, or the same first
            group, are in the same split.
        split_by: `share`, as above; or `name`: each name's hash alone chooses the split, so that
            adding pictures never moves one to another split, and the shares are about 80, 10, 10 %.

    Attributes:
        left_out: files that are not used. A warning names some of them.

    Raises:
        DataError: a picture has no mask or a mask no picture, two files have one name, a folder is
            missing or empty, or the splits are not clear.
    """

    def __init__(
        self,
        images: str | os.PathLike,
        masks: str | os.PathLike,
        split: str | None = None,
        *,
        image_suffix: str = "",
        mask_suffix: str = "",
        split_file: str | os.PathLike | None = None,
        group: str | None = None,
        split_by: Literal["share", "name"] = "share",
    ):
        self.left_out: list[Path] = []
        image, mask = self._halves(Path(images), Path(masks), image_suffix, mask_suffix)
        if unpaired := sorted(image.keys() ^ mask.keys()):
            raise DataError(
                f"{unpaired[0]!r} is only in {images if unpaired[0] in image else masks} "
                f"({len(unpaired)} unpaired in all): give every picture a mask with the same name; "
                "if masks are named NAME_mask, use --mask-suffix _mask"
            )
        if not image:
            raise DataError(f"{images} has no pictures ({', '.join(SUFFIXES)})")
        if split is not None and split not in SPLITS:
            raise DataError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
        names = sorted(image)
        if split is not None or split_file is not None:
            chosen = splits_of(names, split_file=split_file, group=group, split_by=split_by)
            self.left_out += [image[name] for name in names if name not in chosen]
            names = [name for name in chosen if split in (None, chosen[name])]
        self._pairs = [(name, image[name], mask[name]) for name in sorted(names)]
        if self.left_out:
            shown = ", ".join(map(str, self.left_out[:5]))
            warnings.warn(
                f"{len(self.left_out)} files are left out: {shown}"
                + (", ..." if len(self.left_out) > 5 else ""),
                stacklevel=2,
            )

    def _halves(
        self, images: Path, masks: Path, image_suffix: str, mask_suffix: str
    ) -> tuple[dict[str, Path], dict[str, Path]]:
        """{name: file} of the images and of the masks."""
        if images.absolute() != masks.absolute():
            return self._named(images, image_suffix), self._named(masks, mask_suffix)
        files = self._list(images)
        if mask_suffix:
            is_mask = [file.stem.endswith(mask_suffix) for file in files]
            others = [file for file, mask in zip(files, is_mask, strict=True) if not mask]
            ours = [file for file, mask in zip(files, is_mask, strict=True) if mask]
            return (
                self._names(images, others, image_suffix),
                self._names(images, ours, mask_suffix),
            )
        halves: dict[tuple[str, ...], list[Path]] = {IMAGE_FOLDERS: [], MASK_FOLDERS: []}
        for file in files:
            parts = {part.lower() for part in file.relative_to(images).parts[:-1]}
            found = [folders for folders in halves if parts & {*folders}]
            if len(found) == 1:
                halves[found[0]].append(file)
            else:
                self.left_out.append(file)
        image, mask = halves.values()
        return (
            self._names(images, image, image_suffix, IMAGE_FOLDERS),
            self._names(images, mask, mask_suffix, MASK_FOLDERS),
        )

    def _named(self, folder: Path, suffix: str) -> dict[str, Path]:
        return self._names(folder, self._list(folder), suffix)

    def _list(self, folder: Path) -> list[Path]:
        files, others = list_files(folder)
        self.left_out += others
        return files

    def _names(
        self, folder: Path, files: list[Path], suffix: str, dropped: Sequence[str] = ()
    ) -> dict[str, Path]:
        named: dict[str, Path] = {}
        for file in files:
            if not file.stem.endswith(suffix):
                self.left_out.append(file)
                continue
            parts = file.relative_to(folder).with_suffix("").parts
            parts = [part for part in parts[:-1] if part.lower() not in dropped] + [parts[-1]]
            # macOS stores accents decomposed (NFD).
            name = unicodedata.normalize("NFC", "/".join(parts)).removesuffix(suffix)
            if name in named:
                raise DataError(f"{named[name]} and {file.name} have the same name: keep one")
            named[name] = file
        return named

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: int) -> dict[str, Any]:  # type: ignore[override]
        name, *files = self._pairs[i]
        image, mask = (file.read_bytes() for file in files)
        return {"name": name, "image": image, "mask": mask, "files": [str(file) for file in files]}


def list_pictures(folder: str | os.PathLike) -> list[Path]:
    """The pictures in a folder, by suffix, sorted; hidden files and subfolders are left out.

    Raises:
        DataError: it is not a folder.
    """
    files, _ = list_files(folder)
    return [file for file in files if file.parent == Path(folder)]


def list_files(folder: str | os.PathLike) -> tuple[list[Path], list[Path]]:
    """The pictures in a folder and its subfolders, by suffix, sorted; and the other files.

    Hidden files and folders are in neither list.

    Raises:
        DataError: it is not a folder, or a name is not UTF-8.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder")
    pictures, others = [], []
    for file in sorted(Path(folder).rglob("*")):
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            str(file).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{os.fsencode(file)!r}: its name is not UTF-8: rename it") from error
        usable = file.suffix.lower() in SUFFIXES and file.is_file()
        (pictures if usable else others).append(file)
    return pictures, others


def splits_of(
    names: Sequence[str],
    *,
    split_file: str | os.PathLike | None = None,
    group: str | None = None,
    split_by: Literal["share", "name"] = "share",
) -> dict[str, str]:
    """{name: split} for the names of pairs; see `FolderSource`.

    Raises:
        DataError: the split file does not fit the names, a name has no group, only some names are
            in folders of splits, or there are fewer than three groups.
    """
    if split_file is not None:
        return _from_file(names, Path(split_file))
    folders = {name: SPLIT_FOLDERS.get(name.split("/")[0].lower()) for name in names}
    if any("/" in name and folders[name] for name in names):
        if others := [name for name in names if folders[name] is None]:
            raise DataError(
                f"{others[0]!r} is not in a folder of a split, and other pictures are: move it to "
                "train, val or test"
            )
        return {name: split for name, split in folders.items() if split is not None}
    groups = defaultdict(list)
    for name in names:
        groups[_group_of(name, group)].append(name)
    hashes = {key: hashlib.sha256(key.encode()).digest()[:8] for key in groups}
    if split_by == "name":
        chosen = {key: _by_fraction(hashes[key]) for key in groups}
    else:
        chosen = _by_share(sorted(groups, key=hashes.__getitem__), groups)
    return {name: chosen[key] for key, members in groups.items() for name in members}


def _group_of(name: str, group: str | None) -> str:
    if group is None:
        return name
    try:
        match = re.search(group, name)
    except re.error as error:
        raise DataError(f"--group {group} is no regular expression: {error}") from error
    if match is None:
        raise DataError(f"--group {group} finds nothing in {name!r}: it must fit every name")
    return match[1] if match.groups() else match[0]


def _by_fraction(digest: bytes) -> str:
    fraction = int.from_bytes(digest, "big") / 2**64
    return "train" if fraction < 0.8 else "validation" if fraction < 0.9 else "test"


def _by_share(order: list[str], groups: dict[str, list[str]]) -> dict[str, str]:
    """From the end of the order, a tenth of the names to test and to validation each."""
    if len(order) < 3:
        raise DataError(
            f"{len(order)} pictures or groups of them cannot be split in three: add some, or give "
            "the splits with --split-file"
        )
    names, left, chosen = sum(map(len, groups.values())), list(order), dict[str, str]()
    for split, needed in (("test", 2), ("validation", 1)):
        size = 0
        while not size or (size < round(names / 10) and len(left) > needed):
            chosen[key := left.pop()] = split
            size += len(groups[key])
    return chosen | dict.fromkeys(left, "train")


def _from_file(names: Sequence[str], file: Path) -> dict[str, str]:
    try:
        if file.suffix == ".csv":
            rows = csv.reader(file.read_text().splitlines())
            pairs = [(row[0].strip(), row[1].strip()) for row in rows if row]
            pairs = [pair for pair in pairs if pair != ("name", "split")]
        else:
            content = json.loads(file.read_text())
            nested = all(isinstance(value, list) for value in content.values())
            pairs = (
                [(name, split) for split, each in content.items() for name in each]
                if nested
                else list(content.items())
            )
    except (OSError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{file}: give {{split: [name, ...]}} as JSON, or the columns name and split as CSV "
            f"({error})"
        ) from error
    known, chosen = {*names}, {}
    for name, split in pairs:
        stem = name if name in known else str(Path(name).with_suffix(""))
        if stem not in known:
            raise DataError(f"{file} names {name!r}, and there is no such picture")
        if SPLIT_FOLDERS.get(split) is None:
            raise DataError(f"{file}: {name!r} is in {split!r}: use train, validation or test")
        if chosen.setdefault(stem, SPLIT_FOLDERS[split]) != SPLIT_FOLDERS[split]:
            raise DataError(f"{file}: {name!r} is in two splits")
    return chosen
