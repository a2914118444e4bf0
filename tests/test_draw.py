import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from flax_unet import draw
from flax_unet.metrics import Reliability


@pytest.fixture
def figures(monkeypatch):
    """The list to which `Figure.savefig` appends each figure after saving it."""
    saved, savefig = [], Figure.savefig

    def save_and_record(self, *args, **kwargs):
        savefig(self, *args, **kwargs)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", save_and_record)
    return saved


def colours_at(path, axes, points):
    """The colours, [N, 3] in [0, 1], of a saved figure at points [N, 2] in data coordinates."""
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255
    scale = pixels.shape[1] / axes.figure.bbox.width  # the figure's dpi is not the picture's
    x, y = (axes.transData.transform(points) * scale).astype(int).T
    return pixels[len(pixels) - 1 - y, x]


def test_the_overlay_has_half_of_the_colour_at_probability_one():
    image = np.full((4, 4, 3), 100, np.uint8)
    proba = np.zeros((4, 4))
    proba[1, 2], proba[2, 2] = 1, 0.5
    over = draw.overlay(image, proba)
    np.testing.assert_array_equal(over[0, 0], [100, 100, 100])
    np.testing.assert_array_equal(over[1, 2], np.round(50 + np.array(draw.PREDICTED) / 2))
    np.testing.assert_array_equal(over[2, 2], np.round(75 + np.array(draw.PREDICTED) / 4))


def test_the_outline_is_two_pixels_wide_inside_the_mask_and_open_at_the_border():
    mask = np.zeros((12, 12), bool)
    mask[2:9, 3:12] = True  # cut off by the right border
    expected = mask.copy()
    expected[4:7, 5:12] = False
    np.testing.assert_array_equal(draw.outline(mask), expected)
    over = draw.overlay(np.zeros((12, 12, 3), np.uint8), np.zeros((12, 12)), mask)
    np.testing.assert_array_equal((over == draw.TRUE).all(-1), expected)


def test_panels_are_image_probabilities_and_outlines():
    image = np.random.default_rng(0).integers(0, 256, (300, 256, 3), np.uint8)
    proba = np.linspace(0, 1, 300 * 256, dtype=np.float32).reshape(300, 256, 1)  # rows from 150 on
    mask = np.zeros((300, 256, 1), np.uint8)
    mask[100:140], mask[200:] = 1, 255  # what does not count has no outline
    first, second, third = draw.panels(image, proba, mask)
    np.testing.assert_array_equal(first, image)
    np.testing.assert_array_equal(second, np.round(255 * proba).astype(np.uint8).repeat(3, -1))
    expected = image.copy()
    expected[[*range(100, 104), *range(136, 140)]] = draw.TRUE
    expected[150:152] = draw.PREDICTED
    np.testing.assert_array_equal(third, expected)
    *_, other = draw.panels(image, proba, threshold=0.8)
    assert (other[240:242] == draw.PREDICTED).all() and (other[150] == image[150]).all()


@pytest.mark.parametrize(
    ("own", "shown"),
    [((64, 64), (256, 256)), ((128, 192), (256, 384)), ((600, 1200), (256, 512)),
     ((300, 400), (300, 400)), ((20, 400), (26, 512)), ((5000, 2), (512, 1))],
)  # fmt: skip
def test_small_images_are_enlarged_and_large_ones_reduced(own, shown):
    image = np.zeros((*own, 3), np.uint8)
    index = np.zeros((*own, 1), np.uint8)
    index[: own[0] // 2] = 200
    for prediction in (index / np.float32(200), index):
        for panel in draw.panels(image, prediction, index):
            assert panel.shape == (*shown, 3) and panel.dtype == np.uint8
    *_, classes = draw.panels(image, index, index)
    colours = {tuple(pixel) for pixel in classes.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), tuple((draw.palette(256)[200] // 2).tolist())}  # none is mixed


def test_a_sheet_has_captions_titles_and_a_key(tmp_path):
    wide = tuple(np.full((20, 90, 3), value, np.uint8) for value in (10, 20, 30))
    narrow = tuple(np.full((30, 50, 3), value, np.uint8) for value in (40, 50, 60))
    for classes in ((), ("background", "cell")):
        draw.save_sheet(tmp_path / "sheet.png", {"first": wide, "second": narrow}, classes)
        with Image.open(tmp_path / "sheet.png") as picture:
            sheet = np.asarray(picture)
        assert sheet.shape == (22 + 22 + 20 + 8 + 22 + 30 + 8 + 20, 3 * 98 + 8, 3)
        for i in range(3):
            x = 8 + 98 * i
            np.testing.assert_array_equal(sheet[44:64, x : x + 90], wide[i])
            np.testing.assert_array_equal(sheet[94:124, x + 20 : x + 70], narrow[i])  # centred
            assert (sheet[4:20, x : x + 90] < 200).any()  # a title
        assert (sheet[24:42, 8:40] < 128).any() and (sheet[74:92, 8:40] < 128).any()  # captions
        key = sheet[132:].reshape(-1, 3).tolist()
        shown = [draw.TRUE, draw.PREDICTED] if not classes else draw.palette(2).tolist()
        assert all(list(colour) in key for colour in shown)


def test_learning_curves_show_the_history(tmp_path, figures):
    curves = {
        ("loss", "training"): ("loss", [0.9, 0.5, 0.3]),
        ("loss", "validation"): ("val_loss", [1.2, 0.8, 0.7]),
        ("Dice, mean over images", "training"): ("dice_per_image", [0.2, 0.6, 0.9]),
        ("Dice, mean over images", "validation"): ("val_dice_per_image", [0.1, 0.4, 0.5]),
    }
    history = [{"epoch": i + 1} | {k: v[i] for k, v in curves.values()} for i in range(3)]
    path = tmp_path / "curves.png"
    draw.save_curves(path, history)
    lines = {(a.get_title(), line.get_label()): line for a in figures[0].axes for line in a.lines}
    assert lines.keys() == curves.keys()
    for name, (_, values) in curves.items():
        points = np.column_stack([[1, 2, 3], values])
        np.testing.assert_array_equal(lines[name].get_xydata(), points)
        colours = colours_at(path, lines[name].axes, points)
        np.testing.assert_allclose(colours, [to_rgb(lines[name].get_color())] * 3, atol=0.1)


def test_the_reliability_diagram_shows_every_bin_that_is_not_empty(tmp_path, figures):
    counts = Reliability(
        pixels=np.array([80, 0, 20, 400]),
        probability_sum=np.array([16.0, 0, 12, 360]),
        positives=np.array([8, 0, 15, 300]),
    )
    path = tmp_path / "reliability.png"
    draw.save_reliability(path, counts)
    fraction, number = figures[0].axes
    calibrated, model = fraction.lines
    points = np.array([[0.2, 0.1], [0.6, 0.75], [0.9, 0.75]])
    np.testing.assert_allclose(calibrated.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(model.get_xydata(), points)
    colours = colours_at(path, fraction, points)
    np.testing.assert_allclose(colours, [to_rgb(model.get_color())] * 3, atol=0.02)
    bars = [(x.get_x() + x.get_width() / 2, x.get_height()) for x in number.patches]
    np.testing.assert_allclose(bars, [(0.125, 80), (0.625, 20), (0.875, 400)])
    colours = colours_at(path, number, [[0.125, 60], [0.375, 60], [0.625, 60], [0.875, 60]])
    filled = (abs(colours - to_rgb(number.patches[0].get_facecolor())) < 0.02).all(1)
    assert filled.tolist() == [True, False, False, True]  # which bars reach to 60


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_images_of_any_channels_and_type_are_shown(channels, shown):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, channels), np.uint8)
    expected = image[..., shown]
    np.testing.assert_array_equal(draw.as_rgb(image), expected)
    np.testing.assert_array_equal(draw.as_rgb(image / np.float32(255)), expected)


def test_overlapping_classes_are_drawn_with_the_last_on_top():
    mask = np.array([[[0, 0], [1, 0], [0, 1], [1, 1], [255, 1], [255, 0]]], np.uint8)
    np.testing.assert_array_equal(draw.flat(mask), [[0, 1, 2, 2, 2, 0]])
    index = np.array([[[3], [0], [255]]], np.uint8)
    np.testing.assert_array_equal(draw.flat(index), [[3, 0, 255]])


def test_the_confusion_matrix_is_in_percent_of_each_true_class(tmp_path, figures):
    matrix = np.array([[3, 1, 0], [2, 2, 4], [0, 0, 0]])
    draw.save_confusion(tmp_path / "c.png", matrix, ("a", "b", "c"))
    axes = figures[0].axes[0]
    texts = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}  # (column, row)
    rows = [[texts[j, i] for j in range(3)] for i in range(3)]
    assert rows == [["75", "25", "0"], ["25", "25", "50"], ["0", "0", "0"]]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
