"""What the values of mask files mean: found for an entire data set, or declared."""

import json

import numpy as np
import pytest
from drawn import encode, rgb
from PIL import Image, ImageDraw

from flax_unet import data, formats
from flax_unet.classes import IGNORE
from flax_unet.formats import BINARY, MaskFormat
from flax_unet.images import RGB
from flax_unet.parallel import map_all
from flax_unet.pictures import DataError, open_picture


def disc(size=(48, 64), radius=12, shift=0):
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - 24) ** 2 + (x - 30 - shift) ** 2 < radius**2


def source(*masks, image=None):
    """Entries of masks, arrays or encoded."""
    encoded = [mask if isinstance(mask, bytes) else encode(mask) for mask in masks]
    image = encode(rgb(size=(48, 64))) if image is None else image
    return [{"name": f"m{i}", "image": image, "mask": x} for i, x in enumerate(encoded)]


def read(mask, form):
    content = mask if isinstance(mask, bytes) else encode(mask)
    return formats.read(open_picture(content, "a mask"), form, "a mask")


def palette(mask, *colours):
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette([channel for colour in colours for channel in colour])
    return encode(picture)


TWO = [disc(), disc(shift=5)]


@pytest.mark.parametrize("high", [1, 255, 65535])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_two_values_are_found_for_the_whole_set(high, kind):
    masks = [encode((m * high).astype(np.uint16 if high > 255 else np.uint8), kind) for m in TWO]
    form = formats.find(source(*masks))
    assert form.values == ((0, 0), (high, 1)) and form.channels == 1
    for mask, expected in zip(masks, TWO, strict=True):
        np.testing.assert_array_equal(read(mask, form), expected)


def test_a_mask_is_read_in_every_mode():
    expected, form = TWO[0], formats.find(source(TWO[0] * np.uint8(255)))
    grey = Image.fromarray(expected * np.uint8(255))
    for mode in ("1", "L", "LA", "RGB", "RGBA"):
        np.testing.assert_array_equal(read(encode(grey.convert(mode)), form), expected)
    red = palette(expected, (0, 0, 0), (128, 0, 0))
    np.testing.assert_array_equal(read(red, formats.find(source(red))), expected)


def test_an_empty_mask_is_read_among_others_and_a_set_of_them_is_refused():
    empty = np.zeros((48, 64), np.uint8)
    form = formats.find(source(TWO[0] * np.uint8(255), empty))
    assert not read(empty, form).any()
    with pytest.raises(DataError, match="mask m0 and all other masks are empty"):
        formats.find(source(empty, empty))


def test_the_same_values_mean_the_same_in_every_file():
    with pytest.raises(DataError, match="m[01] has the values 0, 1"):
        formats.find(source(TWO[0] * np.uint8(255), TWO[1].astype(np.uint8)))
    form = formats.find(source(TWO[0] * np.uint8(255)))
    with pytest.raises(DataError, match="a mask: it has the values 1, but .*foreground 255"):
        read(TWO[1].astype(np.uint8), form)


def soft(size=(320, 240)):
    """A polygon as an editor draws it, with antialiased edges, and where it is."""
    picture = Image.new("L", (1280, 960))
    corners = [(240, 200), (800, 180), (1040, 600), (600, 840), (180, 660)]
    ImageDraw.Draw(picture).polygon(corners, fill=255)
    return picture.resize(size, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("options", [{}, {"suffix": "jpeg"}, {"suffix": "jpeg", "quality": 90}])
def test_soft_edges_are_divided_at_half(options):
    content = encode(soft(), **options)
    form = formats.find(source(content))
    assert form.threshold == 127.5 and "above 127.5" in str(form)
    mask = read(content, form)
    np.testing.assert_array_equal(mask, np.asarray(open_picture(content, "")) > 127.5)
    wide = Image.fromarray(np.asarray(soft()).astype(np.uint16) * np.uint16(257))
    assert formats.find(source(encode(wide))).threshold == 32767.5


def labelled(**values):
    """A disc in a disc: 0 outside, and the given values."""
    mask = np.zeros((48, 64), np.uint8)
    mask[disc(radius=16)] = values["outer"]
    mask[disc(radius=10)] = values["inner"]
    return mask


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (labelled(outer=255, inner=1), "0, 1, 255"),  # an ignore label
        (labelled(outer=2, inner=1), "0, 1, 2"),
        (labelled(outer=128, inner=255), "0, 128, 255"),
        (labelled(outer=3, inner=3), "0, 3"),
        (np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 12 + disc() * np.uint8(0), "0, 1, 2"),
        (np.where(disc(), 255, np.arange(64)[None] % 12).astype(np.uint8), "0, 1, 2, 3"),
        (np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)), "0, 4, 8"),  # a photograph
        (disc().astype(np.float32) * 0.7, "0, 0.7"),
        (disc().astype(np.int32) - 1, "-1, 0"),
    ],
)
def test_values_without_a_clear_meaning_are_refused_with_the_flags(mask, words):
    content = encode(mask, "tiff" if mask.dtype != np.uint8 else "png")
    with pytest.raises(DataError, match=f"mask m0 has the values {words}.*--classes.*--ignore"):
        formats.find(source(content))


def test_a_jpeg_of_labels_is_refused():
    content = encode(disc().astype(np.uint8), "jpeg", quality=100)
    with pytest.raises(DataError, match="JPEG changes the values"):
        formats.find(source(content))
    with pytest.raises(DataError, match="JPEG changes the values"):
        read(content, BINARY)


def test_colours_are_refused_unless_they_have_names(tmp_path):
    blue, yellow = (0, 0, 255), (255, 255, 0)
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[disc(radius=16)], mask[disc(radius=8)] = blue, yellow
    with pytest.raises(DataError, match="mask m0: it has colours.*--classes FILE"):
        formats.find(source(mask))
    expected = np.select([disc(radius=8), disc(radius=16)], [2, 1])
    table = tmp_path / "classes.json"
    table.write_text(json.dumps({"sea": "#000000", "boat": "#0000ff", "buoy": ["ffff00"]}))
    rows = tmp_path / "classes.csv"
    rows.write_text("name,r,g,b\nsea,0,0,0\nboat, 0, 0, 255\nbuoy,255,255,0\n")
    for file in (table, rows):
        form = formats.find(source(mask), names=[str(file)])
        assert form.names == ("sea", "boat", "buoy") and form.channels == 3
        np.testing.assert_array_equal(read(mask, form), expected)
        of_palette = palette(expected, (0, 0, 0), blue, yellow)
        np.testing.assert_array_equal(read(of_palette, form), expected)
    mask[0, 0] = (1, 2, 3)
    with pytest.raises(DataError, match=r"a mask: it has the values \(1, 2, 3\), but"):
        read(mask, form)


def test_indices_get_their_names_and_a_value_that_does_not_count(tmp_path):
    mask = labelled(outer=255, inner=2)
    text = tmp_path / "classes.txt"
    text.write_text("background\ncell\nnucleus\n")
    for names in (["background", "cell", "nucleus"], [str(text)]):
        form = formats.find(source(mask), names=names, ignore=[255])
        np.testing.assert_array_equal(read(mask, form), mask)
    with pytest.raises(DataError, match="a mask: it has the values 7, but"):
        read(np.where(mask == 2, 7, mask).astype(np.uint8), form)
    with pytest.raises(DataError, match="a mask: it has the values 255, but"):
        read(mask, formats.find(source(mask), names=names))
    wide = tmp_path / "classes.json"
    wide.write_text('{"background": 0, "cell": [1000, 2000], "ignore": 65535}')
    deep = np.array([[0, 1000, 2000, 65535]], np.uint16)
    form = formats.find(source(encode(deep)), names=[str(wide)])
    np.testing.assert_array_equal(read(encode(deep), form), [[0, 1, 1, IGNORE]])
    assert form.channels == 1


def test_a_declared_foreground_and_threshold():
    mask = labelled(outer=7, inner=200)
    form = formats.find(source(mask), foreground=[200], ignore=[7])
    np.testing.assert_array_equal(read(mask, form), np.select([mask == 200, mask == 7], [1, 255]))
    assert str(form) == "foreground 200; not counted 7; background elsewhere"
    form = formats.find(source(mask), threshold=5)
    np.testing.assert_array_equal(read(mask, form), mask > 5)
    form = formats.find(source(labelled(outer=255, inner=1)), ignore=[255])
    np.testing.assert_array_equal(
        read(labelled(outer=255, inner=1), form), labelled(outer=255, inner=1)
    )


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"foreground": [1], "threshold": 3.0}, "give only one of"),
        ({"names": ["a", "b"], "foreground": [1]}, "give only one of"),
        ({"ignore": [1], "threshold": 3.0}, "does not go with --mask-threshold"),
        ({"foreground": [1], "ignore": [1]}, "the value 1 is declared twice"),
        ({"ignore": [0]}, "the value 0 is declared twice"),
        ({"names": ["a"]}, "--classes a: give at least two names"),
        ({"names": ["a", "a"]}, "there are 1 classes"),
    ],
)
def test_declarations_that_contradict_each_other_are_refused(declared, words):
    with pytest.raises(DataError, match=words):
        formats.find(source(TWO[0].astype(np.uint8)), **declared)


@pytest.mark.parametrize("value", ["1.0", "null", '{"a": 1}', '"#gg0000"'])
def test_a_file_of_classes_whose_values_are_no_values_is_refused(tmp_path, value):
    (file := tmp_path / "classes.json").write_text(f'{{"rest": 0, "cell": {value}}}')
    with pytest.raises(DataError, match=f"--classes {file}: give at least two names, or a text"):
        formats.find(source(TWO[0].astype(np.uint8)), names=[str(file)])


def test_a_white_background_must_be_declared():
    inverted = [np.where(m, 0, 255).astype(np.uint8) for m in TWO]
    words = "m0 and 1 of 1 other masks are white along.*--foreground 0 if.*else --foreground 255"
    with pytest.raises(DataError, match=words):
        formats.find(source(*inverted))
    form = formats.find(source(*inverted), foreground=[0])
    np.testing.assert_array_equal(read(inverted[0], form), TWO[0])


def test_a_palette_against_its_indices_must_be_declared():
    reversed_ = palette(TWO[0], (255, 255, 255), (0, 0, 0))
    with pytest.raises(DataError, match="m0: index 0 of its palette is white"):
        formats.find(source(reversed_))
    form = formats.find(source(reversed_), foreground=[1])
    np.testing.assert_array_equal(read(reversed_, form), TWO[0])


def test_transparent_masks_are_refused():
    grey = Image.fromarray(TWO[0] * np.uint8(255))
    form = formats.find(source(encode(grey)))
    hole = Image.fromarray(np.full((48, 64), 254, np.uint8))
    for mode in ("LA", "RGBA"):
        picture = grey.convert(mode)
        picture.putalpha(hole)
        with pytest.raises(DataError, match="a mask: it has transparent pixels"):
            read(encode(picture), form)
    indexed = Image.fromarray(TWO[0].astype(np.uint8), "P")
    indexed.putpalette([0, 0, 0, 255, 255, 255])
    with pytest.raises(DataError, match="m0: it has transparent pixels"):
        formats.find(source(encode(indexed, transparency=0)))


def test_all_unusable_files_are_named_at_once():
    good = encode(TWO[0] * np.uint8(255))
    entries = source(good, b"no picture", good, b"neither")
    with pytest.raises(DataError, match="2 pictures are unusable:\n  mask m1.*\n  mask m3"):
        formats.find(entries)
    with pytest.raises(DataError, match="2 pictures are unusable:\n  mask m1.*\n  mask m3"):
        data.load(entries, 16, MaskFormat(values=((0, 0), (255, 1))))


def test_a_format_survives_json():
    forms = [
        BINARY,
        MaskFormat(("a", "b", "c"), (((0, 0, 0), 0), ((1, 2, 3), 1), ((9, 9, 9), IGNORE)), 2),
        MaskFormat(values=(), threshold=127.5),
    ]
    for form in forms:
        assert formats.from_json(json.loads(json.dumps(formats.to_json(form)))) == form


@pytest.mark.parametrize("turns", [(3, 1), (1, 3), (6, 1), (2, 3)])
def test_a_picture_and_a_mask_with_other_exif_orientations_are_refused(turns):
    def turned(array, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encode(array, "png", exif=exif)

    mask = np.eye(48, dtype=np.uint8)
    pair = source(turned(mask, turns[1]), image=turned(rgb(size=(48, 48)), turns[0]))[0]
    with pytest.raises(DataError, match=f"EXIF orientation {turns[0]} and mask m0 {turns[1]}"):
        data.decode_pair(pair, BINARY, RGB)
    same = source(turned(mask, 6), image=turned(rgb(size=(48, 48)), 6))[0]
    np.testing.assert_array_equal(
        data.decode_pair(same, BINARY, RGB)[1][..., 0], np.rot90(mask, -1)
    )
    # A quarter turn of a picture that is not square: the sizes say how the mask is meant.
    wide, upright = rgb(size=(20, 48)), np.eye(48, 20, dtype=np.uint8)
    pair = source(turned(upright, 1), image=turned(wide, 6))[0]
    image, read_mask = data.decode_pair(pair, BINARY, RGB)
    assert image.shape == (48, 20, 3)
    np.testing.assert_array_equal(read_mask[..., 0], upright)


# Separate files


def separate(*masks, names=("a", "b")):
    """An entry whose classes 1, 2, ... have files of their own."""
    parts = [(index, encode(mask)) for index, mask in masks]
    return {"name": "p", "image": encode(rgb(size=(4, 6))), "mask": parts}


LEFT, RIGHT = (np.zeros((4, 6), np.uint8) for _ in range(2))
LEFT[:, :3], RIGHT[:, 2:] = 255, 255  # they overlap in a column


def test_separate_files_of_exclusive_classes_become_indices():
    entries = [separate((1, LEFT), (2, 255 - LEFT)), separate((2, LEFT))]
    found = formats.find(entries, names=("a", "b"))
    assert found.names == ("background", "a", "b") and found.channels == 3
    assert str(found) == "separate files of a, b: background 0; foreground 255"
    _, mask = data.decode_pair(entries[0], found, RGB)
    np.testing.assert_array_equal(mask[..., 0], np.where(LEFT, 1, 2))
    _, mask = data.decode_pair(entries[1], found, RGB)  # without a file of class a
    np.testing.assert_array_equal(mask[..., 0], np.where(LEFT, 2, 0))


def test_exclusive_classes_that_overlap_are_refused_and_overlapping_ones_are_channels():
    entries = [separate((1, LEFT), (2, RIGHT))]
    found = formats.find(entries, names=("a", "b"))
    with pytest.raises(DataError, match="mask p: its classes overlap in 4 pixels: .*--overlapping"):
        data.decode_pair(entries[0], found, RGB)
    found = formats.find(entries, names=("a", "b"), overlapping=True)
    assert found.channels == 2 and found.learned == ("a", "b")
    _, mask = data.decode_pair(entries[0], found, RGB)
    np.testing.assert_array_equal(mask, np.stack([LEFT, RIGHT], -1) // 255)
    assert formats.from_json(formats.to_json(found)) == found


def test_separate_files_of_objects_are_joined():
    entries = [separate((1, LEFT), (1, RIGHT))]
    found = formats.find(entries)
    assert found.channels == 1
    _, mask = data.decode_pair(entries[0], found, RGB)
    np.testing.assert_array_equal(mask, np.ones((4, 6, 1)))


def test_pixels_of_separate_files_that_do_not_count():
    left = LEFT.copy()
    left[0] = 9
    entries = [separate((1, left), (2, 255 - LEFT))]
    found = formats.find(entries, names=("a", "b"), foreground=(255,), ignore=(9,))
    _, mask = data.decode_pair(entries[0], found, RGB)
    np.testing.assert_array_equal(mask[0, :, 0], [IGNORE] * 3 + [2] * 3)
    np.testing.assert_array_equal(mask[1:, :, 0], np.where(LEFT, 1, 2)[1:])
    both = formats.find(entries, names=("a", "b"), foreground=(255,), ignore=(9,), overlapping=True)
    _, mask = data.decode_pair(entries[0], both, RGB)
    np.testing.assert_array_equal(mask[0], [[IGNORE, 0]] * 3 + [[IGNORE, 1]] * 3)


def test_masks_of_another_layout_than_the_format_are_refused():
    one, several = source(np.eye(4, 6, dtype=np.uint8))[0], separate((1, LEFT))
    one["image"] = several["image"]
    with pytest.raises(DataError, match="m0 has one mask file, and the format is another"):
        data.decode_pair(one, formats.find([several]), RGB)
    with pytest.raises(DataError, match="p has separate mask files, and the format is another"):
        data.decode_pair(several, BINARY, RGB)


def test_separate_files_of_other_sizes_or_values_are_named():
    entries = [separate((1, LEFT), (2, RIGHT[:3]))]
    with pytest.raises(DataError, match="image p is 6x4 but mask p is 6x3"):
        data.decode_pair(entries[0], formats.find(entries, names=("a", "b")), RGB)
    entries = [separate((1, LEFT), (2, RIGHT // 3))]
    with pytest.raises(DataError, match="mask p has the values 0, 85"):
        formats.find(entries, names=("a", "b"))
    with pytest.raises(DataError, match="--overlapping needs --mask-files class"):
        formats.find(source(np.eye(4, dtype=np.uint8)), overlapping=True)
    with pytest.raises(DataError, match="--overlapping needs .* at least two --classes"):
        formats.find([separate((1, LEFT))], names=("a",), overlapping=True)


@pytest.mark.parametrize("declared", [{"threshold": 0.5}, {"foreground": (1,)}])
def test_a_mask_that_is_not_finite_is_refused(declared):
    mask = Image.fromarray(np.array([[0, 1], [np.nan, 1]], np.float32))
    with pytest.raises(DataError, match="m: it has values that are not finite"):
        formats.read(mask, formats.find([], **declared), "m")


def test_of_many_errors_the_first_are_shown_and_the_others_counted():
    def fail(i):
        raise DataError(f"mask {i} is bad")

    with pytest.raises(
        DataError, match="8 pictures are unusable:(\n  mask [0-4] is bad){5}\n  and 3 more$"
    ):
        map_all(fail, range(8))


def test_no_class_is_called_name(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("background\nname\n")
    for names in (["background", "name"], [str(file)]):
        with pytest.raises(DataError, match="a class cannot be called name"):
            formats.find(names=names)
