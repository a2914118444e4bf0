"""The report of evaluate.py on pictures at their own sizes."""

import io
import json

import evaluate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from flax_unet import boundary
from flax_unet.model import UNet


class Bright:
    """A network that finds what is bright: logits [B, H, W, 1]."""

    stride = 1

    def apply(self, variables, image):
        return 20 * (image.mean(-1, keepdims=True) - 0.5)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def drawn(n):
    """Pictures of several sizes with a bright disc, and masks that are a little beside it."""
    rng, source, truth = np.random.default_rng(0), [], []
    for i in range(n):
        h, w = rng.integers(40, 90, 2)
        y, x = np.mgrid[:h, :w]
        r, cy, cx = rng.uniform(4, 18), h / 2, w / 2
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        mask = (y - cy - 2) ** 2 + (x - cx) ** 2 < r * r
        grey = np.where(disc, 230, 30).astype(np.uint8)
        picture = png(np.stack([grey] * 3, -1))
        source.append({"name": str(i), "image": picture, "mask": png(255 * mask.astype(np.uint8))})
        truth.append((disc, mask))
    return source, truth


def test_a_score_is_sklearns_and_its_distances_are_shares_of_the_diagonal():
    rng = np.random.default_rng(0)
    proba, true = rng.random((30, 40)), rng.random((30, 40)) < 0.3
    score = evaluate.score(proba, true)
    flat = true.ravel(), proba.ravel() > 0.5
    assert score["share"] == pytest.approx(true.mean())
    assert score["dice"] == pytest.approx(sklearn.metrics.f1_score(*flat))
    assert score["iou"] == pytest.approx(sklearn.metrics.jaccard_score(*flat))
    assert score["precision"] == pytest.approx(sklearn.metrics.precision_score(*flat))
    assert score["recall"] == pytest.approx(sklearn.metrics.recall_score(*flat))
    assert [score[key] for key in ("tn", "fp", "fn", "tp")] == list(
        sklearn.metrics.confusion_matrix(*flat).ravel()
    )
    d = boundary.distances(proba > 0.5, true)  # the diagonal is 50 pixels, one of which 2 %
    assert score["hd95"] == pytest.approx(2 * boundary.hd95(d))
    assert score["assd"] == pytest.approx(2 * boundary.assd(d))
    assert score["surface_dice"] == boundary.surface_dice(d, 0.5)


def test_pictures_are_scored_at_their_own_sizes_and_by_the_size_of_the_polyp():
    source, truth = drawn(12)
    report, reliability = evaluate.score_pictures(Bright(), {}, source, 64)
    assert [each["name"] for each in report["images"]] == [str(i) for i in range(12)]
    sizes = dict.fromkeys(evaluate.POLYPS, 0)
    for each, (disc, mask) in zip(report["images"], truth, strict=True):
        assert each["tp"] + each["fp"] + each["fn"] + each["tn"] == mask.size
        # The network finds the disc but for a pixel of its outline, lost in resizing.
        exact = 2 * (disc & mask).sum() / (disc.sum() + mask.sum())
        assert each["dice"] == pytest.approx(exact, abs=0.06)
        share = mask.mean()
        sizes["small" if share < 0.05 else "medium" if share < 0.2 else "large"] += 1
    assert {k: v["n_images"] for k, v in report["by_polyp_size"].items()} == sizes
    assert min(sizes["small"], sizes["medium"]) > 0
    dice = np.array([each["dice"] for each in report["images"]])
    assert report["per_image"]["dice"]["mean"] == pytest.approx(dice.mean())
    low, high = report["per_image"]["dice"]["interval"]
    assert low < dice.mean() < high
    counts = {key: sum(each[key] for each in report["images"]) for key in ("tp", "fp", "fn")}
    pooled = 2 * counts["tp"] / (2 * counts["tp"] + counts["fp"] + counts["fn"])
    assert report["pooled"]["dice"] == pytest.approx(pooled)
    assert reliability.n.sum() == sum(mask.size for _, mask in truth)
    assert reliability.found.sum() == sum(mask.sum() for _, mask in truth)


def test_no_large_polyp_is_no_error_and_none_is_not_a_small_one():
    source, truth = drawn(12)
    small = [each for each, (_, mask) in zip(source, truth, strict=True) if mask.mean() < 0.05]
    black, empty = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    small.append({"name": "none", "image": png(black), "mask": png(empty)})
    report, _ = evaluate.score_pictures(Bright(), {}, small, 64)
    sizes = {polyp: each["n_images"] for polyp, each in report["by_polyp_size"].items()}
    assert sizes == {"none": 1, "small": len(small) - 1, "medium": 0, "large": 0}
    assert report["by_polyp_size"]["none"]["per_image"]["dice"]["mean"] == 1
    json.dumps(report)


def test_the_cost_is_counted():
    model = UNet(features=(4, 8), convs=1, group_size=None)
    image = np.zeros((3, 16, 16, 3), np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    cost = evaluate.cost(model, variables, image)
    # Convolutions 3-4, 4-8, 8-4, the upsampling 8-4 and the head, each with its bias.
    weights = (9 * 3 * 4 + 4) + (9 * 4 * 8 + 8) + (4 * 8 * 4 + 4) + (9 * 8 * 4 + 4) + (4 + 1)
    assert cost["parameters"] == weights
    products = 16 * 16 * 9 * (3 * 4 + 8 * 4) + 8 * 8 * (9 * 4 * 8 + 8 * 16) + 16 * 16 * 4
    assert cost["gflop_per_image"] == pytest.approx(2 * products / 1e9, rel=0.15)
    assert cost["images_per_second"] > 0
