"""Losses on logits, one value per image: logits and labels [B, H, W, C] to [B]."""

import jax
import jax.numpy as jnp


def same_shape(logits: jax.Array, labels: jax.Array) -> None:
    """Raise ValueError unless both have one shape [B, H, W, C]: broadcasting hides mistakes."""
    if logits.shape != labels.shape or logits.ndim != 4:
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} must have the same shape "
            "[B, H, W, C]: add the channel axis of a mask with mask[..., None]"
        )


def bce(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy in nats, averaged over each image.

    >>> bce(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)))  # log 2
    Array([0.6931472], dtype=float32)

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
    # -y log s(x) - (1 - y) log(1 - s(x)), rearranged so that the exponential cannot overflow
    entropy = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return entropy.mean((1, 2, 3))


def soft_dice(logits: jax.Array, labels: jax.Array, *, smooth: float = 1.0) -> jax.Array:
    """One minus the Dice coefficient of each image's probabilities, averaged over classes.

    1 - (2 sum(p y) + smooth) / (sum p + sum y + smooth): Milletari, Navab, Ahmadi: "V-Net",
    3DV 2016, without the squares.

    >>> labels = jnp.array([1, 0, 0, 0]).reshape(1, 2, 2, 1)
    >>> soft_dice(jnp.zeros((1, 2, 2, 1)), labels)  # 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    Array([0.5], dtype=float32)

    Args:
        logits: [B, H, W, C].
        labels: [B, H, W, C] in [0, 1].
        smooth: pixels added to numerator and denominator, so that an empty image has a value.

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
    """`bce` plus `soft_dice`, [B]."""
    return bce(logits, labels) + soft_dice(logits, labels)
