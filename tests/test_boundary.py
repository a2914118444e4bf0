import numpy as np
import pytest

from flax_unet import boundary


def outline(mask):
    """The pixels of a mask with a 4-neighbour outside the mask or outside the image."""
    h, w = mask.shape
    pixels = []
    for i in range(h):
        for j in range(w):
            neighbours = ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
            inside = [0 <= y < h and 0 <= x < w and mask[y, x] for y, x in neighbours]
            if mask[i, j] and not all(inside):
                pixels.append((i, j))
    return pixels


def nearest(points, others):
    """The distance from each point to the nearest of the others."""
    return [min(((a - c) ** 2 + (b - d) ** 2) ** 0.5 for c, d in others) for a, b in points]


def blobs(seed):
    """Two masks of overlapping discs, some of them cut off by the border: bool [17, 23]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:17, :23]
    discs = [
        (y - rng.uniform(0, 17)) ** 2 + (x - rng.uniform(0, 23)) ** 2 < rng.uniform(2, 7) ** 2
        for _ in range(4)
    ]
    return discs[0] | discs[1], discs[2] | discs[3]


@pytest.mark.parametrize("seed", range(8))
def test_metrics_equal_brute_force(seed):
    predicted, true = blobs(seed)
    ours, theirs = outline(predicted), outline(true)
    forth, back = nearest(ours, theirs), nearest(theirs, ours)
    d = boundary.distances(predicted, true)
    np.testing.assert_allclose(sorted(d.predicted), sorted(forth), rtol=1e-12)
    np.testing.assert_allclose(sorted(d.true), sorted(back), rtol=1e-12)
    assert boundary.hd95(d) == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert boundary.assd(d) == pytest.approx(sum(forth + back) / len(forth + back))
    for tolerance in (0, 1, 2.5):
        near = sum(x <= tolerance for x in forth + back)
        assert boundary.surface_dice(d, tolerance) == pytest.approx(near / len(forth + back))


def test_a_square_shifted_by_three_pixels():
    a, b = np.zeros((2, 20, 20), bool)
    a[5:10, 5:10], b[5:10, 8:13] = True, True
    d = boundary.distances(a, b)
    # In the overlap, two rows of two pixels are on both outlines; the far side is 3 pixels away.
    assert sorted(d.predicted) == sorted(d.true) == [0] * 4 + [1] * 5 + [2] * 2 + [3] * 5
    assert boundary.hd95(d) == 3
    assert boundary.assd(d) == (5 + 4 + 15) / 16
    assert boundary.surface_dice(d, 1) == 9 / 16


def test_empty_masks():
    empty, square = np.zeros((2, 30, 40), bool)
    square[3:6, 3:6] = True
    d = boundary.distances(empty, empty)
    assert (boundary.hd95(d), boundary.assd(d)) == (0, 0)
    assert boundary.surface_dice(d, 1) == 1
    for pair in ((empty, square), (square, empty)):
        d = boundary.distances(*pair)
        assert boundary.hd95(d) == boundary.assd(d) == 50  # the diagonal
        assert boundary.surface_dice(d, 49) == 0


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        boundary.distances(np.zeros((2, 3)), np.zeros((3, 2)))


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_monai(seed):
    """Runs only if MONAI is installed: extra `peers`."""
    monai = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    predicted, true = blobs(seed)
    d = boundary.distances(predicted, true)
    a, b = (torch.from_numpy(m)[None, None].float() for m in (predicted, true))
    options = {"include_background": True}
    expected = monai.compute_hausdorff_distance(a, b, percentile=95, **options)
    assert boundary.hd95(d) == pytest.approx(float(expected))
    expected = monai.compute_average_surface_distance(a, b, symmetric=True, **options)
    assert boundary.assd(d) == pytest.approx(float(expected))
    for tolerance in (1, 2):
        expected = monai.compute_surface_dice(a, b, [tolerance], **options)
        assert boundary.surface_dice(d, tolerance) == pytest.approx(float(expected))
