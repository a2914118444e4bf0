"""Segmentation metrics. Counts add up over images, ratios do not: count, add, then divide once.

    counts = confusion(logits, mask)          # [B, C], per image and class
    dice(counts).mean()                       # Dice per image, averaged
    dice(pooled(counts))                      # Dice of all pixels together

The metrics accept NumPy and JAX arrays. 0 / 0 counts as 1: Dice and IoU if both masks are empty,
precision if nothing is predicted, recall if nothing is there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_unet import classes


class Confusion(NamedTuple):
    """Pixel counts of a class against the rest: true and false positives and negatives."""

    tp: Any
    fp: Any
    fn: Any
    tn: Any


def confusion(logits: jax.Array, mask: jax.Array, *, overlapping: bool = False) -> Confusion:
    """Count the pixels of each image, each class against the rest, as far as they count.

    One class or overlapping classes are predicted where the logit is positive (probability > 0.5),
    of exclusive classes the one with the largest logit; see `flax_unet.classes`.

    >>> logits = jnp.array([2.0, 1.0, -1.0, -3.0]).reshape(1, 2, 2, 1)
    >>> counts = confusion(logits, jnp.array([1, 0, 1, 0]).reshape(1, 2, 2, 1))
    >>> [int(count[0, 0]) for count in counts], float(dice(counts)[0, 0])
    ([1, 1, 1, 1], 0.5)

    Args:
        logits: [B, H, W, C].
        mask: [B, H, W, 1] of class indices, or [B, H, W, C], where a class is above 0.5.
        overlapping: whether the classes are independent of each other.

    Returns:
        Counts, each int32 [B, C].

    Raises:
        ValueError: the shapes do not fit together.
    """
    classes.check_shapes(logits, mask)
    predicted = classes.predicted(logits, overlapping=overlapping)
    true, counts = classes.truth(mask, logits.shape[-1]) > 0.5, classes.counted(mask)

    def count(pixels: jax.Array) -> jax.Array:
        return pixels.sum((1, 2), dtype=jnp.int32)

    return Confusion(
        tp=count(predicted & true),
        fp=count(predicted & ~true & counts),
        fn=count(~predicted & true),
        tn=count(~predicted & ~true & counts),
    )


def pooled(counts: Confusion) -> Confusion:
    """Sum over images, [N, C] -> [C], in 64 bits: a data set can have more than 2^31 pixels."""
    return Confusion(*(np.asarray(count).sum(0, dtype=np.int64) for count in counts))


def _ratio(numerator: Any, denominator: Any) -> Any:
    return (numerator + (denominator == 0)) / (denominator + (denominator == 0))


def dice(c: Confusion) -> Any:
    """2 TP / (2 TP + FP + FN), elementwise."""
    return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def iou(c: Confusion) -> Any:
    """TP / (TP + FP + FN), elementwise."""
    return _ratio(c.tp, c.tp + c.fp + c.fn)


def precision(c: Confusion) -> Any:
    """TP / (TP + FP), elementwise."""
    return _ratio(c.tp, c.tp + c.fp)


def recall(c: Confusion) -> Any:
    """TP / (TP + FN), elementwise."""
    return _ratio(c.tp, c.tp + c.fn)


#: The scores of reports.
RATIOS = dice, iou, precision, recall


def accuracy(c: Confusion) -> Any:
    """(TP + TN) / (TP + FP + FN + TN), elementwise."""
    return _ratio(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn)


def iou_coef(
    logits: jax.Array, mask: jax.Array, weight: jax.Array, *, overlapping: bool = False
) -> jax.Array:
    """The tutorial's `iou_coef`: (I + 100) / (S - I + 100), soft and over the entire batch.

    I = sum(y p) and S = sum(y + p) with probabilities p. Keras reports the unweighted mean over
    batches, even if the last one is smaller. To measure quality, use `iou`.

    Args:
        logits: [B, H, W, C].
        mask: [B, H, W, 1] of class indices, or [B, H, W, C] in [0, 1].
        weight: [B], 0 for images that pad the batch.
        overlapping: whether the classes are independent of each other.

    Returns:
        Float32 scalar in (0, 1].

    Raises:
        ValueError: the shapes do not fit together.
    """
    classes.check_shapes(logits, mask)
    proba = classes.probabilities(logits, overlapping=overlapping)
    labels, counts = classes.truth(mask, logits.shape[-1]), classes.counted(mask)
    overlap = (weight * (proba * labels).sum((1, 2, 3))).sum()
    total = (weight * jnp.where(counts, proba + labels, 0).sum((1, 2, 3))).sum()
    return (overlap + 100) / (total - overlap + 100)


def summary(
    loss: Sequence[float] | np.ndarray,
    iou_coef: Sequence[float] | np.ndarray,
    counts: Confusion,
) -> dict[str, float]:
    """All metrics of a set of images: means per image and ratios of the pooled counts.

    Args:
        loss: per image.
        iou_coef: per batch.
        counts: [N, C], per image.
    """
    counts = Confusion(*(np.asarray(count, np.int64) for count in counts))
    total = pooled(counts)
    return {
        "loss": float(np.mean(loss)),
        "accuracy": _pixel_accuracy(total),
        "iou_coef": float(np.mean(iou_coef)),
        **{f"{ratio.__name__}_per_image": float(ratio(counts).mean()) for ratio in RATIOS},
        **{f"{ratio.__name__}_pooled": float(ratio(total).mean()) for ratio in RATIOS},
        "n_images": len(counts.tp),
    }


def _pixel_accuracy(total: Confusion) -> float:
    """The fraction of pixels whose class is right.

    For exclusive classes it counts each pixel once: one class against the rest would score high
    whatever is predicted.
    """
    pixels = (total.tp + total.fp + total.fn + total.tn)[0]
    exclusive = (total.tp + total.fn).sum() == (total.tp + total.fp).sum() == pixels
    if len(total.tp) > 1 and exclusive:
        return float(total.tp.sum() / max(1, pixels))
    return float(accuracy(total).mean())


class Reliability(NamedTuple):
    """The data of a reliability diagram, K equal bins of [0, 1]; adds up like `Confusion`.

    Guo et al.: "On Calibration of Modern Neural Networks", ICML 2017.
    """

    pixels: np.ndarray  # int64 [K]: pixels with a probability in the bin
    probability_sum: np.ndarray  # float64 [K]: sum of their probabilities
    positives: np.ndarray  # int64 [K]: how many of them are foreground


def reliability(proba: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> Reliability:
    """Count the pixels of an image by their probability of foreground.

    Args:
        proba: in [0, 1], of any shape.
        labels: 0 and 1, of the same shape.
        bins: K.

    Raises:
        ValueError: the shapes differ.
    """
    proba, labels = np.asarray(proba, np.float64), np.asarray(labels)
    if proba.shape != labels.shape:
        raise ValueError(f"proba {proba.shape} and labels {labels.shape} must have the same shape")
    index = np.minimum((proba * bins).astype(int), bins - 1).ravel()
    return Reliability(
        pixels=np.bincount(index, minlength=bins),
        probability_sum=np.bincount(index, proba.ravel(), bins),
        positives=np.bincount(index[labels.ravel() > 0.5], minlength=bins),
    )


def calibration_error(r: Reliability) -> float:
    """Expected calibration error (ECE): the gap of each pixel's bin, averaged over pixels.

    The gap of a bin is |mean probability - fraction of foreground|.
    """
    return float(np.abs(r.probability_sum - r.positives).sum() / r.pixels.sum())


def bootstrap_interval(values: np.ndarray, *, seed: int = 0) -> Any:
    """95 % interval of the mean: (low, high) for [N] values, a list of K pairs for [N, K].

    The limits are percentiles of the means of 10,000 resamples; the columns share each resample.
    Efron, Tibshirani: "An Introduction to the Bootstrap", 1993, chapter 13.

    >>> bootstrap_interval(np.array([0.5, 0.75, 0.75, 1.0]))
    (0.5625, 0.9375)
    """
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(n, size=n)].mean(0) for _ in range(10_000)]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    if values.ndim == 1:
        return float(low), float(high)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a fraction, k of n. It has a width also if k is 0 or n, unlike a bootstrap.

    Wilson: "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.

    >>> low, high = wilson_interval(0, 100)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.037)
    """
    from scipy import stats  # takes a second, and nothing else here needs it

    low, high = stats.binomtest(k, n).proportion_ci(method="wilson")
    return float(low), float(high)
