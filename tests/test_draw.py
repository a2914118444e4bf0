import numpy as np
from PIL import Image

from flax_unet import draw, metrics


def test_the_overlay_mixes_half_of_the_colour_where_the_prediction_is_sure():
    image = np.full((4, 4, 3), 100, np.uint8)
    proba = np.zeros((4, 4))
    proba[1, 2], proba[2, 2] = 1, 0.5
    over = draw.overlay(image, proba)
    np.testing.assert_array_equal(over[0, 0], [100, 100, 100])
    np.testing.assert_array_equal(over[1, 2], np.round(50 + np.array(draw.PREDICTED) / 2))
    np.testing.assert_array_equal(over[2, 2], np.round(75 + np.array(draw.PREDICTED) / 4))


def test_the_true_outline_is_two_pixels_inside_the_mask_and_open_at_the_frame():
    mask = np.zeros((12, 12), bool)
    mask[2:9, 3:12] = True  # it leaves the picture at the right
    expected = mask.copy()
    expected[4:7, 5:12] = False
    np.testing.assert_array_equal(draw.outline(mask), expected)
    over = draw.overlay(np.zeros((12, 12, 3), np.uint8), np.zeros((12, 12)), mask)
    np.testing.assert_array_equal((over == draw.TRUE).all(-1), expected)


def test_panels_are_image_probabilities_and_overlay():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    proba = np.linspace(0, 1, 30).reshape(6, 5)
    sheet = draw.panels(image, proba)
    assert sheet.shape == (6, 15, 3) and sheet.dtype == np.uint8
    np.testing.assert_array_equal(sheet[:, :5], image)
    np.testing.assert_array_equal(sheet[:, 5:10, 1], np.round(255 * proba))
    np.testing.assert_array_equal(sheet[:, 10:], draw.overlay(image, proba))


def test_sheets_and_curves_are_written_as_png(tmp_path):
    row = np.full((4, 6, 3), 7, np.uint8)
    draw.save_sheet(tmp_path / "sheet.png", [row, row + 1])
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "sheet.png")), np.concatenate([row, row + 1])
    )
    history = [
        {"epoch": i, "loss": 1 / i, "val_loss": 2 / i, "dice_per_image": 0, "val_dice_per_image": 1}
        for i in (1, 2, 3)
    ]
    draw.save_curves(tmp_path / "curves.png", history)
    picture = Image.open(tmp_path / "curves.png")
    assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 10


def test_the_reliability_picture_is_written_also_with_empty_parts(tmp_path):
    rng = np.random.default_rng(0)
    proba = np.concatenate([rng.uniform(0, 0.2, 900), rng.uniform(0.7, 1, 300)])
    counts = metrics.reliability(proba, rng.random(1200) < proba)
    assert (counts.n == 0).any()
    draw.save_reliability(tmp_path / "reliability.png", counts)
    picture = Image.open(tmp_path / "reliability.png")
    assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 10
