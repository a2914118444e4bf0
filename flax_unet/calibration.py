"""Temperature: one number that makes probabilities neither too sure nor too unsure.

    temperature = fit_temperature(*logits_of(model, variables, source, size, *formats))
    calibrated = with_temperature(model, variables, temperature)

The logits are divided by it, which moves no pixel of the network's output across a probability of
0.5, and changes no class that is the most probable one. Where probabilities are resized afterwards,
a few pixels of an outline may change. Guo et al.: "On Calibration of Modern Neural Networks", ICML
2017.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special
from scipy import optimize

from flax_unet import classes, data, predict
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.model import UNet

#: Names of the layers of a `UNet` whose sum is the logits: of one level, or of several (`deep`).
HEAD = re.compile(r"head\d*")
#: Temperatures that are tried.
RANGE = 0.05, 20.0
#: Logits that `logits_of` keeps at most: 64 MB.
MOST = 2**24


def logits_of(
    model: Any,
    variables: Any,
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int] | None,
    mask_format: MaskFormat,
    image_format: ImageFormat,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits and truth of each picture's pixels; if they are more than `MOST`, of some at random.

    The fraction is the same for all pictures: each pixel is as likely as any other.

    Args:
        model: the network, or `predict.Mirrored` or `predict.Tiled`.
        variables: its parameters (and state).
        source: see `flax_unet.data`.
        size: height and width of the network's images; None for `predict.Tiled`.
        mask_format, image_format: what the values of the pictures mean.

    Returns:
        Of each picture float32 [P, C], and uint8 [P, 1] of class indices or [P, C] of overlapping
        classes.

    Raises:
        DataError: an entry is unusable.
    """
    read = {"mask_format": mask_format, "image_format": image_format}
    shape = (size, size) if isinstance(size, int) else size
    forward, rng, pairs = predict.logits_function(model), np.random.default_rng(0), []
    fraction = 1.0

    def some(pair: tuple[np.ndarray, ...], fraction: float) -> tuple[np.ndarray, ...]:
        n = len(pair[0])
        chosen = rng.choice(n, round(fraction * n), replace=False)
        return tuple(x[chosen] for x in pair)

    for i in range(len(source)):
        if shape is None:
            image, mask = data.decode_pair(source[i], **read)
        else:
            image, mask, *_ = data.decode_resized(source, i, shape, **read)
        maps = np.asarray(forward(variables, image[None]))[0], mask
        pair = tuple(x.reshape(-1, x.shape[-1]) for x in maps)
        pairs.append(pair if fraction == 1 else some(pair, fraction))
        while sum(logits.size for logits, _ in pairs) > MOST:
            fraction /= 2
            pairs = [some(pair, 0.5) for pair in pairs]
    return [logits for logits, _ in pairs], [truth for _, truth in pairs]


def fit_temperature(
    logits: Sequence[np.ndarray] | np.ndarray,
    mask: Sequence[np.ndarray] | np.ndarray,
    *,
    overlapping: bool = False,
) -> float:
    """The temperature whose probabilities have the least cross-entropy, over the counted pixels.

    Of one class or overlapping ones it is the binary cross-entropy. It is convex in 1 / T, so there
    is one minimum.

    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(1, 99_999, 1))
    >>> mask = (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(np.uint8)
    >>> round(fit_temperature(2 * z, mask), 1)
    2.0

    Args:
        logits: [..., C] of each picture.
        mask: of each picture uint8 [..., 1] of class indices, or [..., C] of 0 and 1 for
            overlapping classes; `classes.IGNORE` does not count.
        overlapping: whether the classes are independent of each other.

    Returns:
        T > 0: above 1 if the logits are too large, below 1 if they are too small.

    Raises:
        ValueError: the shapes do not fit together, no pixel counts, the masks hold nothing but 0
            and 255, logits are not finite, or the best temperature is not inside of `RANGE`: all
            pixels are predicted right, or no better than at random.
    """
    parts = [_wrong(*each, overlapping) for each in zip(logits, mask, strict=True)]
    if {int(x) for each in mask for x in np.unique(each)} == {0, IGNORE}:
        raise ValueError(
            f"the masks have no values but 0 and {IGNORE}, and {IGNORE} means that a pixel does "
            f"not count: no pixel shows an object, which a temperature needs; if {IGNORE} is an "
            f"object, use 0 and 1, as in (mask == {IGNORE}).astype(np.uint8)"
        )
    pixels = sum(map(len, parts))
    if not pixels:
        raise ValueError("no pixel counts, so there is no temperature to fit")
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("logits are not finite: no temperature makes probabilities of them")

    def loss(log_t: float) -> float:
        scale = np.float64(math.exp(-log_t))
        return sum(_cross_entropy(x * scale).sum() for x in parts) / pixels

    low, high = map(math.log, RANGE)
    options = {"xatol": 1e-6}
    best = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options=options).x
    if min(best - low, high - best) < 1e-3:
        raise ValueError(
            f"the best temperature is {math.exp(best):.3g} or beyond: these pixels are all "
            "predicted right, or no better than at random, so none can be fitted"
        )
    return math.exp(best)


def _wrong(logits: np.ndarray, mask: np.ndarray, overlapping: bool) -> np.ndarray:
    """How much larger the logits of wrong answers are than the true one's, of counted pixels.

    Returns:
        [P] of one class, or of overlapping classes, where each is a pixel of its own; else [P, C].
    """
    several = logits.shape[-1] if overlapping else 1
    if mask.shape != (*logits.shape[:-1], several):
        kind = "0 and 1 for each class" if overlapping else "one class index"
        raise ValueError(
            f"logits {logits.shape} and mask {mask.shape} do not fit together: the mask must have "
            f"{kind} in its last axis"
        )
    classes.check_mask(mask, 2 if overlapping else logits.shape[-1])
    counted = mask != IGNORE
    if overlapping or logits.shape[-1] == 1:
        return np.where(mask == 1, -logits, logits)[counted]
    logits, index = logits[counted[..., 0]], mask[counted].astype(int)
    return logits - np.take_along_axis(logits, index[:, None], -1)


def _cross_entropy(wrong: np.ndarray) -> np.ndarray:
    """Of each pixel, from `_wrong`."""
    if wrong.ndim == 1:
        return np.logaddexp(0, wrong)
    return np.asarray(scipy.special.logsumexp(wrong, axis=-1))


def with_temperature(model: UNet, variables: Any, temperature: float) -> dict[str, Any]:
    """The variables with which a network's logits are divided by a temperature.

    The division is in its heads, which are linear, so that nothing else needs to know of it.

    Args:
        model: the network.
        variables: its parameters (and state).
        temperature: from `fit_temperature`.

    Returns:
        New variables of the same shapes.

    Raises:
        ValueError: the temperature is not positive, the model is no `UNet`, whose heads alone are
            known, or the variables are not its own.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    if type(model) is not UNet:
        raise ValueError(f"the heads of {type(model).__name__} are not known, only those of UNet")
    if not any(HEAD.fullmatch(name) for name in variables["params"]):
        raise ValueError("the variables have no head: give those of the model")
    params = {
        name: {key: x / temperature for key, x in each.items()} if HEAD.fullmatch(name) else each
        for name, each in variables["params"].items()
    }
    return {**variables, "params": params}
