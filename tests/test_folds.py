"""The folds of a cross-validation: who is where, for any names and groups."""

import pickle
from collections import Counter

import numpy as np
import pytest

from flax_unet import folds
from flax_unet.pictures import DataError

#: By hand: the SHA-256 of a to h are in the order d f c b e h a g, which is dealt to 3 folds.
EXPECTED = [0, 0, 2, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("n, k", [(2, 2), (10, 3), (100, 5), (7, 7)])
def test_each_picture_is_in_one_fold_and_folds_are_as_large_as_each_other(n, k):
    names = [f"picture {i}" for i in range(n)]
    fold = folds.folds_of(names, k)
    sizes = Counter(fold)
    assert {*sizes} == {*range(k)} and max(sizes.values()) - min(sizes.values()) <= 1
    order = np.random.default_rng(0).permutation(n)
    assert folds.folds_of([names[i] for i in order], k) == [fold[i] for i in order]


def test_folds_are_the_same_on_every_machine():
    assert folds.folds_of([*"abcdefgh"], 3) == EXPECTED
    assert folds.folds_of([f"{x}.png" for x in "abcdefgh"], 3, group="^.") == EXPECTED


def test_folds_are_no_runs_of_the_sorted_names():
    """Names often have the order of time: neighbours show the same."""
    fold = folds.folds_of([f"{i:03}" for i in range(300)], 3)
    half = Counter(fold[:150])
    assert all(35 <= half[i] <= 65 for i in range(3))


def test_groups_are_never_divided():
    rng = np.random.default_rng(0)
    for k in (2, 3, 5):
        sizes = rng.integers(1, 9, 20)
        names = [f"p{patient}-{i}" for patient, n in enumerate(sizes) for i in range(n)]
        fold = folds.folds_of(names, k, group=r"p(\d+)")
        of = {}
        for name, i in zip(names, fold, strict=True):
            assert of.setdefault(name.split("-")[0], i) == i
        filled = Counter(fold)
        assert {*filled} == {*range(k)}
        assert max(filled.values()) - min(filled.values()) <= sizes.max()


def test_folds_have_as_many_pictures_although_groups_have_not():
    names = [f"big-{i}" for i in range(6)] + [*"abcdef"]
    fold = folds.folds_of(names, 2, group="[a-z]+")
    assert fold[:6] == [fold[0]] * 6 and fold[6:] == [1 - fold[0]] * 6


def test_pictures_of_one_name_are_together():
    assert len({*folds.folds_of(["a", "a", "a", "b"], 2)[:3]}) == 1


def test_impossible_folds_are_refused():
    with pytest.raises(DataError, match="the 3 pictures .* are 3 groups, too few for 4 folds"):
        folds.folds_of([*"abc"], 4)
    with pytest.raises(DataError, match="4 pictures .* are 2 groups, too few for 3 folds"):
        folds.folds_of(["a1", "a2", "b1", "b2"], 3, group="[a-z]")
    with pytest.raises(DataError, match=r"--group a\(\\d\)\|c: its first parentheses .* 'c'"):
        folds.folds_of(["a1", "a2", "c"], 2, r"a(\d)|c")
    with pytest.raises(DataError, match="--group x finds nothing in 'a'"):
        folds.folds_of([*"ab"], 2, group="x")
    with pytest.raises(ValueError, match="1 folds: there must be 2 or more"):
        folds.folds_of([*"ab"], 1)
    for i in (-1, 2):
        with pytest.raises(ValueError, match=f"fold {i} of 2: folds are numbered from 0 to 1"):
            folds.split({"train": [{"name": "a"}, {"name": "b"}]}, i, 2)


class Listed(list):
    classes = ("a", "b")


def source(text):
    return Listed({"name": name, "image": name.encode()} for name in text)


def test_runs_are_validated_on_a_fold_and_trained_on_the_others():
    sources = {"train": source("abcdef"), "validation": source("ghi"), "test": source("xyz")}
    validated = []
    for i in range(3):
        parts = folds.split(sources, i, 3)
        assert [*parts] == ["train", "validation", "test"] and parts["test"] is sources["test"]
        names = {split: [x["name"] for x in part] for split, part in parts.items()}
        assert len(names["train"]) == 6 and sorted(names["train"] + names["validation"]) == [
            *"abcdefghi"
        ]
        assert all(x["image"] == x["name"].encode() for x in parts["train"])
        assert names["train"] == sorted(names["train"])  # in the order of the protocol
        validated += names["validation"]
        assert parts["train"].classes == ("a", "b") and not hasattr(parts["train"], "ignore")
        again = pickle.loads(pickle.dumps(parts["train"]))  # grain's workers get it so
        assert [*again] == [*parts["train"]] and again[-1]["name"] == names["train"][-1]
    assert sorted(validated) == [*"abcdefghi"]
    assert {*folds.split({"train": source("ab")}, 0, 2)} == {"train", "validation"}


def test_a_group_of_the_folds_is_not_in_the_test_split():
    sources = {"train": source(["a1", "a2", "b1"]), "test": source(["c1", "b2"])}
    with pytest.raises(DataError, match="group 'b' is in the folds and in the split 'test'"):
        folds.split(sources, 0, 2, group="[a-z]")
    assert len(folds.split(sources, 0, 2)["test"]) == 2
