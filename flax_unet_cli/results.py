"""What predict writes: the names, all known before any work, the files, and the tables."""

import csv
import errno
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flax_unet import folders, objects, video
from flax_unet.pictures import DataError

#: Files that are named in an error or in the last line; of the others the number is given.
NAMED = 5
#: Boxes in a cell: spreadsheets cut what has more than 32,767 characters.
BOXES = 1000


@dataclass(frozen=True)
class Task:
    """A picture or video, and the files that are made of it."""

    file: Path
    name: str
    """Its path in the folder given; of a file that was given itself, its name."""
    results: tuple[Path, ...]

    @property
    def is_video(self) -> bool:
        return is_video(self.file)


@dataclass
class Plan:
    """All that is to be done."""

    tasks: list[Task] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Names of files in the folders that are neither pictures nor videos, and of linked folders."""
    unreadable: list[OSError] = field(default_factory=list)
    """Of folders."""


def is_video(file: Path) -> bool:
    """Whether a file is taken for a video, by its suffix."""
    return file.suffix.lower() in video.SUFFIXES


def plan(
    inputs: Iterable[Path],
    out: Path,
    *,
    ends: Sequence[str],
    video_ends: Sequence[str],
    tables: Sequence[str] = (),
    overwrite: bool = False,
) -> Plan:
    """Find the pictures and videos, and name their results.

    Folders are searched with their subfolders, and the results are in the same subfolders of `out`.
    Hidden files are left out, and so is `out` if it is one of the subfolders.

    Args:
        inputs: files and folders.
        out: folder of the results.
        ends, video_ends: what the names of a picture's and a video's results end with.
        tables: names of files for all of them.
        overwrite: whether results may exist already.

    Raises:
        DataError: there is nothing to do; or a result exists, or would overwrite an input or
            another result, also through links.
    """
    planned = Plan()
    for given in inputs:
        found = _search(given, out, planned) if given.is_dir() else [Path(given.name)]
        root = given if given.is_dir() else given.parent
        for name in found:
            file, target = root / name, out / name.parent
            own = video_ends if is_video(file) else ends
            results = tuple(target / f"{name.stem}{end}" for end in own)
            planned.tasks.append(Task(file, str(name), results))
    if not planned.tasks:
        raise DataError("no pictures: give files, or folders with pictures")
    _check(planned.tasks, [out / name for name in tables], overwrite)
    return planned


def _search(folder: Path, out: Path, planned: Plan) -> list[Path]:
    """The pictures and videos in a folder and its subfolders, relative to it, sorted."""
    found, own = [], os.path.realpath(out)
    for here, subfolders, names in os.walk(folder, onerror=planned.unreadable.append):
        relative = Path(here).relative_to(folder)
        visible = sorted(x for x in subfolders if not x.startswith("."))
        links = [x for x in visible if (Path(here) / x).is_symlink()]
        planned.left_out += [str(relative / x) for x in links]
        subfolders[:] = [
            x for x in visible if x not in links and os.path.realpath(Path(here) / x) != own
        ]
        for file in sorted(relative / x for x in names if not x.startswith(".")):
            if file.suffix.lower() in folders.SUFFIXES or is_video(file):
                found.append(file)
            else:
                planned.left_out.append(str(file))
    return sorted(found)


def _check(tasks: Sequence[Task], tables: Sequence[Path], overwrite: bool) -> None:
    """Raise DataError if a result exists, or two files would have one place."""
    results: list[tuple[Path, Any]] = [(table, "all pictures") for table in tables]
    results += [(result, task.file) for task in tasks for result in task.results]
    # Not Path.resolve, which raises if links form a circle.
    owners: dict[str, Any] = {os.path.realpath(task.file): task.file for task in tasks}
    for result, owner in results:
        place = os.path.realpath(result)
        if place in owners:
            raise DataError(
                f"{result}, a result of {owner}, would overwrite {owners[place]} or a result of "
                "it: rename one, or use another --out"
            )
        owners[place] = owner
    existing = [result for result, _ in results if os.path.lexists(result)]
    if existing and not overwrite:
        raise DataError(
            f"these results exist already: {listed(existing)}: write over them with --overwrite, "
            "or use another --out"
        )
    for result in existing:
        if result.is_dir() and not result.is_symlink():
            raise DataError(f"{result} is a folder: use another --out")


def in_a_name(text: str) -> str:
    """The name of a class as part of a file's name."""
    return re.sub(r"[^\w .+-]", "_", text)


def printable(text: Any) -> str:
    """A name or message in one line, with escapes for what a terminal would not show as it is."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def listed(names: Sequence[Any]) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(printable(name) for name in names[:NAMED])
    return text + f" and {len(names) - NAMED} more" * (len(names) > NAMED)


def save(file: Path, content: Image.Image | np.ndarray, overwrite: bool) -> None:
    """Write a picture as PNG, or an array as `.npy`, in one move: none is ever half written.

    Raises:
        OSError: it cannot be written, or has appeared since the results were planned.
    """
    part = file.with_name(f".predict-{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            if isinstance(content, Image.Image):
                content.save(stream, "PNG")
            else:
                np.save(stream, content)
        if not overwrite and os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, "it has appeared meanwhile", str(file))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


class Table:
    """A CSV file that has each row as soon as it is known, so that a killed run leaves the rows.

    Text that a spreadsheet would take for a formula begins with an apostrophe in the file.

    Args:
        file: which must not exist, unless `overwrite`.
        columns: names of the columns.
    """

    def __init__(self, file: Path, columns: Sequence[str], overwrite: bool):
        if overwrite:
            file.unlink(missing_ok=True)  # opened as it is, a link would be written through
        self.columns = columns
        self._stream = file.open("x", newline="", encoding="utf-8", errors="backslashreplace")
        self.add(columns)

    def add(self, *rows: Sequence[Any]) -> None:
        """Write rows: texts, numbers, None for an empty cell."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_cell(x) for x in row] for row in rows)
        self._stream.write(text.getvalue())
        self._stream.flush()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return round(value, 6) if isinstance(value, float) else value


def columns(names: Sequence[str], overlapping: bool) -> list[str]:
    """The columns of a prediction in a table, see `measure`.

    Args:
        names: of the channels of the probabilities.
        overlapping: whether the classes may overlap.
    """
    each = []
    for i, name in enumerate(names):
        each += [f"{name}_pixels", f"{name}_fraction"]
        if _has_objects(i, names, overlapping):
            each += [f"{name}_objects", f"{name}_mean_probability", f"{name}_boxes"]
    return each


def _has_objects(i: int, names: Sequence[str], overlapping: bool) -> bool:
    """Whether a class is something: the first of exclusive classes is the background."""
    return i > 0 or overlapping or len(names) == 1


def measure(
    mask: np.ndarray,
    proba: np.ndarray,
    names: Sequence[str],
    overlapping: bool,
    most: int | None = None,
) -> tuple[list[Any], list[list[Any]]]:
    """The cells of a prediction in a table, and a row for each of its objects.

    Args:
        mask: from `classes.decide`.
        proba: float32 [H, W, K].
        names: of the K channels.
        overlapping: whether the classes may overlap.
        most: rows for each class, at least `BOXES`: those of the largest objects. None for all.

    Returns:
        For each class its pixels, their fraction of the image, and, but for the background, the
        number of its objects, the mean probability of its pixels (None if there are none) and the
        boxes of the largest objects as JSON. And the rows: class, area, x, y, width, height, x and
        y of the centroid, mean probability.
    """
    cells, rows = [], []
    for i, name in enumerate(names):
        of_class = mask[..., i] == 1 if overlapping or len(names) == 1 else mask[..., 0] == i
        area = int(np.count_nonzero(of_class))
        cells += [area, area / of_class.size]
        if _has_objects(i, names, overlapping):
            n, found = objects.largest(of_class, proba[..., i], most)
            total = float(proba[..., i].sum(where=of_class, dtype=np.float64))
            boxes = json.dumps([each.box for each in found[:BOXES]], separators=(",", ":"))
            cells += [n, total / area if area else None, boxes]
            rows += [
                [name, each.area, *each.box, *each.centroid, each.mean_probability]
                for each in found
            ]
    return cells, rows
