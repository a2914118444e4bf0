"""Prediction and evaluation with a trained model. `variables` is what `model.apply` takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flax_unet import data, metrics
from flax_unet.cpu import compiler_options
from flax_unet.losses import bce
from flax_unet.train import Loss, make_eval_step


@dataclass(frozen=True)
class Mirrored:
    """A model whose logits are the mean over an image and its mirror images: four times the work.

    Mirrored left to right, top to bottom, both and neither. The functions here take it in place of
    the model that it is made of, with the same variables.
    """

    model: Any

    @property
    def stride(self) -> int:
        return self.model.stride

    def apply(self, variables: Any, image: jax.Array) -> jax.Array:
        """Logits of an image [B, H, W, C]."""
        views = [
            jnp.flip(self.model.apply(variables, jnp.flip(image, axes)), axes)
            for axes in ((), (1,), (2,), (1, 2))
        ]
        return jnp.stack(views).mean(0)


@lru_cache(maxsize=8)
def _apply(model: nn.Module) -> Any:
    def proba(variables: Any, image: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, data.as_float(image))
        return jax.nn.sigmoid(logits)

    return jax.jit(proba, compiler_options=compiler_options())


def predict_proba(model: Any, variables: Any, image: Any) -> jax.Array:
    """Probabilities of an image of any size, at that size.

    The image is padded below and to the right to the model's stride, by its last row and column,
    and the result is cropped. Each new shape is compiled once.

    Args:
        model: has a `stride`.
        variables: its parameters (and state).
        image: [H, W, 3] or [B, H, W, 3]; uint8, or float in [0, 1].

    Returns:
        Float32 [H, W, C] or [B, H, W, C] in [0, 1].

    Raises:
        ValueError: the image has another rank, type or range.
    """
    image = np.asarray(image)
    if image.ndim not in (3, 4):
        raise ValueError(f"image has shape {image.shape}: it must be [H, W, 3] or [B, H, W, 3]")
    if image.dtype != np.uint8 and not ((image >= 0) & (image <= 1)).all():
        span = f"{image.min()} to {image.max()}"
        raise ValueError(f"image has values from {span}: give uint8, or float in [0, 1]")
    batch = image if image.ndim == 4 else image[None]
    height, width = batch.shape[1:3]
    below, right = -height % model.stride, -width % model.stride
    padded = np.pad(batch, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge")
    proba = _apply(model)(variables, padded)[:, :height, :width]
    return proba if image.ndim == 4 else proba[0]


def predict(model: Any, variables: Any, image: Any, *, threshold: float = 0.5) -> jax.Array:
    """The mask of an image: uint8 of 0 and 1; see `predict_proba`."""
    return (predict_proba(model, variables, image) > threshold).astype(jnp.uint8)


def predict_picture(model: Any, variables: Any, picture: Image.Image, size: int) -> np.ndarray:
    """Probabilities of a picture at its own size, predicted at the size that the model learned.

    Args:
        model: has a `stride`.
        variables: its parameters (and state).
        picture: of any size and mode.
        size: height and width to which it is resized for the model.

    Returns:
        Float32 [H, W, C] in [0, 1].
    """
    image = data.resize_image(data.to_rgb(picture), (size, size))
    proba = np.asarray(predict_proba(model, variables, image))
    channels = [
        np.asarray(Image.fromarray(channel).resize(picture.size, Image.Resampling.BILINEAR))
        for channel in np.moveaxis(proba, -1, 0)
    ]
    return np.stack(channels, axis=-1)


_eval_step = lru_cache(maxsize=8)(make_eval_step)


def evaluate(
    model: nn.Module | Mirrored,
    variables: Any,
    source: data.Arrays | Sequence[dict[str, Any]],
    *,
    size: int = 256,
    batch_size: int = 8,
    loss_fn: Loss = bce,
) -> tuple[dict[str, float], metrics.Confusion]:
    """Figures of a model over a data set, and the counts of each image.

    Args:
        model: the network, or `Mirrored`.
        variables: its parameters (and state).
        source: arrays, or a source to be decoded and resized to `size`.
        size: height and width of the images; not used for arrays.
        batch_size: images at a time; changes no figure but `iou_coef`.
        loss_fn: (logits, labels) to a loss an image.

    Returns:
        `metrics.summary`, and the counts [N, C], an entry an image in the source's order.
    """
    arrays = source if isinstance(source, data.Arrays) else data.load(source, size)
    if not len(arrays.image):
        raise data.DataError("the data set is empty")
    step = _eval_step(model, loss_fn)
    # All batches are under way before the first result is fetched.
    pending = [step(variables, batch) for batch in data.batches(arrays, batch_size)]
    results = jax.device_get(pending)
    n = len(arrays.image)
    counts = metrics.Confusion(
        *(np.concatenate(each)[:n] for each in zip(*(r["confusion"] for r in results), strict=True))
    )
    loss = np.concatenate([r["loss"] for r in results])[:n]
    return metrics.summary(loss, [r["iou_coef"] for r in results], counts), counts
