"""What a data set holds, and what resizing costs it."""

import json

import numpy as np
import pytest
from drawn import encode, rgb

from flax_unet import data, pictures, summary
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat


def spots(*boxes, size=(60, 40), value=1):
    mask = np.zeros(size, np.uint8)
    for y, x, height, width in boxes:
        mask[y : y + height, x : x + width] = value
    return mask


def facts_of(mask, size):
    mask = mask if mask.ndim == 3 else mask[..., None]
    return summary.facts(mask, pictures.resize_mask(mask, size))


def test_objects_that_vanish_are_counted_and_the_size_that_keeps_them_does():
    mask = spots((2, 2, 20, 20), (40, 4, 3, 3), (50, 30, 1, 1))
    facts = facts_of(mask, (15, 10))
    assert (facts.height, facts.width, facts.objects) == (60, 40, 3)
    assert facts.pixels == {"0": 60 * 40 - 400 - 9 - 1, "1": 410}
    assert facts.lost == 1 and facts.needed == 60  # the single pixel
    assert facts_of(mask, (60, 40)).lost == 0 and facts_of(mask, (60, 40)).needed == 0
    assert facts_of(mask, (4, 4)).lost == 2


def test_classes_are_looked_at_separately_and_what_does_not_count_is_left_out():
    mask = spots((0, 0, 30, 40), value=3)
    mask[40:, :] = IGNORE
    mask[35, 7] = 2
    facts = facts_of(mask, (12, 8))
    assert facts.pixels == {"0": 399, "2": 1, "3": 1200} and facts.resized.keys() == {"0", "3"}
    assert (facts.objects, facts.lost) == (2, 1)


def test_overlapping_classes_are_looked_at_in_their_own_channels():
    large, small = spots((0, 0, 30, 40)), spots((5, 5, 20, 20), (50, 30, 1, 1))
    facts = facts_of(np.stack([large, small], -1), (12, 8))
    assert facts.pixels == {"0": 2400 - 1200 - 1, "1": 1200, "2": 401}
    assert facts.resized.keys() == {"0", "1", "2"} and (facts.objects, facts.lost) == (3, 1)
    train = summary.summarise({"train": [facts]}, ("rest", "large", "small"))["train"]
    assert train["classes"]["small"]["fraction"] == pytest.approx(401 / 2400)


def test_pixels_of_overlapping_classes_that_do_not_count_are_not_background():
    mask = np.stack([spots((0, 0, 30, 40)), spots((5, 5, 20, 20))], -1)
    mask[50:] = IGNORE
    assert facts_of(mask, (12, 8)).pixels == {"0": 2400 - 1200 - 400, "1": 1200, "2": 400}


def test_a_summary_has_fractions_pictures_and_what_was_lost():
    masks = [spots((0, 0, 30, 40)), spots((5, 5, 1, 1)), spots()]
    known = [facts_of(mask, (6, 4)) for mask in masks]
    content = summary.summarise({"train": known, "validation": known[:1]}, ("rest", "cell"))
    train = content["train"]
    assert train["pictures"] == 3 and train["sizes"] == {"40x60": 3}
    assert train["classes"]["cell"] == {"fraction": pytest.approx(1201 / 7200), "pictures": 2}
    assert (train["empty"], train["emptied"], train["objects_lost"]) == (1, 1, 1)
    text = summary.as_text(json.loads(json.dumps(content)))
    assert "16.68 % in 2" in text and "50.00 % in 1" in text
    assert "train: 1 of 2 objects vanish" in text and "--image-size 60" in text
    assert "validation: " not in text


def test_arrays_know_their_facts_also_from_the_cache(tmp_path):
    form = MaskFormat(values=((0, 0), (255, 1)))
    source = [
        {
            "name": str(i),
            "image": encode(rgb(i, (60, 40))),
            "mask": encode(spots((0, i, 9, 9)) * 255),
        }
        for i in range(3)
    ]
    first = data.load(source, 16, form, cache=tmp_path)
    assert [each.pixels["1"] for each in first.facts] == [81] * 3
    assert list(data.load(source, 16, form, cache=tmp_path).facts) == list(first.facts)


def test_a_class_that_no_mask_has_is_named():
    facts = [facts_of(spots((2, 2, 20, 20), value=2), (15, 10))]
    splits = {"train": facts, "validation": facts}
    text = summary.as_text(summary.summarise(splits, ("background", "disc", "ring")))
    assert "warning: no mask of train has a pixel of class disc" in text
    assert text.count("warning") == 1
