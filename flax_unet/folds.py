"""The folds of a cross-validation: each is validated once, and trained on in all other runs.

    parts = split(sources, 0, 5)  # train, validation, and test as it was

Folds are made of the training and the validation pictures. The test pictures stay what they are.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

from flax_unet.folders import group_of
from flax_unet.pictures import DataError

Source = Sequence[dict[str, Any]]

#: The splits whose pictures are in the folds.
SPLITS = "train", "validation"


class Rows(Sequence):
    """Some pictures of several sources, one source after the other.

    Args:
        sources: see `flax_unet.data`; what the first one says of itself (`classes`, `mask_files`
            and so on) holds for all.
        rows: which pictures, as (source, index).
    """

    def __init__(self, sources: Sequence[Source], rows: Sequence[tuple[int, int]]):
        self._sources, self._rows = sources, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:  # type: ignore[override]
        source, index = self._rows[i]
        return self._sources[source][index]

    def where(self, chosen: Sequence[bool]) -> "Rows":
        """The chosen ones of these pictures."""
        return Rows(self._sources, list(compress(self._rows, chosen)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled there are no sources yet
            raise AttributeError(name)
        return getattr(self._sources[0], name)


def folds_of(names: Sequence[str], k: int, group: str | None = None) -> list[int]:
    """The fold of each picture, from 0 to k - 1; it depends on the names alone.

    The groups, the largest ones first and others in the order of a hash of their text, go to the
    fold that has the fewest pictures. So folds of single pictures differ by one picture at most.

    >>> folds_of(["ann-1", "ann-2", "bob-1", "eve-1"], 2, group="[a-z]+")
    [0, 0, 1, 1]

    Args:
        names: of the pictures; those with the same name are a group.
        k: number of folds, 2 or more.
        group: regular expression. Pictures in whose names it finds the same text, or the same first
            group, are in the same fold. By default each picture is a group.

    Raises:
        DataError: there are fewer groups than folds, or a name has no group.
        ValueError: k is less than 2.
    """
    if k < 2:
        raise ValueError(f"{k} folds: there must be 2 or more")
    keys = [group_of(name, group) for name in names]
    sizes = Counter(keys)
    if len(sizes) < k:
        raise DataError(
            f"the {len(names)} pictures of {' and '.join(SPLITS)} are {len(sizes)} groups, too few "
            f"for {k} folds: take fewer folds, or add pictures"
        )
    hashes = {key: hashlib.sha256(key.encode()).digest() for key in sizes}
    filled, fold = [0] * k, {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], hashes[key])):
        fold[key] = filled.index(min(filled))
        filled[fold[key]] += sizes[key]
    return [fold[key] for key in keys]


def together(sources: Mapping[str, Source]) -> Rows:
    """The pictures of all folds: those of training and of validation."""
    parts = [sources[name] for name in SPLITS if name in sources]
    return Rows(parts, [(part, i) for part, source in enumerate(parts) for i in range(len(source))])


def split(
    sources: Mapping[str, Source], i: int, k: int, group: str | None = None
) -> dict[str, Source]:
    """The sources of a run that is validated on fold i and trained on the other folds.

    Args:
        sources: the splits of a data set, with train and validation or one of them.
        i: the fold, from 0 to k - 1.
        k, group: as `folds_of` takes them.

    Returns:
        `train` and `validation` of this fold; other splits as they are.

    Raises:
        DataError: as `folds_of`, or a group is in the folds and in another split.
        ValueError: k is less than 2, or i is no fold.
    """
    if not 0 <= i < k:
        raise ValueError(f"fold {i} of {k}: folds are numbered from 0 to {k - 1}")
    pictures = together(sources)
    names = [picture["name"] for picture in pictures]  # reads the pictures, too
    fold = folds_of(names, k, group)
    if group is not None:
        groups = {group_of(name, group) for name in names}
        for key in sources.keys() - {*SPLITS}:
            others = {group_of(picture["name"], group) for picture in sources[key]}
            if both := sorted(groups & others):
                raise DataError(
                    f"group {both[0]!r} is in the folds and in the split {key!r}: put all its "
                    "pictures into one of them"
                )
    validation = [of == i for of in fold]
    chosen = {"train": [not x for x in validation], "validation": validation}
    return {**sources, **{name: pictures.where(each) for name, each in chosen.items()}}
