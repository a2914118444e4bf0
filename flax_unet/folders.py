"""Folders of pictures and masks: which files belong together, and to which split."""

import csv
import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flax_unet.pictures import DataError

SPLITS = ("train", "validation", "test")
MaskFiles = Literal["one", "class", "instance"]
#: Characters before the class in the name of a mask file.
SEPARATORS = ("_", "-", ".")
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

    With `mask_files` a picture has several masks, and may lack some:

    - `class`: a file for each of `classes`, in a subfolder CLASS, or named NAME_CLASS (with any of
      `SEPARATORS`);
    - `instance`: any number of files, one for each object, in a subfolder with the picture's name;
      or beside it, as in ID/images/ID.png, ID/masks/*.png.

    Args:
        images, masks: the folders.
        split: `train`, `validation` or `test`; None for all pairs.
        image_suffix, mask_suffix: end of the file names, before the dot, that is not in the name.
        split_file: a JSON file, {split: [name, ...]} or {name: split}, or a CSV file with the
            columns name and split. Other pairs are left out.
        group: a regular expression. Pairs in whose name it finds the same text, or the same first
            group, are in the same split; a split file or folders that divide them are refused.
        split_by: `share`, as above; or `name`: each name's hash alone chooses the split, so that
            adding pictures never moves one to another split, and the shares are about 80, 10, 10 %.
        mask_files: whether a picture has one mask file, or one for each class or object.
        classes: the names of the classes of such files.

    Attributes:
        mask_files: as given.
        classes: their names.
        without_files: those of which there is no file.
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
        mask_files: MaskFiles = "one",
        classes: Sequence[str] = (),
    ):
        if (mask_files == "class") != bool(classes):
            raise DataError(
                "--mask-files class needs --classes NAME..., without the background, and other "
                "--mask-files have none"
            )
        self.left_out: list[Path] = []
        self.mask_files, self.classes = mask_files, class_names(classes)
        image, mask = self._halves(Path(images), Path(masks), image_suffix, mask_suffix)
        if mask_files == "instance":
            image = _by_folder(image, mask)
        there = {index for each in mask.values() for index, _ in each}
        self.without_files = [c for i, c in enumerate(self.classes, 1) if i not in there]
        if mask_files != "one" and (empty := sorted(image.keys() - mask.keys())):
            raise DataError(
                f"{empty[0]!r} has no mask files of --mask-files {mask_files} ({len(empty)} such "
                "pictures in all): if nothing is there, give it one that is background everywhere"
            )
        if unpaired := sorted(image.keys() ^ mask.keys()):
            only = [(images, image.keys() - mask.keys()), (masks, mask.keys() - image.keys())]
            found = "; ".join(
                f"{', '.join(map(repr, sorted(names)[:3]))}{', ...' if len(names) > 3 else ''} "
                f"only in {folder}"
                for folder, names in only
                if names
            )
            raise DataError(
                f"files without a partner ({len(unpaired)}): {found}: give every picture a mask of "
                "the same name, or say how the names differ, --mask-suffix or --image-suffix"
            )
        if not image and Path(images) == Path(masks):
            raise DataError(
                f"{images} is given for images and for masks, and has no folders of these names: "
                "name the folder of the masks, or how their names end, --mask-suffix"
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
    ) -> tuple[dict[str, Path], dict[str, list[tuple[int, Path]]]]:
        """{name: file} of the images, and {name: [(class, file), ...]} of the masks."""
        if images.absolute() != masks.absolute():
            image = self._names(images, self._list(images), image_suffix)
            return image, self._masks(masks, self._list(masks), mask_suffix)
        files = self._list(images)
        suffixes = [mask_suffix] if mask_suffix else []
        suffixes += [separator + name for name in self.classes for separator in SEPARATORS]
        ours = [file for file in files if file.stem.endswith(tuple(suffixes))]
        if ours:
            others = sorted({*files} - {*ours})
            image = self._names(images, others, image_suffix)
            return image, self._masks(images, ours, mask_suffix)
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
            self._masks(images, mask, mask_suffix, MASK_FOLDERS),
        )

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

    def _masks(
        self, folder: Path, files: list[Path], suffix: str, dropped: Sequence[str] = ()
    ) -> dict[str, list[tuple[int, Path]]]:
        """{name: [(class, file), ...]} of the masks."""
        found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
        for name, file in self._names(folder, files, suffix, dropped).items():
            index = 1
            if self.mask_files == "instance":
                name = name.rpartition("/")[0]
            elif self.mask_files == "class":
                name, index = _class_of(name, self.classes)
            if not name or not index:
                self.left_out.append(file)
            else:
                found[name].append((index, file))
        if twice := [each for each in found.values() if len({i for i, _ in each}) < len(each)]:
            if self.mask_files == "class":
                raise DataError(f"{twice[0][0][1]} and {twice[0][1][1]} are of one class: keep one")
        return found

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: int) -> dict[str, Any]:  # type: ignore[override]
        name, image, masks = self._pairs[i]
        parts = [(index, file.read_bytes()) for index, file in masks]
        return {
            "name": name,
            "image": image.read_bytes(),
            "mask": parts[0][1] if self.mask_files == "one" else parts,
            "files": [str(image), *(str(file) for _, file in masks)],
        }


def _class_of(name: str, classes: Sequence[str]) -> tuple[str, int]:
    """The name of the picture, and the index of the class in the name of a mask, or 0."""
    *folders, last = name.split("/")
    for index, each in enumerate(classes, start=1):
        if each in folders:
            return "/".join([part for part in folders if part != each] + [last]), index
    # The longest: "big_cell" before "cell".
    for each in sorted(classes, key=len, reverse=True):
        for separator in SEPARATORS:
            if last.endswith(separator + each):
                return name.removesuffix(separator + each), classes.index(each) + 1
    return name, 0


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of classes that have mask files of their own, or those in one text file.

    Raises:
        DataError: a name cannot be that of such a class, or is there twice.
    """
    if len(names) == 1 and Path(names[0]).suffix == ".txt":
        try:
            names = [*filter(None, map(str.strip, Path(names[0]).read_text().splitlines()))]
        except (OSError, ValueError) as error:
            raise DataError(f"--classes {names[0]}: it cannot be read ({error})") from error
    for name in names:
        if name in ("", "background", "ignore") or "/" in name or list(names).count(name) > 1:
            raise DataError(
                f"--classes {' '.join(names)}: {name!r} cannot be a class with its own mask files, "
                "or is given twice"
            )
    return tuple(names)


def _by_folder(image: dict[str, Path], mask: dict[str, list[tuple[int, Path]]]) -> dict[str, Path]:
    """The images, those beside the folder of their masks named by their own folder."""
    alone = Counter(name.rpartition("/")[0] for name in image)

    def renamed(name: str) -> str:
        folder = name.rpartition("/")[0]
        return folder if name not in mask and folder in mask and alone[folder] == 1 else name

    return {renamed(name): file for name, file in image.items()}


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
            in folders of splits, these or the file divide a group, or there are fewer than three.
    """
    folders = {name: SPLIT_FOLDERS.get(name.split("/")[0].lower()) for name in names}
    divided = any("/" in name and folders[name] for name in names)
    if split_file is not None:
        return _undivided(_from_file(names, Path(split_file)), group)
    if divided:
        if others := [name for name in names if folders[name] is None]:
            raise DataError(
                f"{others[0]!r} is not in a folder of a split, and other pictures are: move it to "
                "train, val or test"
            )
        return _undivided({name: split for name, split in folders.items() if split}, group)
    groups = defaultdict(list)
    for name in names:
        groups[group_of(name, group)].append(name)
    hashes = {key: hashlib.sha256(key.encode()).digest()[:8] for key in groups}
    if split_by == "name":
        chosen = {key: _by_fraction(hashes[key]) for key in groups}
    else:
        chosen = _by_share(sorted(groups, key=hashes.__getitem__), groups)
    return {name: chosen[key] for key, members in groups.items() for name in members}


def _undivided(chosen: dict[str, str], group: str | None) -> dict[str, str]:
    """Splits that were given, after a look at whether a group is in two of them."""
    split_of: dict[str, str] = {}
    for name, split in chosen.items():
        key = group_of(name, group)
        if split_of.setdefault(key, split) != split:
            raise DataError(
                f"--group {group}: {key!r} is in {split_of[key]} and in {split}, as the split file "
                "or the folders say: move its pictures to one of them, or leave out --group"
            )
    return chosen


def group_of(name: str, group: str | None) -> str:
    """The text by which a picture is grouped, see `FolderSource`; without `group` its name.

    Raises:
        DataError: `group` is no regular expression, or it or its first parentheses find nothing in
            the name.
    """
    if group is None:
        return name
    try:
        match = re.search(group, name)
    except re.error as error:
        raise DataError(f"--group {group} is no regular expression: {error}") from error
    if match is None:
        raise DataError(f"--group {group} finds nothing in {name!r}: it must fit every name")
    found = match[1] if match.groups() else match[0]
    if found is None:
        raise DataError(
            f"--group {group}: its first parentheses enclose nothing in {name!r}: write "
            "alternatives inside of them, as in (a|b)"
        )
    return found


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
            rows = csv.reader(file.read_text("utf-8-sig").splitlines())
            pairs = [(row[0].strip(), row[1].strip()) for row in rows if any(row)]
            pairs = [pair for pair in pairs if pair != ("name", "split")]
        else:
            content = json.loads(file.read_text())
            nested = all(isinstance(value, list) for value in content.values())
            pairs = (
                [(name, split) for split, each in content.items() for name in each]
                if nested
                else list(content.items())
            )
        for name, split in pairs:
            if not (isinstance(name, str) and name and isinstance(split, str)):
                raise ValueError(f"{name!r} in {split!r}: write both as text, in quotes")
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
