"""Which files belong together, and to which split."""

import json
import os
import warnings
from collections import Counter

import numpy as np
import pytest
from drawn import encode, rgb

from flax_unet.folders import SPLITS, FolderSource, list_pictures, splits_of
from flax_unet.pictures import DataError

IMAGE, MASK = encode(rgb()), encode(np.eye(8, dtype=np.uint8))


def write(root, *files, content=b""):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)


def pairs(*args, **options):
    """{name: (image file, mask file)}, the files relative to the folder above the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = FolderSource(*args, **options)
    root = os.path.dirname(args[0])
    return {e["name"]: tuple(os.path.relpath(f, root) for f in e["files"]) for e in source}


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("{}.jpg", "{}_segmentation.png", {"mask_suffix": "_segmentation"}),  # ISIC
        ("{}.jpg", "{}_mask.gif", {"mask_suffix": "_mask"}),  # Carvana
        (
            "{}_training.tif",
            "{}_manual1.gif",
            {"image_suffix": "_training", "mask_suffix": "_manual1"},
        ),  # DRIVE
        ("{}.PNG", "{}.webp", {}),
    ],
)
def test_pairs_are_found_by_their_names_without_suffixes(tmp_path, image, mask, options):
    for i in range(3):
        write(tmp_path / "images", image.format(i))
        write(tmp_path / "masks", mask.format(i))
    expected = {f"{i}": (f"images/{image.format(i)}", f"masks/{mask.format(i)}") for i in range(3)}
    assert pairs(tmp_path / "images", tmp_path / "masks", **options) == expected


def test_pairs_in_one_folder_differ_by_the_suffix(tmp_path):
    write(tmp_path / "all", "a.jpg", "a_mask.png", "b.jpg", "b_mask.png")
    found = pairs(tmp_path / "all", tmp_path / "all", mask_suffix="_mask")
    assert found == {"a": ("all/a.jpg", "all/a_mask.png"), "b": ("all/b.jpg", "all/b_mask.png")}


def masks_of(source):
    """{name: [(class, file name), ...]}."""
    return {
        entry["name"]: [
            (index, os.path.basename(file))
            for (index, _), file in zip(entry["mask"], entry["files"][1:], strict=True)
        ]
        for entry in source
    }


@pytest.mark.parametrize(
    "layout",
    ["masks/{name}_{kind}.png", "masks/{kind}/{name}.png", "masks/{name}-{kind}.png"],
)
def test_a_mask_file_for_each_class_is_found_by_folder_or_suffix(tmp_path, layout):
    for name in ("p_1", "q/2"):
        write(tmp_path, f"images/{name}.png", layout.format(name=name, kind="cell"))
    write(tmp_path, layout.format(name="p_1", kind="nucleus"), "masks/notes.png")
    options = {"mask_files": "class", "classes": ("nucleus", "cell")}
    with pytest.warns(UserWarning, match="1 files are left out: .*notes.png"):
        found = masks_of(FolderSource(tmp_path / "images", tmp_path / "masks", **options))
    assert {name: sorted(i for i, _ in files) for name, files in found.items()} == {
        "p_1": [1, 2],
        "q/2": [2],
    }
    write(tmp_path, "masks/nucleus/q/2.png", "masks/q/2_nucleus.png")
    with pytest.raises(DataError, match="are of one class: keep one"):
        FolderSource(tmp_path / "images", tmp_path / "masks", **options)


def test_masks_of_classes_beside_the_pictures_are_found_by_their_suffix(tmp_path):
    write(tmp_path, *(f"p{i}{end}.png" for i in range(2) for end in ("", "_cell", "_nucleus")))
    source = FolderSource(tmp_path, tmp_path, mask_files="class", classes=("cell", "nucleus"))
    both = [(1, "p{}_cell.png"), (2, "p{}_nucleus.png")]
    expected = {f"p{i}": [(n, file.format(i)) for n, file in both] for i in range(2)}
    assert masks_of(source) == expected


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}/images/{}.png", "{}/masks/{}.png"),  # Data Science Bowl 2018
        ("images/{}.png", "masks/{}/{}.png"),
    ],
)
def test_mask_files_of_objects_are_found_in_the_pictures_folder(tmp_path, image, mask):
    for name in ("a", "b"):
        write(tmp_path, image.format(name, name), *(mask.format(name, f"o{i}") for i in range(3)))
    found = masks_of(FolderSource(tmp_path, tmp_path, mask_files="instance"))
    assert found == {name: [(1, f"o{i}.png") for i in range(3)] for name in ("a", "b")}


def test_a_class_whose_name_ends_with_another_is_found_in_any_order(tmp_path):
    write(tmp_path, "images/p.png", "masks/p_cell.png", "masks/p_big_cell.png")
    write(tmp_path, "images/q_cell.png", "masks/big_cell/q_cell.png")
    for classes in (("cell", "big_cell"), ("big_cell", "cell")):
        options = {"mask_files": "class", "classes": classes}
        found = masks_of(FolderSource(tmp_path / "images", tmp_path / "masks", **options))
        named = {name: {classes[i - 1] for i, _ in files} for name, files in found.items()}
        assert named == {"p": {"cell", "big_cell"}, "q_cell": {"big_cell"}}


@pytest.mark.parametrize(
    "classes", [["background", "a"], ["a", "ignore"], ["a", "a"], ["a", "b/c"]]
)
def test_names_that_no_class_with_files_can_have_are_refused(tmp_path, classes):
    write(tmp_path, "images/p.png", "masks/p_a.png")
    with pytest.raises(DataError, match="cannot be a class with its own mask files"):
        FolderSource(tmp_path / "images", tmp_path / "masks", mask_files="class", classes=classes)


def test_classes_of_separate_files_may_be_in_a_text_file_and_may_lack_files(tmp_path):
    write(tmp_path, "images/p.png", "masks/p_a.png")
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    options = {"mask_files": "class", "classes": [str(tmp_path / "names.txt")]}
    source = FolderSource(tmp_path / "images", tmp_path / "masks", **options)
    assert (source.classes, source.without_files) == (("a", "b"), ["b"])


def test_a_picture_without_mask_files_is_named(tmp_path):
    write(tmp_path, "images/p.png", "images/q.png", "masks/p/0.png")
    with pytest.raises(DataError, match="'q' has no mask files of --mask-files instance .1 such"):
        FolderSource(tmp_path / "images", tmp_path / "masks", mask_files="instance")


def test_classes_of_separate_files_are_needed_and_only_for_them(tmp_path):
    write(tmp_path, "images/a.png", "masks/a.png")
    for options in ({"mask_files": "class"}, {"mask_files": "instance", "classes": ("a",)}):
        with pytest.raises(DataError, match="--mask-files class needs --classes NAME"):
            FolderSource(tmp_path / "images", tmp_path / "masks", **options)


def test_splits_that_are_given_must_not_divide_a_group(tmp_path):
    file = tmp_path / "splits.json"
    file.write_text('{"train": ["a1", "a2"], "test": ["b1"]}')
    options = {"split_file": file, "group": "[a-z]"}
    assert splits_of(["a1", "a2", "b1"], **options) == {"a1": "train", "a2": "train", "b1": "test"}
    file.write_text('{"train": ["a1"], "validation": ["b1"], "test": ["a2"]}')
    with pytest.raises(
        DataError, match=r"--group \[a-z\]: 'a' is in train and in test, as the split"
    ):
        splits_of(["a1", "a2", "b1"], **options)
    with pytest.raises(DataError, match="'c' is in train and in validation"):
        splits_of(["train/c1", "val/c2", "test/b1"], group="/([a-z])")
    assert splits_of(["train/c1", "val/a2", "test/b1"], group="/([a-z])")["test/b1"] == "test"


def test_subfolders_are_part_of_the_name(tmp_path):
    for patient in ("p1", "p2"):
        write(tmp_path, f"images/{patient}/0.png", f"masks/{patient}/0.png")
    found = pairs(tmp_path / "images", tmp_path / "masks")
    assert found == {f"{p}/0": (f"images/{p}/0.png", f"masks/{p}/0.png") for p in ("p1", "p2")}
    assert list_pictures(tmp_path / "images") == []


@pytest.mark.parametrize("layout", ["{split}/{part}/{name}.png", "{part}/{split}/{name}.png"])
def test_folders_of_splits_are_the_splits(tmp_path, layout):
    expected = {}
    for folder, split in {"train": "train", "val": "validation", "Test": "test"}.items():
        for i in range(3):
            for part in ("images", "masks"):
                write(tmp_path / "set", layout.format(split=folder, part=part, name=i))
            expected[f"{folder}/{i}"] = split
    for split in SPLITS:
        names = {name for name in expected if expected[name] == split}
        assert set(pairs(tmp_path / "set", tmp_path / "set", split)) == names
    write(tmp_path / "set", *(f"{part}/more/9.png" for part in ("images", "masks")))
    with pytest.raises(DataError, match="'more/9' is not in a folder of a split"):
        pairs(tmp_path / "set", tmp_path / "set", "train")


@pytest.mark.parametrize("n", [3, 4, 10, 20, 45, 1000])
def test_the_shares_are_exact_and_no_split_is_empty(n):
    names = [f"{i:03d}" for i in range(n)]
    chosen = splits_of(names)
    number = Counter(chosen.values())
    tenth = max(1, round(n / 10))
    assert (number["validation"], number["test"]) == (tenth, tenth)
    assert number["train"] == n - 2 * tenth and chosen == splits_of(names[::-1])
    if n == 1000:  # not in the order of the names
        assert np.corrcoef(range(n), [chosen[name] == "train" for name in names])[0, 1] < 0.1
    with pytest.raises(DataError, match="2 pictures or groups of them cannot be split"):
        splits_of(["a", "b"])


def test_split_by_name_moves_no_picture_when_others_are_added():
    names = [f"picture-{i}" for i in range(5000)]
    chosen = splits_of(names, split_by="name")
    for split, fraction in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(list(chosen.values()).count(split) / 5000 - fraction) < 0.02
    assert splits_of(names[::7], split_by="name").items() <= chosen.items()


@pytest.mark.parametrize("group", [r"patient\d+", r"^(patient\d+)_frame"])
def test_groups_stay_together(group):
    names = [f"patient{p:02d}_frame{f:03d}" for p in range(20) for f in range(30)]
    for rule in ("share", "name"):
        chosen = splits_of(names, group=group, split_by=rule)
        splits = {name[:9]: set() for name in names}
        for name, split in chosen.items():
            splits[name[:9]].add(split)
        assert all(len(each) == 1 for each in splits.values())
    assert Counter(splits_of(names, group=group).values()) == {
        "train": 480,
        "validation": 60,
        "test": 60,
    }
    with pytest.raises(DataError, match=r"--group slide.d finds nothing in 'patient00_frame000'"):
        splits_of(names, group=r"slide\d")
    with pytest.raises(DataError, match="is no regular expression"):
        splits_of(names, group="(")


@pytest.mark.parametrize("form", ["lists", "names", "csv"])
def test_a_file_gives_the_splits_and_others_are_left_out(tmp_path, form):
    write(tmp_path, *(f"{part}/{name}.png" for part in ("images", "masks") for name in "abcd"))
    splits = {"train": ["a"], "validation": ["b.png"], "test": ["c"]}
    flat = {name: split for split, names in splits.items() for name in names}
    file = tmp_path / ("splits.csv" if form == "csv" else "splits.json")
    if form == "csv":
        rows = "".join(f"{name}, {split}\n" for name, split in flat.items())
        file.write_text("name,split\n" + rows)
    else:
        file.write_text(json.dumps(splits if form == "lists" else flat))
    folders = tmp_path / "images", tmp_path / "masks"
    for split, names in splits.items():
        assert [*pairs(*folders, split, split_file=file)] == [n[0] for n in names]
    with pytest.warns(UserWarning, match=r"1 files are left out: .*images/d.png"):
        assert len(FolderSource(*folders, split_file=file)) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": "train", "x": "test"}', "names 'x', and there is no such picture"),
        ('{"a": "holdout"}', "'a' is in 'holdout': use train"),
        ('{"train": ["a"], "test": ["a"]}', "'a' is in two splits"),
        ("[]", "give .*as JSON"),
        ("{", "give .*as JSON"),
        ('{"train": [0, 1], "test": [2]}', "0 in 'train': write both as text, in quotes"),
        ('{"a": {"x": 1}}', "'a' in {'x': 1}: write both as text"),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(tmp_path, content, words):
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(DataError, match=words):
        splits_of(["a", "b"], split_file=tmp_path / "splits.json")


def test_a_split_file_of_a_spreadsheet_may_have_a_mark_and_empty_rows(tmp_path):
    (file := tmp_path / "splits.csv").write_text("\ufeffname,split\na,train\n,\n\nb,test\n")
    assert splits_of(["a", "b"], split_file=file) == {"a": "train", "b": "test"}
    file.write_text("a,train\n,train\n")
    with pytest.raises(DataError, match="splits.csv: give .*'' in 'train': write both as text"):
        splits_of(["a", "b"], split_file=file)


def test_what_is_left_out_is_counted_and_named(tmp_path):
    write(tmp_path, *(f"{part}/{name}.png" for part in ("images", "masks") for name in "abc"))
    write(tmp_path, "images/notes.txt", "images/.hidden.png", "images/.cache/x.png")
    (tmp_path / "images" / "dead.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match="2 files are left out: .*dead.png, .*notes.txt"):
        source = FolderSource(tmp_path / "images", tmp_path / "masks")
    assert [file.name for file in source.left_out] == ["dead.png", "notes.txt"]
    assert len(source) == 3


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / "images" / "a.png").rename(
        os.fsdecode(os.fsencode(tmp_path / "images") + b"/l\xe9sion.png")
    )
    with pytest.raises(DataError, match=r"l\\xe9sion.png.*not UTF-8: rename it"):
        FolderSource(tmp_path / "images", tmp_path / "masks")


def test_the_same_folder_twice_needs_a_way_to_tell_masks_from_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="is given for images and for masks.*--mask-suffix"):
        FolderSource(tmp_path, tmp_path)


def test_a_split_or_a_file_of_classes_that_does_not_exist_is_refused(tmp_path):
    write(tmp_path, "images/a.png", "masks/a.png")
    both = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(DataError, match="there is no split 'val': choose one of train"):
        FolderSource(*both, "val")
    with pytest.raises(DataError, match="gone.txt: it cannot be read"):
        FolderSource(*both, mask_files="class", classes=[str(tmp_path / "gone.txt")])
