"""Losses on logits, one value an image: [B, H, W, C] and [B, H, W, C] to [B]."""

import jax
import jax.numpy as jnp


def same_shape(logits: jax.Array, labels: jax.Array) -> None:
    """Raise ValueError unless both are [B, H, W, C] of one shape: broadcasting hides mistakes."""
    if logits.shape != labels.shape or logits.ndim != 4:
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} must both be [B, H, W, C] and of one "
            "shape: give a mask its channel with mask[..., None]"
        )


def bce(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy, in nats, its mean over each image.

    Args:
        logits: [B, H, W, C].
        labels: [B, H, W, C] in [0, 1].

    Returns:
        Float32 [B].

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(logits, labels)
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    # -y log s(x) - (1 - y) log(1 - s(x)), without a large exponential
    entropy = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return entropy.mean((1, 2, 3))


def soft_dice(logits: jax.Array, labels: jax.Array, *, smooth: float = 1.0) -> jax.Array:
    """One minus the Dice coefficient of the probabilities, of each image (mean over classes).

    1 - (2 sum(p y) + smooth) / (sum p + sum y + smooth): Milletari, Navab, Ahmadi: "V-Net",
    3DV 2016, without the squares.

    Args:
        logits: [B, H, W, C].
        labels: [B, H, W, C] in [0, 1].
        smooth: pixels added above and below; keeps an empty image finite.

    Returns:
        Float32 [B] in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(logits, labels)
    proba, labels = jax.nn.sigmoid(logits.astype(jnp.float32)), labels.astype(jnp.float32)
    overlap = (proba * labels).sum((1, 2))
    total = (proba + labels).sum((1, 2))
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean(-1)


def bce_soft_dice(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum of `bce` and `soft_dice`, [B]."""
    return bce(logits, labels) + soft_dice(logits, labels)
