"""Losses, one value per image: logits [B, H, W, C] and mask to [B].

`bce` and `bce_soft_dice` are for one class or overlapping classes, `cross_entropy` and
`cross_entropy_soft_dice` for exclusive ones; `flax_unet.classes` explains the kinds and the pixels
that do not count.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flax_unet import classes


def bce(logits: jax.Array, mask: jax.Array, pixel_weight: jax.Array | None = None) -> jax.Array:
    """Binary cross-entropy in nats, averaged over the pixels of each image that count.

    >>> bce(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)))  # log 2
    Array([0.6931472], dtype=float32)

    Args:
        logits: [B, H, W, C].
        mask: [B, H, W, C] in [0, 1].
        pixel_weight: [B, H, W, 1], a factor for each pixel's entropy.

    Returns:
        Float32 [B].

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != mask.shape:
        raise ValueError(
            f"logits {logits.shape} and mask {mask.shape} must have the same shape [B, H, W, C]; "
            "for exclusive classes use cross_entropy"
        )
    labels, counts = classes.truth(mask, logits.shape[-1]), classes.counted(mask)
    logits = logits.astype(jnp.float32)
    # -y log s(x) - (1 - y) log(1 - s(x)), rearranged so that the exponential cannot overflow. With
    # `maximum` and `abs` the gradient at a logit of 0 would be wrong by 0.5.
    positive = logits >= 0
    softplus = jnp.log1p(jnp.exp(jnp.where(positive, -logits, logits)))
    entropy = jnp.where(positive, logits, 0) - logits * labels + softplus
    return _mean(entropy, counts, pixel_weight)


def cross_entropy(
    logits: jax.Array,
    mask: jax.Array,
    pixel_weight: jax.Array | None = None,
    *,
    class_weight: Sequence[float] | None = None,
) -> jax.Array:
    """Cross-entropy of exclusive classes in nats, averaged over the pixels that count.

    >>> cross_entropy(jnp.zeros((1, 2, 2, 3)), jnp.full((1, 2, 2, 1), 2))  # log 3
    Array([1.0986123], dtype=float32)

    Args:
        logits: [B, H, W, C].
        mask: [B, H, W, 1] of class indices, or one-hot [B, H, W, C].
        pixel_weight: [B, H, W, 1], a factor for each pixel's entropy.
        class_weight: C weights; the average is weighted by that of each pixel's class.

    Returns:
        Float32 [B].

    Raises:
        ValueError: the shapes do not fit together, C is 1, or there are not C weights.
    """
    classes.check_shapes(logits, mask)
    if logits.shape[-1] == 1:
        raise ValueError("the cross-entropy of one channel is always 0: use bce or bce_soft_dice")
    labels = classes.truth(mask, logits.shape[-1])
    counts = classes.counted(mask).all(-1, keepdims=True)
    entropy = -(labels * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1, keepdims=True)
    if class_weight is None:
        return _mean(entropy, counts, pixel_weight)
    if len(class_weight) != logits.shape[-1]:
        raise ValueError(f"{len(class_weight)} class weights for {logits.shape[-1]} classes")
    weight = (labels * jnp.asarray(class_weight, jnp.float32)[None, None, None]).sum(-1)[..., None]
    entropy = weight * entropy * (1 if pixel_weight is None else pixel_weight)
    total = jnp.where(counts, weight, 0).sum((1, 2, 3))
    return jnp.where(counts, entropy, 0).sum((1, 2, 3)) / jnp.maximum(total, 1e-6)


def _mean(entropy: jax.Array, counts: jax.Array, pixel_weight: jax.Array | None) -> jax.Array:
    """The mean of the entries that count, times their weights; 0 if none counts."""
    if pixel_weight is not None:
        entropy = entropy * pixel_weight
    total = counts.sum((1, 2, 3), dtype=jnp.float32)
    return jnp.where(counts, entropy, 0).sum((1, 2, 3)) / jnp.maximum(total, 1)


def soft_dice(
    logits: jax.Array, mask: jax.Array, *, exclusive: bool = False, smooth: float = 1.0
) -> jax.Array:
    """One minus the Dice coefficient of each image's probabilities, averaged over classes.

    1 - (2 sum(p y) + smooth) / (sum p + sum y + smooth): Milletari, Navab, Ahmadi: "V-Net",
    3DV 2016, without the squares.

    >>> mask = jnp.array([1, 0, 0, 0]).reshape(1, 2, 2, 1)
    >>> soft_dice(jnp.zeros((1, 2, 2, 1)), mask)  # 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    Array([0.5], dtype=float32)

    Args:
        logits: [B, H, W, C].
        mask: [B, H, W, C] in [0, 1]; for exclusive classes also [B, H, W, 1] of class indices.
        exclusive: whether the probabilities are the softmax of the logits, or their sigmoid.
        smooth: pixels added to numerator and denominator, so that an empty image has a value.

    Returns:
        Float32 [B] in [0, 1].

    Raises:
        ValueError: the shapes do not fit together.
    """
    classes.check_shapes(logits, mask)
    if not exclusive and mask.shape != logits.shape:
        raise ValueError(
            f"logits {logits.shape} and mask {mask.shape} must have the same shape unless the "
            "classes are exclusive"
        )
    proba = classes.probabilities(logits, overlapping=not exclusive)
    labels, counts = classes.truth(mask, logits.shape[-1]), classes.counted(mask)
    overlap = (proba * labels).sum((1, 2))
    total = jnp.where(counts, proba + labels, 0).sum((1, 2))
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean(-1)


def bce_soft_dice(
    logits: jax.Array, mask: jax.Array, pixel_weight: jax.Array | None = None
) -> jax.Array:
    """`bce` plus `soft_dice`, [B]."""
    return bce(logits, mask, pixel_weight) + soft_dice(logits, mask)


def cross_entropy_soft_dice(
    logits: jax.Array,
    mask: jax.Array,
    pixel_weight: jax.Array | None = None,
    *,
    class_weight: Sequence[float] | None = None,
) -> jax.Array:
    """`cross_entropy` plus `soft_dice` of exclusive classes, [B]."""
    entropy = cross_entropy(logits, mask, pixel_weight, class_weight=class_weight)
    return entropy + soft_dice(logits, mask, exclusive=True)
