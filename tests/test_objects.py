import time

import numpy as np
import pytest
from skimage import measure

from flax_unet import objects


def test_the_numbers_of_each_object_are_those_of_scikit_image(monkeypatch):
    monkeypatch.setattr(objects, "CHUNK", 500)  # several chunks, which cut objects
    rng = np.random.default_rng(0)
    for shape, density in (((60, 47), 0.25), ((33, 90), 0.4), ((1, 50), 0.5), ((50, 1), 0.5)):
        mask, proba = rng.random(shape) < density, rng.random(shape).astype(np.float32)
        found = objects.find(mask, proba)
        props = measure.regionprops(measure.label(mask, connectivity=2), intensity_image=proba)
        assert len(found) == len(props) > 3
        assert [each.area for each in found] == sorted((int(p.area) for p in props), reverse=True)
        expected = {}
        for p in props:
            top, left, bottom, right = p.bbox
            box = (left, top, right - left, bottom - top)
            expected[box, int(p.area), round(p.centroid[1], 6)] = (*p.centroid, p.intensity_mean)
        assert len(expected) == len(props)
        for each in found:
            y, x, mean = expected[each.box, each.area, round(each.centroid[0], 6)]
            np.testing.assert_allclose(each.centroid, (x, y))
            assert each.mean_probability == pytest.approx(mean, rel=1e-5)


def test_objects_of_a_mask_drawn_by_hand():
    mask = np.array(
        [
            [1, 0, 0, 0, 0, 1],
            [0, 1, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 1],
            [1, 0, 0, 1, 0, 1],
        ],
        bool,
    )
    proba = np.where(mask, np.arange(24).reshape(4, 6) / 32, 1)
    assert objects.find(mask, proba) == [
        objects.Object(4, (5, 0, 1, 4), (5.0, 1.5), (5 + 11 + 17 + 23) / 4 / 32),
        objects.Object(2, (0, 0, 2, 2), (0.5, 0.5), 7 / 2 / 32),  # they touch at a corner
        objects.Object(1, (0, 3, 1, 1), (0.0, 3.0), 18 / 32),  # equal areas: in reading order
        objects.Object(1, (3, 3, 1, 1), (3.0, 3.0), 21 / 32),
    ]


def test_an_empty_and_a_full_mask():
    assert objects.find(np.zeros((3, 5), bool), np.zeros((3, 5))) == []
    assert objects.find(np.zeros((0, 5), bool), np.zeros((0, 5))) == []
    whole = objects.find(np.ones((3, 5), bool), np.full((3, 5), 0.5))
    assert whole == [objects.Object(15, (0, 0, 5, 3), (2.0, 1.0), 0.5)]


def test_other_shapes_are_refused():
    for shapes in (((3, 5), (5, 3)), ((3, 5, 1), (3, 5, 1))):
        with pytest.raises(ValueError, match=r"must both be \[H, W\]"):
            objects.find(np.zeros(shapes[0], bool), np.zeros(shapes[1]))


def test_a_large_mask_of_many_objects_takes_seconds():
    y, x = np.mgrid[:4000, :4000]
    mask = (y % 20 < 10) & (x % 20 < 10)  # 40,000 squares
    began = time.process_time()
    found = objects.find(mask, np.full(mask.shape, 0.75, np.float32))
    assert time.process_time() - began < 10  # 0.6 s on one core
    assert len(found) == 200 * 200 and {each.area for each in found} == {100}
    assert {each.box[2:] for each in found} == {(10, 10)}


def test_the_largest_objects_of_many_and_their_number():
    mask = np.random.default_rng(0).random((60, 70)) < 0.2
    proba = np.random.default_rng(1).random((60, 70))
    every = objects.find(mask, proba)
    number, some = objects.largest(mask, proba, 7)
    assert number == len(every) > 50 and some == every[:7]
    assert objects.largest(np.zeros((3, 4), bool), np.zeros((3, 4)), 7) == (0, [])
