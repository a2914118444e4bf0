"""Classes of pixels: what the channels of logits predict, and what the values of a mask say.

There are three kinds, for logits [B, H, W, C]:

    one class     C = 1; the mask [B, H, W, 1] has 1 where it is and 0 elsewhere
    exclusive     C > 1; the mask [B, H, W, 1] has the index of each pixel's class, 0 to C - 1, or
                  is one-hot, [B, H, W, C]
    overlapping   C classes that are independent of each other; the mask [B, H, W, C] has 0 and 1.
                  The model says so by an attribute `overlapping`.

A pixel of value `IGNORE` does not count: neither in a loss nor in a metric.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: The value of a mask's pixels that do not count.
IGNORE = 255


def is_overlapping(model: Any) -> bool:
    """Whether the classes of a model's logits are independent of each other."""
    return bool(getattr(model, "overlapping", False))


def check_shapes(logits: Any, mask: Any) -> None:
    """Raise ValueError unless the mask has a value per pixel, or one per entry of the logits."""
    if logits.ndim == 4 and mask.shape in (logits.shape, (*logits.shape[:3], 1)):
        return
    raise ValueError(
        f"logits {logits.shape} and mask {mask.shape} do not fit together: the logits must be "
        "[B, H, W, C], and the mask [B, H, W, 1] of class indices or [B, H, W, C] of 0 and 1 (the "
        "channel axis of a mask is added with mask[..., None])"
    )


def truth(mask: jax.Array, channels: int) -> jax.Array:
    """The mask as float32 [B, H, W, C], 1 where a pixel is of the class; `IGNORE` counts as 0.

    Args:
        mask: [B, H, W, 1] of class indices, or [B, H, W, C] in [0, 1].
        channels: C.
    """
    if mask.shape[-1] == channels:
        mask = mask.astype(jnp.float32)
        return jnp.where(mask == IGNORE, 0, mask)
    return (mask == jnp.arange(channels)[None, None, None]).astype(jnp.float32)


def counted(mask: jax.Array) -> jax.Array:
    """Which entries of a mask count: bool, of its shape."""
    return mask != IGNORE


def probabilities(logits: jax.Array, *, overlapping: bool = False) -> jax.Array:
    """The probability of each class, float32 in [0, 1], of the logits' shape [..., C]."""
    logits = logits.astype(jnp.float32)
    if overlapping or logits.shape[-1] == 1:
        return jax.nn.sigmoid(logits)
    return jax.nn.softmax(logits)


def decide(proba: Any, *, threshold: float = 0.5, overlapping: bool = False) -> np.ndarray:
    """The mask that probabilities [..., C] predict.

    >>> decide(np.array([[0.2, 0.5, 0.3]]))
    array([[1]], dtype=uint8)

    Args:
        proba: from `probabilities`.
        threshold: above which a pixel is of a class; exclusive classes have none: the most
            probable class is predicted.
        overlapping: whether the classes are independent of each other.

    Returns:
        uint8 [..., 1] of class indices, or 0 and 1; for overlapping classes [..., C] of 0 and 1.

    Raises:
        ValueError: a probability is NaN, of which no pixel would be predicted.
    """
    proba = np.asarray(proba)
    if np.isnan(proba.min(initial=0)):
        raise ValueError("probabilities are NaN: the model's variables or its image are not finite")
    if overlapping or proba.shape[-1] == 1:
        return (proba > threshold).astype(np.uint8)
    return proba.argmax(-1, keepdims=True).astype(np.uint8)


def predicted(logits: jax.Array, *, overlapping: bool = False) -> jax.Array:
    """Whether a pixel is predicted to be of a class, at threshold 0.5: bool [B, H, W, C]."""
    if overlapping or logits.shape[-1] == 1:
        return logits > 0
    best = logits.argmax(-1, keepdims=True)
    return best == jnp.arange(logits.shape[-1])[None, None, None]


def largest_counted(mask: Any) -> Any:
    """The largest value of a mask other than `IGNORE`, or 0."""
    xp = jnp if isinstance(mask, jax.Array) else np
    return xp.where(mask == IGNORE, 0, mask).max()


def check_mask(mask: Any, channels: int | None = None) -> None:
    """Raise ValueError if a mask in memory has values that are no class.

    Args:
        mask: of 0 and 1, or class indices, and `IGNORE`; a NumPy or JAX array.
        channels: of the logits, if known; 1 and 2 allow 0 and 1.
    """
    if mask.dtype == bool:
        return
    high = mask.max()
    if high == IGNORE:
        high = largest_counted(mask)
    low, limit = min(mask.min(), high), IGNORE if channels is None else max(2, channels)
    if not 0 <= low <= high < limit:
        raise ValueError(
            f"the mask has values from {low} to {high}: use 0 to {limit - 1}, and {IGNORE} for "
            "pixels that do not count"
        )
