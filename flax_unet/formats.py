"""What the values of mask files mean: declared, or found once for an entire data set.

`find` looks at all masks of a source and returns a `MaskFormat`; `read` applies it to one file. A
file that contradicts the format is an error: nothing is guessed for one file alone.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from flax_unet.classes import IGNORE
from flax_unet.parallel import map_all
from flax_unet.pictures import DataError, has_alpha, open_picture

#: A grey value or the index of a palette, or a colour (red, green, blue).
Value = int | tuple[int, int, int]

REMEDIES = (
    "say what the values mean: --foreground VALUE... for one class, --classes NAME... or FILE for "
    "more, --ignore VALUE for pixels that do not count, --mask-threshold VALUE for a grey threshold"
)


@dataclass(frozen=True)
class MaskFormat:
    """What the values of mask files mean.

    Attributes:
        names: of the classes, in the order of their indices; two names are one class against the
            background.
        values: pairs of a value and the index of its class, or `classes.IGNORE`.
        rest: index of the class of all other values; None if they are errors.
        threshold: grey values above it are class 1, others 0; `values` and `rest` are not used.
        separate: whether a picture has a mask file for each class or object; the values of each
            file say 0 or 1, and the file's name which class.
        overlapping: whether separate classes may overlap: masks then have a channel for each class
            but the first, the background.

    Raises:
        DataError: a class is called `name`.
    """

    names: tuple[str, ...] = ("background", "foreground")
    values: tuple[tuple[Value, int], ...] = ((0, 0), (1, 1))
    rest: int | None = None
    threshold: float | None = None
    separate: bool = False
    overlapping: bool = False

    def __post_init__(self):
        if "name" in self.names:
            raise DataError("a class cannot be called name: that is the picture's name in reports")

    @property
    def channels(self) -> int:
        """Channels of the logits: two classes are learned as one yes or no."""
        if self.overlapping:
            return len(self.names) - 1
        return 1 if len(self.names) == 2 else len(self.names)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the classes that scores are given for, in the order of the channels."""
        return self.names[1:] if self.overlapping else self.names

    @property
    def by_colour(self) -> bool:
        """Whether the values are colours."""
        return any(isinstance(value, tuple) for value, _ in self.values)

    def __str__(self) -> str:
        if self.separate:
            each = replace(self, names=BINARY.names, separate=False)
            overlap = " that may overlap" * self.overlapping
            return f"separate files of {', '.join(self.names[1:])}{overlap}: {each}"
        if self.threshold is not None:
            return f"{self.names[1]} above {self.threshold:g}"
        names = dict(enumerate(self.names)) | {IGNORE: "not counted"}
        text = []
        for index, name in names.items():
            if values := [str(value) for value, i in self.values if i == index]:
                text.append(f"{name} {', '.join(values)}")
        if self.rest is not None:
            text.append(f"{names[self.rest]} elsewhere")
        return "; ".join(text)


#: Masks of 0 and 1, as TFDS data sets hold them.
BINARY = MaskFormat()


def to_json(mask_format: MaskFormat) -> dict[str, Any]:
    """A format as JSON."""
    return json.loads(json.dumps(vars(mask_format)))


def from_json(content: dict[str, Any]) -> MaskFormat:
    """The format that `to_json` wrote."""
    values = tuple((tuple(v) if isinstance(v, list) else v, i) for v, i in content["values"])
    return MaskFormat(**(content | {"names": tuple(content["names"]), "values": values}))


def of_indices(mask_format: MaskFormat) -> MaskFormat:
    """The format of masks that hold indices of the same classes, see `data.encode_pair`."""
    several = mask_format.overlapping
    indices = (0, 1) if several else range(len(mask_format.names))
    values = tuple((i, i) for i in (*indices, IGNORE))
    return replace(mask_format, values=values, rest=None, threshold=None, separate=several)


def read(picture: Image.Image, mask_format: MaskFormat, name: str = "mask") -> np.ndarray:
    """A mask as class indices and `IGNORE`, uint8 [H, W].

    Raises:
        DataError: it is transparent in places, or has a value without a meaning.
    """
    if mask_format.threshold is not None:
        return (_grey(picture, name) > mask_format.threshold).astype(np.uint8)
    if picture.format in ("JPEG", "MPO"):
        raise DataError(
            f"{name}: JPEG changes the values of a mask: save it as PNG, or set --mask-threshold"
        )
    if mask_format.by_colour:
        values = _packed(picture, name)
    elif (picture := _opaque(picture, name)).mode in ("L", "P"):
        # Pillow's histogram and table are several times as fast as NumPy's.
        classes, known = _byte_table(mask_format)
        present = np.flatnonzero(picture.histogram()).tolist()
        if all(known[value] for value in present):
            same = all(classes[value] == value for value in present)
            return np.asarray(picture if same else picture.point(classes))
        values = np.asarray(picture)
    else:
        values = _grey(picture, name)
    index, known = _look_up(values, mask_format)
    if not known.all():
        wrong = np.unique(values[~known])[:8]
        listed = ", ".join(str(_unpacked(v) if mask_format.by_colour else v) for v in wrong)
        raise DataError(
            f"{name}: it has the values {listed}, but the masks of this data set should have "
            f"{mask_format}. {REMEDIES[0].upper()}{REMEDIES[1:]}"
        )
    return index


def read_separate(
    files: Sequence[tuple[int, Image.Image, str]], mask_format: MaskFormat
) -> np.ndarray:
    """A mask from separate files, uint8 [H, W, C]: class indices, or 0 and 1 of each class.

    Args:
        files: index of the class, mask and name of each.
        mask_format: see `MaskFormat.separate`.

    Raises:
        DataError: as `read`; or exclusive classes overlap.
    """
    width, height = files[0][1].size
    channels = np.zeros((height, width, len(mask_format.names)), np.uint8)
    for index, picture, name in files:
        mask = read(picture, mask_format, name)
        channels[..., index] = np.maximum(channels[..., index], mask)
    channels = channels[..., 1:]
    if mask_format.overlapping:
        return channels
    number = (channels == 1).sum(-1)
    if number.max() > 1:
        raise DataError(
            f"{files[0][2]}: its classes overlap in {(number > 1).sum()} pixels: use --overlapping "
            "if they may, for a yes or no for each class"
        )
    index = (channels == 1) @ np.arange(1, len(mask_format.names), dtype=np.uint8)
    ignored = (channels == IGNORE).any(-1) & (number == 0)
    return np.where(ignored, np.uint8(IGNORE), index)[..., None]


@lru_cache(maxsize=8)
def _table(mask_format: MaskFormat) -> tuple[np.ndarray, np.ndarray]:
    """The values, packed and sorted, and their classes."""
    pairs = sorted((_pack(v) if isinstance(v, tuple) else v, i) for v, i in mask_format.values)
    return np.array([v for v, _ in pairs]), np.array([i for _, i in pairs], np.uint8)


@lru_cache(maxsize=8)
def _byte_table(mask_format: MaskFormat) -> tuple[list[int], list[bool]]:
    """The class of each value of a byte, and whether it has one."""
    classes, known = _look_up(np.arange(256), mask_format)
    return classes.tolist(), known.tolist()


def _look_up(values: np.ndarray, mask_format: MaskFormat) -> tuple[np.ndarray, np.ndarray]:
    """The class of each value, and whether it has one."""
    keys, index = _table(mask_format)
    place = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    known = keys[place] == values
    if mask_format.rest is None:
        return index[place], known
    return np.where(known, index[place], np.uint8(mask_format.rest)), np.ones_like(known)


def _pack(colour: tuple[int, int, int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _unpacked(value: int) -> tuple[int, int, int]:
    return int(value) >> 16, int(value) >> 8 & 255, int(value) & 255


def _opaque(picture: Image.Image, name: str) -> Image.Image:
    """The picture without its alpha channel, which must be opaque."""
    if picture.mode.startswith("I") and "transparency" in picture.info:
        raise DataError(f"{name}: it has 16 bits and a transparent grey: save it without")
    if has_alpha(picture):
        if picture.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            raise DataError(f"{name}: it has transparent pixels: save masks without transparency")
        if picture.mode in ("LA", "PA", "RGBA"):
            return picture.convert({"LA": "L", "PA": "P", "RGBA": "RGB"}[picture.mode])
    return picture


def _packed(picture: Image.Image, name: str) -> np.ndarray:
    """Colours as red << 16 | green << 8 | blue, int32 [H, W]."""
    rgb = np.asarray(_opaque(picture, name).convert("RGB"), np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _grey(picture: Image.Image, name: str) -> np.ndarray:
    """Grey values or palette indices, [H, W]."""
    picture = _opaque(picture, name)
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode not in ("L", "P") and not picture.mode.startswith(("I", "F")):
        rgb = np.asarray(picture.convert("RGB"))
        if (rgb[..., :1] != rgb[..., 1:]).any():
            raise DataError(
                f"{name}: it has colours, and not grey values: name the colours of the classes "
                "with --classes FILE"
            )
        return rgb[..., 0]
    values = np.asarray(picture)
    if picture.mode == "F" and not np.isfinite(values).all():
        raise DataError(f"{name}: it has values that are not finite: replace them")
    return values


# Finding out


class _Facts(NamedTuple):
    """What one mask says about the format."""

    name: str
    lossy: bool
    values: frozenset[float]  # grey values or palette indices
    areas: bool  # whether a value between the extremes fills more than an edge
    border: float  # fraction of its border in the larger half of the values
    reversed_palette: bool  # whether its first colour is white, its second black


def _look(picture: Image.Image, name: str) -> _Facts:
    values = _grey(picture, name)
    present = np.flatnonzero(picture.histogram()) if picture.mode in "LP" else np.unique(values)
    top = 255 if present.max() <= 255 else 65535
    between = (values > top / 8) & (values < top * 7 / 8)
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    colours = picture.getpalette() if picture.mode == "P" else None
    return _Facts(
        name=name,
        lossy=picture.format in ("JPEG", "MPO"),
        values=frozenset(present.tolist()),
        areas=bool(between.any() and ndimage.binary_erosion(between, iterations=2).any()),
        border=float((edge > present.max() / 2).mean()),
        reversed_palette=bool(colours and colours[:6] == [255] * 3 + [0] * 3),
    )


def find(
    *sources: Sequence[dict[str, Any]],
    names: Sequence[str] = (),
    foreground: Sequence[int] = (),
    ignore: Sequence[int] = (),
    threshold: float | None = None,
    overlapping: bool = False,
) -> MaskFormat:
    """The format of all masks of some sources, as far as it is not declared.

    Without a declaration it must be clear: masks of 0 and 1, or of 0 and 255 or 65535, also with
    soft edges (antialiasing, JPEG), which are divided at half.

    Args:
        sources: see `flax_unet.data`.
        names: of the classes, for masks of their indices; or one file with names and values, see
            `read_classes`. If masks are separate files, the classes of these files.
        foreground: values of the one class; all others are background.
        ignore: values of pixels that do not count.
        threshold: grey values above it are foreground.
        overlapping: whether the classes of separate files may overlap.

    Raises:
        DataError: the declarations contradict each other, or the format is not clear; the message
            names a file, its values and the flags.
    """
    first = sources[0] if sources else []
    if len(first) and not isinstance(first[0]["mask"], bytes):
        if overlapping and len(names) < 2:
            raise DataError("--overlapping needs --mask-files class with at least two --classes")
        each = _find(*sources, names=(), foreground=foreground, ignore=ignore, threshold=threshold)
        listed = ("background", *names) if names else each.names
        return replace(each, names=listed, separate=True, overlapping=overlapping)
    if overlapping:
        raise DataError("--overlapping needs --mask-files class")
    return _find(*sources, names=names, foreground=foreground, ignore=ignore, threshold=threshold)


def _find(
    *sources: Sequence[dict[str, Any]],
    names: Sequence[str],
    foreground: Sequence[int],
    ignore: Sequence[int],
    threshold: float | None,
) -> MaskFormat:
    if sum(map(bool, (names, foreground, threshold is not None))) > 1:
        raise DataError("give only one of --classes, --foreground and --mask-threshold")
    if threshold is not None:
        if ignore:
            raise DataError("--ignore does not go with --mask-threshold: use --foreground")
        return MaskFormat(values=(), threshold=threshold)
    not_counted = tuple((value, IGNORE) for value in ignore)
    if names:
        declared, values = read_classes(names)
        return MaskFormat(declared, _distinct((*values, *not_counted)))
    if foreground:
        values = tuple((value, 1) for value in foreground)
        return MaskFormat(values=_distinct((*values, *not_counted)), rest=0)
    entries = [(source, i) for source in sources for i in range(len(source))]
    return _discover(list(chain.from_iterable(map_all(_survey, entries))), ignore)


def _survey(entry: tuple[Sequence[dict[str, Any]], int]) -> list[_Facts]:
    source, i = entry
    return [_look(open_picture(data, name), name) for _, data, name in files_of(source[i])]


def files_of(example: dict[str, Any]) -> list[tuple[int, bytes, str]]:
    """Index of the class, encoded bytes and name of each mask file of an entry of a source."""
    masks = example["mask"]
    masks = [(1, masks)] if isinstance(masks, bytes) else masks
    names = example.get("files", (None, *[f"mask {example['name']}"] * len(masks)))[1:]
    return [(index, data, name) for (index, data), name in zip(masks, names, strict=True)]


def _discover(facts: list[_Facts], ignore: Sequence[int]) -> MaskFormat:
    union = set().union(*(each.values for each in facts)) - set(ignore)
    low, high = min(union, default=0), max(union, default=0)
    not_counted = tuple((value, IGNORE) for value in ignore)
    lossy = next((each for each in facts if each.lossy), None)
    if low >= 0 and high == 0:
        raise DataError(f"{facts[0].name} and all other masks are empty (0 everywhere)")
    for each in facts:
        if each.reversed_palette and each.values <= {0, 1}:
            raise DataError(
                f"{each.name}: index 0 of its palette is white and 1 black, so it is not clear "
                f"which is the foreground: --foreground 0 or --foreground 1"
            )
    if union <= {0, high} and high in (1, 255, 65535) and not lossy:
        found = MaskFormat(values=_distinct(((0, 0), (int(high), 1), *not_counted)))
    elif not ignore and _soft(facts, union, high):
        found = MaskFormat(values=(), threshold=(255 if high <= 255 else 65535) / 2)
    else:
        example = max(facts, key=lambda each: len(each.values - {0, 255}))
        shown = ", ".join(f"{value:g}" for value in sorted(example.values)[:12])
        hint = "; JPEG changes the values of masks" if lossy else ""
        raise DataError(f"{example.name} has the values {shown}{hint}: {REMEDIES}")
    white = [each for each in facts if each.border > 0.5]
    if len(white) > len(facts) / 2:
        raise DataError(
            f"{white[0].name} and {len(white) - 1} of {len(facts) - 1} other masks are white along "
            f"most of their border: --foreground 0 if white is the background, else --foreground "
            f"{high:g}"
        )
    return found


def _soft(facts: list[_Facts], union: set[float], high: float) -> bool:
    """Whether the values are two extremes and the soft edges between them."""
    top = 255 if high <= 255 else 65535
    below = [value for value in union if 0 < value < top / 2]
    above = [value for value in union if top / 2 <= value < top]
    return (
        min(union) >= 0
        and high >= top * 7 / 8
        and min(len(below), len(above)) >= 2  # a few values are labels, not edges
        and not any(each.areas for each in facts)
    )


def _distinct(values: tuple[tuple[Any, int], ...]) -> tuple[tuple[Value, int], ...]:
    number = Counter(value for value, _ in values)
    if twice := [value for value, n in number.items() if n > 1]:
        raise DataError(f"the value {twice[0]} is declared twice: give each value one meaning")
    if len({isinstance(value, tuple) for value in number}) > 1:
        raise DataError("grey values and colours are declared together: use one kind")
    return values


def read_classes(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[Value, int], ...]]:
    """The names of classes and their values, from names or from one file.

    A text file has a name per line; the value of a class is its index, as for names. A JSON file
    maps each name to its value, its colour such as "#ff0000", or a list of them. A CSV file has the
    columns name, value or name, red, green, blue. A class `ignore` does not count.

    Raises:
        DataError: the file cannot be read, or there are fewer than two classes.
    """
    table: dict[str, list[Value]] = {name: [i] for i, name in enumerate(names)}
    if len(names) == 1:
        file = Path(names[0])
        try:
            table = {name: _values(entry) for name, entry in _read_table(file).items()}
        except (OSError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise DataError(
                f"--classes {names[0]}: give at least two names, or a text, JSON or CSV file with "
                f"names and values ({error})"
            ) from error
    counted = [name for name in table if name != "ignore"]
    if len(counted) < 2 or len(counted) > IGNORE:
        raise DataError(
            f"there are {len(counted)} classes: give 2 to {IGNORE}, with the background"
        )
    index = {name: i for i, name in enumerate(counted)} | {"ignore": IGNORE}
    return tuple(counted), tuple((v, index[n]) for n, each in table.items() for v in each)


def _read_table(file: Path) -> dict[str, Any]:
    text = file.read_text("utf-8-sig")
    if file.suffix == ".json":
        return dict(json.loads(text).items())
    if file.suffix == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
        if not rows[0][1].isdigit():  # a header
            rows = rows[1:]
        return {
            name: int(v[0]) if len(v) < 3 else bytes(map(int, v[:3])).hex() for name, *v in rows
        }
    return {line.strip(): i for i, line in enumerate(filter(str.strip, text.splitlines()))}


def _values(entry: Any) -> list[Value]:
    """The values in an entry of a table: a number, a colour, or a list of them."""
    if type(entry) is int:
        return [entry]
    if isinstance(entry, str):
        return [_unpacked(int(entry.removeprefix("#"), 16))]
    if isinstance(entry, list):
        return [value for each in entry for value in _values(each)]
    raise ValueError(f"{entry!r} is neither a number nor a colour")
