"""The program predict: what it writes, and what it leaves alone."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import rgb
from PIL import Image

from flax_unet import draw, formats, images, objects, pack, video
from flax_unet.formats import MaskFormat
from flax_unet.model import UNet
from flax_unet_cli import predict, results

STRONG = json.loads((Path(__file__).parent.parent / "models/strong/model.json").read_text())


def save_model(folder, mask_format=formats.BINARY):
    """A network of random parameters; the tests replace its probabilities."""
    net = UNet(
        features=(4, 8), num_classes=mask_format.channels, overlapping=mask_format.overlapping
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    about = dict(STRONG["about"], masks=formats.to_json(mask_format))
    about["settings"] = dict(about["settings"], image_size=32)
    pack.save(folder, pack.Packed(net, variables, 32, about))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "polyp", MaskFormat(("rest", "polyp")))


@pytest.fixture
def bright(monkeypatch):
    """Probabilities are the red, green and blue of the picture."""

    def probabilities(context, images):
        return iter([x[..., : context.model.num_classes] / np.float32(255) for x in images])

    monkeypatch.setattr(predict, "probabilities", probabilities)


@pytest.fixture
def run(model, bright, tmp_path, capsys):
    """Run the program; return its exit code, output and errors."""

    def run(*words, folder=model, out="out"):
        command = ["--model", folder, "--out", tmp_path / out, *words]
        code = predict.main([str(word) for word in command])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def picture(file, size=(20, 30), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb(seed, size)).save(file, "PNG")
    return file


def rows(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def files(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())


def array(file):
    return np.asarray(Image.open(file))


# Results


def test_each_result_is_what_its_name_says(run, tmp_path):
    # Higher than the strips that are drawn at a time; with borders across them.
    y, x = np.mgrid[:600, :50]
    waves = 128 + 120 * np.sin(x / 9 + y / 5)
    image = np.stack([waves, 255 - waves, x * 4], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    kinds = ["mask", "overlay", "outline", "probabilities", "probabilities-npy"]
    assert run(tmp_path / "a.png", "--threshold", "0.7", "--save", *kinds)[0] == 0
    out, proba = tmp_path / "out", image[..., :1] / np.float32(255)
    ends = ["mask.png", "outline.png", "overlay.png", "probability.npy", "probability.png"]
    assert files(out) == [*(f"a-{end}" for end in ends), "predictions.csv"]
    mask = proba[..., 0] > 0.7
    np.testing.assert_array_equal(array(out / "a-mask.png"), mask * np.uint8(255))
    with Image.open(out / "a-probability.png") as saved:
        assert saved.mode == "I;16"
        expected = np.round(proba[..., 0].astype(np.float64) * 65535)
        np.testing.assert_array_equal(np.asarray(saved), expected)
    saved = np.load(out / "a-probability.npy")
    assert saved.dtype == np.float32
    np.testing.assert_array_equal(saved, proba)
    overlay = draw.overlay(image, proba[..., 0] * mask)
    np.testing.assert_array_equal(array(out / "a-overlay.png"), overlay)
    outlined = image.copy()
    outlined[draw.outline(mask)] = draw.PREDICTED
    np.testing.assert_array_equal(array(out / "a-outline.png"), outlined)


def test_probabilities_of_16_bits_are_rounded_and_stay_in_range():
    proba = np.array([[0, 1, 0.5, 1.0000002, -1e-9, 0.3, 1 / 65535 * 1.4999]], np.float32)
    exact = [0, 65535, 32768, 65535, 0, round(float(np.float32(0.3)) * 65535), 1]
    assert predict.as_16_bits(proba).tolist() == [exact]


def test_the_results_of_exclusive_and_of_overlapping_classes(run, tmp_path):
    image = rgb(3, (40, 70))
    Image.fromarray(image).save(tmp_path / "a.png")
    proba, kinds = (
        image / np.float32(255),
        ["mask", "outline", "probabilities", "probabilities-npy"],
    )
    index = proba.argmax(-1)
    names = ("rest", "nucleus/cell", "=x")
    exclusive = save_model(tmp_path / "exclusive", MaskFormat(names))
    assert run(tmp_path / "a.png", "--save", *kinds, folder=exclusive, out="e")[0] == 0
    np.testing.assert_array_equal(array(tmp_path / "e/a-mask.png"), index)
    assert Image.open(tmp_path / "e/a-mask.png").mode == "P"
    np.testing.assert_array_equal(np.load(tmp_path / "e/a-probability.npy"), proba)
    for i, name in enumerate(("rest", "nucleus_cell", "_x")):
        saved = array(tmp_path / f"e/a-probability-{name}.png")
        np.testing.assert_array_equal(saved, np.round(proba[..., i].astype(np.float64) * 65535))
    expected = image.copy()
    for i in (1, 2):
        expected[draw.outline(index == i)] = draw.palette(256)[i]
    outlined = array(tmp_path / "e/a-outline.png")
    np.testing.assert_array_equal(outlined[:40], expected)
    np.testing.assert_array_equal(outlined[40:], draw.legend(names, 70))
    (row,) = rows(tmp_path / "e/predictions.csv")
    assert row["rest_pixels"] == str((index == 0).sum()) and "rest_objects" not in row
    found = objects.find(index == 1, proba[..., 1])
    assert row["nucleus/cell_objects"] == str(len(found)) != "0"
    assert row["'=x_pixels"] == str((index == 2).sum())

    overlapping = save_model(
        tmp_path / "overlapping",
        MaskFormat(("rest", "a", "b", "c"), separate=True, overlapping=True),
    )
    assert run(tmp_path / "a.png", "--save", *kinds, folder=overlapping, out="o")[0] == 0
    expected, (row,) = image.copy(), rows(tmp_path / "o/predictions.csv")
    for i, name in enumerate("abc"):
        mask = proba[..., i] > 0.5
        np.testing.assert_array_equal(array(tmp_path / f"o/a-mask-{name}.png"), mask * 255)
        expected[draw.outline(mask)] = draw.palette(256)[i + 1]
        assert row[f"{name}_pixels"] == str(mask.sum())
        mean = proba[..., i][mask].mean()
        assert float(row[f"{name}_mean_probability"]) == pytest.approx(mean, abs=1e-5)
    np.testing.assert_array_equal(array(tmp_path / "o/a-outline.png")[:40], expected)


def test_the_table_of_pictures_and_the_table_of_objects(run, tmp_path):
    grey = np.zeros((10, 20), np.uint8)
    grey[2:5, 3:9], grey[7, 15:17], grey[8, 17] = 255, 204, 153
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey * 0).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    code, output, _ = run(*(tmp_path / f"{x}.png" for x in "abc"), "--objects")
    first, empty, bad = rows(tmp_path / "out/predictions.csv")
    assert code == 1 and 0 <= float(first.pop("seconds")) < 60
    assert first == {
        "file": "a.png",
        "status": "segmented",
        "error": "",
        "height": "10",
        "width": "20",
        "polyp_pixels": "21",
        "polyp_fraction": "0.105",
        "polyp_objects": "2",
        "polyp_mean_probability": f"{(18 + 0.8 * 2 + 0.6) / 21:.6f}",
        "polyp_boxes": "[[3,2,6,3],[15,7,3,2]]",
    }
    assert (empty["polyp_pixels"], empty["polyp_objects"], empty["polyp_boxes"]) == ("0", "0", "[]")
    assert empty["polyp_mean_probability"] == ""
    assert bad["status"] == "failed" and "c.png: not a readable picture" in bad["error"]
    assert bad["height"] == bad["polyp_pixels"] == "" and bad["seconds"]
    one, two = rows(tmp_path / "out/objects.csv")
    assert list(one.values()) == "a.png  polyp 18 3 2 6 3 5.5 3.0 1.0".split(" ")
    assert list(two.values()) == "a.png  polyp 3 15 7 3 2 16.0 7.333333 0.733333".split(" ")


def test_a_cell_has_the_boxes_of_the_largest_objects(run, tmp_path):
    grey = np.zeros((100, 100), np.uint8)
    grey[::2, ::2] = 255
    grey[50, 50:53] = 255
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png")[0] == 0
    (row,) = rows(tmp_path / "out/predictions.csv")
    boxes = json.loads(row["polyp_boxes"])
    assert row["polyp_objects"] == "2499" and len(boxes) == 1000 and boxes[0] == [50, 50, 3, 1]
    assert len(row["polyp_boxes"]) < 32767


def test_a_row_is_written_as_soon_as_it_is_known(run, tmp_path, monkeypatch):
    inside, real = [], predict.probabilities

    def probabilities(*args):
        inside.append([row["file"] for row in rows(tmp_path / "out/predictions.csv")])
        return real(*args)

    monkeypatch.setattr(predict, "probabilities", probabilities)
    for name in "abc":
        picture(tmp_path / f"in/{name}.png")
    assert run(tmp_path / "in")[0] == 0
    assert inside == [[], ["a.png"], ["a.png", "b.png"]]


def test_a_table_has_no_formulas(run, tmp_path):
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", "d=.png", "new\nline.png", 'quo"te,.png']
    for name in names:
        picture(tmp_path / "in" / name)
    assert run(tmp_path / "in", "--objects")[0] == 0
    written = {row["file"] for row in rows(tmp_path / "out/predictions.csv")}
    assert written == {"'=1+1.png", "'+a.png", "'-b.png", "'@c.png", *names[4:]}
    assert {row["file"] for row in rows(tmp_path / "out/objects.csv")} == written


def test_the_output_ends_with_the_speed_and_what_is_left_out(run, tmp_path):
    for i in range(3):
        picture(tmp_path / f"in/{i}.png", (100, 200))
    code, output, _ = run(tmp_path / "in")
    *_, speed, last = output.splitlines()
    assert code == 0 and last == f"3 of 3 pictures segmented into {tmp_path}/out"
    pattern = (
        r"3 images in ([\d.]+) s: ([\d.]+) images/s, ([\d.]+) megapixels/s; ([\d.]+) s in the "
        r"network and its compilation, ([\d.]+) s elsewhere"
    )
    seconds, rate, megapixels, network, rest = map(float, re.fullmatch(pattern, speed).groups())
    assert megapixels == pytest.approx(rate * 0.02, abs=0.01)
    assert network + rest == pytest.approx(seconds, abs=0.11)
    for i in range(7):
        (tmp_path / f"in/n{i}\n.txt").touch()
    (tmp_path / "in/x.png").touch()
    code, output, errors = run(tmp_path / "in", out="other")
    names = ", ".join(["x.png", *(rf"n{i}\n.txt" for i in range(4))])
    last = f"3 of 4 pictures segmented into {tmp_path}/other; left out: {names} and 3 more"
    assert code == 1 and output.splitlines()[-1] == last and errors.count("skipped: ") == 1


# Folders and names


def test_the_tree_of_a_folder_is_kept(run, tmp_path):
    root, out = tmp_path / "in", tmp_path / "in" / "sub" / "results"
    for name in ("a.png", "sub/a.png", "sub/deep/er/b.JPG", ".hidden.png", ".folder/c.png"):
        picture(root / name)
    picture(tmp_path / "elsewhere" / "d.png")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    picture(tmp_path / "e.png")
    (root / "notes.txt").touch()
    code, output, _ = run(root, tmp_path / "elsewhere", tmp_path / "e.png", out=out)
    assert code == 0 and output.endswith("; left out: circle, link, notes.txt\n")
    stems = ["a", "d", "e", "sub/a", "sub/deep/er/b"]
    written = [f"{stem}-{kind}.png" for stem in stems for kind in ("mask", "overlay")]
    assert files(out) == sorted([*written, "predictions.csv"])
    named = [row["file"] for row in rows(out / "predictions.csv")]
    assert named == ["a.png", "sub/a.png", "sub/deep/er/b.JPG", "d.png", "e.png"]
    # The results are in the folder now, and are no pictures to segment.
    assert len(rows(out / "predictions.csv")) == 5
    assert run(root, tmp_path / "elsewhere", tmp_path / "e.png", "--overwrite", out=out)[0] == 0
    assert files(out) == sorted([*written, "predictions.csv"])


def test_nothing_to_do_is_an_error(run, tmp_path):
    (tmp_path / "in").mkdir()
    code, output, errors = run(tmp_path / "in")
    assert (code, output) == (1, "") and "no pictures: give files, or folders" in errors
    assert not (tmp_path / "out").exists()


def test_one_bad_file_never_stops_the_rest(run, tmp_path, monkeypatch):
    root = tmp_path / "in"
    names = ["0.png", os.fsdecode(b"1\xff.png"), "2.png", "9.png", f"5{'x' * 245}.png"]
    for name in names:
        picture(root / name)
    (root / "3.png").write_bytes(b"no picture")
    (root / "4.png").symlink_to("gone.png")
    os.mkfifo(root / "6.png")
    picture(root / "7.png")
    picture(root / "locked" / "8.png")
    read, scan = Path.read_bytes, os.scandir

    def read_bytes(self):
        if self.name == "7.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        content = read(self)
        (root / "2.png").unlink(missing_ok=True)  # vanishes after it was listed
        return content

    def scandir(folder):
        if Path(folder).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(os, "scandir", scandir)
    code, output, errors = run(root)
    last = output.splitlines()[-1]
    assert code == 1 and last.startswith("3 of 9 pictures segmented into")
    assert "and 2 more" in last and "Traceback" not in errors
    lines = [line for line in errors.splitlines() if "skipped: " in line]
    reasons = {
        "2.png": "No such file",
        "3.png": "unknown format",
        "4.png": "No such file",
        "5x+": "File name too long",
        "6.png": "not a file",
        "7.png": "Permission denied",
        "locked": "Permission denied",
    }
    assert len(lines) == len(reasons)
    for name, reason in reasons.items():
        assert any(re.search(f"{name}.*{reason}|{reason}.*{name}", line) for line in lines), name
    table = {row["file"]: row["status"] for row in rows(tmp_path / "out/predictions.csv")}
    done = {"0.png", r"1\udcff.png", "9.png"}
    assert {name for name, status in table.items() if status == "segmented"} == done
    assert len(table) == 9
    assert (tmp_path / "out" / os.fsdecode(b"1\xff-mask.png")).is_file()


def test_a_full_disk_stops_with_one_line_and_keeps_the_rows(run, tmp_path, monkeypatch):
    saved, save = [], results.save

    def full(file, *args):
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        saved.append(file)
        save(file, *args)

    monkeypatch.setattr(results, "save", full)
    for name in "abc":
        picture(tmp_path / f"in/{name}.png")
    code, output, errors = run(tmp_path / "in")
    assert code == 1 and "segmented" not in output and "skipped" not in errors
    assert re.search(r"error: .*No space left on device: .*b-mask.png", errors.splitlines()[-1])
    assert [row["file"] for row in rows(tmp_path / "out/predictions.csv")] == ["a.png"]


def test_no_part_of_a_result_is_left(tmp_path):
    class Broken(Image.Image):
        def save(self, stream, *_):
            stream.write(b"half")
            raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        results.save(tmp_path / "a.png", Broken(), False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.png").touch()
    with pytest.raises(FileExistsError, match="appeared meanwhile.*a.png"):
        results.save(tmp_path / "a.png", Image.new("L", (1, 1)), False)
    assert files(tmp_path) == ["a.png"] and not (tmp_path / "a.png").read_bytes()


# Overwriting


def test_what_exists_is_written_over_only_with_a_flag(run, tmp_path):
    for i in range(4):
        picture(tmp_path / f"in/{i}.png")
    assert run(tmp_path / "in")[0] == 0
    out = tmp_path / "out"
    before = {file: (out / file).read_bytes() for file in files(out)}
    code, output, errors = run(tmp_path / "in")
    assert (code, output) == (1, "") and {f: (out / f).read_bytes() for f in files(out)} == before
    assert "error: these results exist already: " in errors and "predictions.csv" in errors
    assert "and 4 more: write over them with --overwrite, or use another --out" in errors
    for file in files(out):  # any of them will do
        only = tmp_path / "only" / file
        only.parent.mkdir()
        shutil.copy(out / file, only)
        assert f"these results exist already: {only}: " in run(tmp_path / "in", out="only")[2]
        assert files(only.parent) == [file]
        shutil.rmtree(only.parent)
    (tmp_path / "only").mkdir()
    (tmp_path / "only/0-mask.png").symlink_to("gone")  # a link to nothing exists too
    assert "these results exist already" in run(tmp_path / "in", out="only")[2]
    for i in range(4):
        picture(tmp_path / f"in/{i}.png", seed=1)
    code, output, errors = run(tmp_path / "in", "--overwrite")
    assert code == 0 and files(out) == sorted(before)
    assert all((out / file).read_bytes() != content for file, content in before.items())


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_no_input_is_written_over_also_through_links(run, tmp_path, flags):
    root = tmp_path / "in"
    a, b = picture(root / "a.png"), picture(root / "a-mask.png", seed=1)
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "to-picture").mkdir()
    (tmp_path / "to-picture" / "a-mask.png").symlink_to(a)
    (tmp_path / "subfolder").mkdir()
    (tmp_path / "subfolder" / "in").symlink_to(root)
    cases = [
        ("in", [root]),
        ("link", [a, b]),
        ("to-picture", [a]),
        ("subfolder", [tmp_path]),
        ("elsewhere", [a, root / ".." / "in" / "a.png"]),
    ]
    before = a.read_bytes(), b.read_bytes()
    for out, inputs in cases:
        code, output, errors = run(*inputs, *flags, out=out)
        assert (code, output) == (1, "") and "would overwrite" in errors
        assert (a.read_bytes(), b.read_bytes()) == before
        assert files(root) == ["a-mask.png", "a.png"]
    assert not (tmp_path / "elsewhere").exists()


def test_results_replace_links_and_not_what_they_lead_to(run, tmp_path):
    """Also hard links, which no path reveals."""
    a, other = picture(tmp_path / "a.png"), tmp_path / "other.txt"
    other.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    os.link(a, out / "a-mask.png")
    os.link(other, out / "predictions.csv")
    (out / "a-overlay.png").symlink_to(other)
    before = a.read_bytes()
    assert run(a, "--overwrite")[0] == 0
    assert a.read_bytes() == before and other.read_text() == "mine"
    assert not (out / "a-overlay.png").is_symlink() and rows(out / "predictions.csv")


def test_results_of_one_name_and_folders_in_their_place_are_refused(run, tmp_path):
    picture(tmp_path / "x/a.png"), picture(tmp_path / "y/a.png")
    assert "a-mask.png, a result of " in run(tmp_path / "x", tmp_path / "y")[2]
    clip = tmp_path / "predictions.mp4"
    clip.touch()
    words = "predictions.csv, a result of .*predictions.mp4, would overwrite all pictures"
    assert re.search(words, run(clip)[2])
    (tmp_path / "out/a-mask.png").mkdir(parents=True)
    assert "a-mask.png is a folder" in run(tmp_path / "x", "--overwrite")[2]
    same = save_model(tmp_path / "same", MaskFormat(("rest", "a/b", "a:b")))
    words = ["--save", "probabilities"]
    assert "would overwrite" in run(tmp_path / "x", *words, folder=same, out="o")[2]
    outside = save_model(
        tmp_path / "outside",
        MaskFormat(("rest", "/../../../escaped", "b"), separate=True, overlapping=True),
    )
    assert run(tmp_path / "x", folder=outside, out="deep/out")[0] == 0
    assert "a-mask-_.._.._.._escaped.png" in files(tmp_path / "deep/out")


# Videos


def film(file, n=12, size=(32, 48)):
    """A bright square that moves to the right by 2 pixels a frame."""
    with video.writer(file, size, 25) as write:
        for i in range(n):
            frame = np.full((*size, 3), 20, np.uint8)
            frame[8:24, 2 * i : 2 * i + 16] = 240
            write(frame)
    return file


def test_a_video_becomes_a_video_and_a_table(run, tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    film(tmp_path / "in/sub/v.mp4")
    picture(tmp_path / "in/a.png")
    code, output, _ = run(tmp_path / "in", "--objects", "--save", "mask", "overlay", "outline")
    out = tmp_path / "out"
    results_of_v = ["sub/v-outline.mp4", "sub/v-overlay.mp4", "sub/v.csv"]
    pictures = ["a-mask.png", "a-outline.png", "a-overlay.png", "objects.csv", "predictions.csv"]
    assert code == 0 and files(out) == pictures + results_of_v
    assert "\n13 images in " in output and "2 of 2 pictures and videos" in output
    clips = [video.open_video(out / f"sub/v-{kind}.mp4") for kind in ("overlay", "outline")]
    for clip in clips:
        assert (clip.size, clip.fps) == ((32, 48), 25)
    overlays, outlined = (list(video.frames(clip)) for clip in clips)
    assert len(overlays) == len(outlined) == 12
    for i in (0, 5, 11):
        magenta = overlays[i][12:20, 2 * i + 4 : 2 * i + 12].reshape(-1, 3).mean(0)
        expected = 240 * (1 - 0.47) + np.array(draw.PREDICTED) * 0.47
        np.testing.assert_allclose(magenta, expected, atol=4)
        inside = outlined[i][13:19, 2 * i + 5 : 2 * i + 11]
        np.testing.assert_allclose(inside.reshape(-1, 3).mean(0), 240, atol=5)
        np.testing.assert_allclose(outlined[i][:6, :6].mean(), 20, atol=4)
    table = rows(out / "sub/v.csv")
    assert [row["frame"] for row in table] == [str(i) for i in range(12)]
    assert [float(row["time"]) for row in table] == pytest.approx([i / 25 for i in range(12)])
    for i, row in enumerate(table):
        assert json.loads(row["polyp_boxes"]) == [[2 * i, 8, 16, 16]]
        assert (row["height"], row["width"], row["polyp_pixels"]) == ("32", "48", "256")
    found = [row for row in rows(out / "objects.csv") if row["file"] == "sub/v.mp4"]
    assert [row["frame"] for row in found] == [str(i) for i in range(12)]
    (row,) = [row for row in rows(out / "predictions.csv") if row["file"] == "sub/v.mp4"]
    assert (row["status"], row["height"], row["width"]) == ("segmented", "32", "48")
    assert float(row["seconds"]) > 0 and row["polyp_pixels"] == ""


def test_a_damaged_video_is_left_out_and_a_video_that_exists_is_kept(run, tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    content = film(root / "b.mp4", n=40, size=(32, 100)).read_bytes()
    (root / "a.mp4").write_bytes(content[:300])
    mkv = video.ffmpeg(), "-v", "error", "-i", root / "b.mp4", "-c", "copy", root / "c.mkv"
    subprocess.run(mkv, check=True)
    os.truncate(root / "c.mkv", (root / "c.mkv").stat().st_size * 8 // 10)
    picture(root / "d.png")
    code, output, errors = run(root)
    assert code == 1 and "2 of 4 pictures and videos" in output
    assert output.endswith("; left out: a.mp4, c.mkv\n")
    assert "a.mp4: not a readable video" in errors and "c.mkv: damaged after frame" in errors
    expected = ["b-overlay.mp4", "b.csv", "c.csv", "d-mask.png", "d-overlay.png", "predictions.csv"]
    assert files(out) == expected and rows(out / "c.csv")
    status = {row["file"]: row["status"] for row in rows(out / "predictions.csv")}
    assert status == dict.fromkeys(("a.mp4", "c.mkv"), "failed") | dict.fromkeys(
        ("b.mp4", "d.png"), "segmented"
    )
    before = (out / "b-overlay.mp4").read_bytes()
    (out / "predictions.csv").unlink(), (out / "b.csv").unlink()
    assert "b-overlay.mp4" in run(root / "b.mp4")[2]
    assert (out / "b-overlay.mp4").read_bytes() == before
    assert run(root / "b.mp4", "--overwrite")[0] == 0
    # Enough for a frame, and not for ffmpeg.
    enough = (predict.memory_of((100, 32), images.RGB, UNet()) + 100 * 32 * 90) / 1e9
    errors = run(root / "b.mp4", "--max-memory", enough, out="small")[2]
    assert "b.mp4: 100 x 32 pixels take 0.6 GB: allow it with --max-memory 0.6" in errors
    assert run(root / "b.mp4", "--save", "mask", out="table")[0] == 0
    assert files(tmp_path / "table") == ["b.csv", "predictions.csv"]


def test_a_video_of_several_classes_has_a_legend(run, tmp_path):
    film(tmp_path / "v.mp4", n=2, size=(33, 61))
    several = save_model(tmp_path / "several", MaskFormat(("rest", "a", "b")))
    assert run(tmp_path / "v.mp4", folder=several)[0] == 0
    height = 34 + len(draw.legend(("rest", "a", "b"), 62))
    clip = video.open_video(tmp_path / "out/v-overlay.mp4")
    assert clip.size == (height + height % 2, 62)


def test_videos_without_the_extra_are_an_error_before_the_work(run, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    film(tmp_path / "v.mp4", n=1)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    code, output, errors = run(tmp_path / "a.png", tmp_path / "v.mp4")
    assert (code, output) == (1, "") and not (tmp_path / "out").exists()
    assert errors == "error: videos need imageio-ffmpeg: pip install 'flax-unet[video]'\n"
    assert run(tmp_path / "a.png")[0] == 0


# Devices


@pytest.fixture
def groups(monkeypatch):
    """The numbers of images that the network takes at a time."""
    numbers, real = [], predict.probabilities

    def probabilities(context, images):
        numbers.append(len(images))
        return real(context, images)

    monkeypatch.setattr(predict, "probabilities", probabilities)
    return numbers


def table(file):
    return [row | {"seconds": None} for row in rows(file)]


def test_devices_share_pictures_and_frames_and_change_nothing(model, groups, tmp_path, capsys):
    for i in (0, 2, 3, 4, 6, 7):
        picture(tmp_path / f"in/{i}.png", (20 + 9 * i, 70 - 9 * i), seed=i)
    for i in (1, 8):
        (tmp_path / f"in/{i}.png").write_bytes(b"no picture")
    film(tmp_path / "in/5.mp4", n=7)
    expected, results = {1: [1] * 13, 3: [3, 1, 3, 3, 1, 2]}, {}
    for n in expected:
        command = ["--model", model, "--out", tmp_path / str(n), "--devices", n, "--objects"]
        command += ["--save", "overlay", "probabilities-npy", "--", tmp_path / "in"]
        assert predict.main([str(word) for word in command]) == 1
        captured = capsys.readouterr()
        assert "7 of 9 pictures and videos" in captured.out and "\n13 images in " in captured.out
        assert captured.out.endswith("left out: 1.png, 8.png\n")
        assert captured.err.count("not a readable picture") == 2
        assert groups == expected[n]
        groups.clear()
        out = tmp_path / str(n)
        results[n] = [table(out / name) for name in ("predictions.csv", "5.csv")]
        results[n].append(rows(out / "objects.csv"))
    assert results[1] == results[3]
    assert [row["file"] for row in results[1][0]] == [
        f"{i}.{'mp4' if i == 5 else 'png'}" for i in range(9)
    ]
    one, three = tmp_path / "1", tmp_path / "3"
    assert files(one) == files(three)
    arrays = {file: np.load(file) for file in one.glob("*.npy")}
    assert len(arrays) == 6 and len({array.mean() for array in arrays.values()}) == 6
    for file, array in arrays.items():
        np.testing.assert_array_equal(np.load(three / file.name), array)
        overlay = file.name.replace("probability.npy", "overlay.png")
        assert (one / overlay).read_bytes() == (three / overlay).read_bytes()


def test_only_what_fits_in_the_memory_waits_for_the_other_devices(model, run, groups, tmp_path):
    sizes = {"large": (400, 600), "small": (200, 300)}
    for i, kind in enumerate(["large", "small", "small", "large", "small"]):
        picture(tmp_path / f"in/{i}.png", sizes[kind])
    film(tmp_path / "v.mp4", n=5, size=(200, 300))
    net, variables, *_ = pack.load(model)
    parameters = sum(x.nbytes for x in jax.tree.leaves(variables))
    others = 3 * (parameters + predict.WINDOW * 32 * 32)  # of the other devices
    large, small, frame = (
        predict.memory_of((width, height), images.RGB, net, others) + more * width * height
        for height, width, more in ((400, 600, 0), (200, 300, 0), (200, 300, 180))
    )
    bytes_of = {kind: 3 * height * width for kind, (height, width) in sizes.items()}
    for out, enough, file, expected in (
        ("a", large + 10 * bytes_of["large"], "in", [4, 1]),
        ("b", large + bytes_of["large"] - 1000, "in", [1, 3, 1]),
        ("c", large + bytes_of["small"] + 1000, "in", [1, 2, 1, 1]),
        ("d", large + 1000, "in", [1, 2, 1, 1]),
        ("e", small + 1000, "in", [1, 1, 1]),
        ("f", frame + 9 * bytes_of["small"], "v.mp4", [4, 1]),
        ("g", frame + 1.5 * bytes_of["small"], "v.mp4", [2, 2, 1]),
        ("h", frame + 1000, "v.mp4", [1] * 5),
    ):
        words = tmp_path / file, "--devices", 4, "--max-memory", repr(enough / 1e9)
        code, output, _ = run(*words, out=out)
        assert (groups, code) == (expected, out == "e"), out
        groups.clear()


def test_frames_before_the_damage_are_written_by_several_devices_too(run, groups, tmp_path):
    film(tmp_path / "b.mp4", n=40, size=(32, 100))
    mkv = video.ffmpeg(), "-v", "error", "-i", tmp_path / "b.mp4", "-c", "copy", tmp_path / "c.mkv"
    subprocess.run(mkv, check=True)
    os.truncate(tmp_path / "c.mkv", (tmp_path / "c.mkv").stat().st_size * 8 // 10)
    for n in (1, 4):
        assert run(tmp_path / "c.mkv", "--devices", n, out=str(n))[0] == 1
    one, four = (table(tmp_path / f"{n}/c.csv") for n in (1, 4))
    assert one == four and len(one) % 4


def test_windows_are_shared_and_the_pictures_are_not(model, groups, tmp_path):
    for i in range(3):
        picture(tmp_path / f"in/{i}.png", (50, 70), seed=i)
    command = ["--model", model, "--out", tmp_path / "out", "--window", 32, "--devices", 3]
    assert predict.main([str(word) for word in [*command, tmp_path / "in"]]) == 0
    assert groups == [1, 1, 1]
