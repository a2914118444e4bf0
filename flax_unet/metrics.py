"""Figures of a prediction. Counts add, ratios do not: count first, add, divide once.

    counts = confusion(logits, labels)        # an entry an image
    dice(counts).mean()                       # Dice per image
    dice(pooled(counts))                      # Dice of all pixels together

All of it works on NumPy and JAX arrays alike. A ratio 0 / 0 is 1: nothing was there and nothing
was claimed, so nothing is wrong.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_unet.losses import same_shape


class Confusion(NamedTuple):
    """Numbers of pixels: true and false positives, false and true negatives."""

    tp: Any
    fp: Any
    fn: Any
    tn: Any


def confusion(logits: jax.Array, labels: jax.Array) -> Confusion:
    """Count each image's pixels, a pixel being positive where its logit is (probability > 0.5).

    Args:
        logits: [B, H, W, C].
        labels: [B, H, W, C], positive above 0.5.

    Returns:
        Int32 [B, C] each.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(logits, labels)
    positive, true = logits > 0, labels > 0.5

    def count(pixels: jax.Array) -> jax.Array:
        return pixels.sum((1, 2), dtype=jnp.int32)

    return Confusion(
        tp=count(positive & true),
        fp=count(positive & ~true),
        fn=count(~positive & true),
        tn=count(~positive & ~true),
    )


def pooled(counts: Confusion) -> Confusion:
    """The sum over the images [N, C] -> [C], in 64 bits: a data set has more than 2^31 pixels."""
    return Confusion(*(np.asarray(count).sum(0, dtype=np.int64) for count in counts))


def _ratio(part: Any, whole: Any) -> Any:
    return (part + (whole == 0)) / (whole + (whole == 0))


def dice(c: Confusion) -> Any:
    """2 TP / (2 TP + FP + FN), of each entry."""
    return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def iou(c: Confusion) -> Any:
    """TP / (TP + FP + FN), of each entry."""
    return _ratio(c.tp, c.tp + c.fp + c.fn)


def precision(c: Confusion) -> Any:
    """TP / (TP + FP), of each entry."""
    return _ratio(c.tp, c.tp + c.fp)


def recall(c: Confusion) -> Any:
    """TP / (TP + FN), of each entry."""
    return _ratio(c.tp, c.tp + c.fn)


def accuracy(c: Confusion) -> Any:
    """(TP + TN) / all, of each entry."""
    return _ratio(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn)


def iou_coef(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> jax.Array:
    """The tutorial's `iou_coef`: (I + 100) / (S - I + 100), soft and of the whole batch.

    I = sum(y p) and S = sum(y + p), p the probabilities. Keras reports its mean over batches, each
    counting the same, however small. It is no measure of quality: compare `iou`.

    Args:
        logits: [B, H, W, C].
        labels: [B, H, W, C] in [0, 1].
        weight: [B], 0 for an image that only fills the batch.

    Returns:
        Float32 scalar in (0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(logits, labels)
    proba, labels = jax.nn.sigmoid(logits.astype(jnp.float32)), labels.astype(jnp.float32)
    overlap = (weight * (proba * labels).sum((1, 2, 3))).sum()
    total = (weight * (proba + labels).sum((1, 2, 3))).sum()
    return (overlap + 100) / (total - overlap + 100)


def summary(
    loss: Sequence[float] | np.ndarray,
    iou_coef: Sequence[float] | np.ndarray,
    counts: Confusion,
) -> dict[str, float]:
    """The figures of a set of images.

    Args:
        loss: of each image.
        iou_coef: of each batch.
        counts: [N, C], an entry an image.
    """
    counts = Confusion(*(np.asarray(count, np.int64) for count in counts))
    total = pooled(counts)
    return {
        "loss": float(np.mean(loss)),
        "accuracy": float(accuracy(total).mean()),
        "iou_coef": float(np.mean(iou_coef)),
        "dice_per_image": float(dice(counts).mean()),
        "iou_per_image": float(iou(counts).mean()),
        "precision_per_image": float(precision(counts).mean()),
        "recall_per_image": float(recall(counts).mean()),
        "dice_pooled": float(dice(total).mean()),
        "iou_pooled": float(iou(total).mean()),
        "precision_pooled": float(precision(total).mean()),
        "recall_pooled": float(recall(total).mean()),
        "n_images": len(counts.tp),
    }


class Reliability(NamedTuple):
    """Of the pixels whose probability falls into each of K equal parts of [0, 1]; adds like counts.

    Guo et al.: "On Calibration of Modern Neural Networks", ICML 2017.
    """

    n: np.ndarray  # int64 [K]: how many
    claimed: np.ndarray  # float64 [K]: the sum of their probabilities
    found: np.ndarray  # int64 [K]: how many are foreground


def reliability(proba: np.ndarray, labels: np.ndarray, *, parts: int = 15) -> Reliability:
    """Count the pixels of an image by their probability of foreground.

    Args:
        proba: in [0, 1], of any shape.
        labels: 0 and 1, of the same shape.
        parts: K.

    Raises:
        ValueError: the shapes differ.
    """
    proba, labels = np.asarray(proba, np.float64), np.asarray(labels)
    if proba.shape != labels.shape:
        raise ValueError(f"proba {proba.shape} and labels {labels.shape} must be of one shape")
    part = np.minimum((proba * parts).astype(int), parts - 1).ravel()
    return Reliability(
        n=np.bincount(part, minlength=parts),
        claimed=np.bincount(part, proba.ravel(), parts),
        found=np.bincount(part[labels.ravel() > 0.5], minlength=parts),
    )


def calibration_error(r: Reliability) -> float:
    """The mean over the pixels of |mean probability - share of foreground| of their part (ECE)."""
    return float(np.abs(r.claimed - r.found).sum() / r.n.sum())


def bootstrap_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of [N] values: percentiles of the means of 10,000 resamples.

    Efron, Tibshirani: "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(10_000)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
