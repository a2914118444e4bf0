"""Probabilities from a trained model. `variables` is what `model.apply` takes."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from jax.core import Tracer

from flax_unet import classes, cpu, images, pictures
from flax_unet.images import ImageFormat
from flax_unet.model import accepted
from flax_unet.pictures import Content


@dataclass(frozen=True)
class Mirrored:
    """Test-time augmentation: averages the logits over flips of the image.

    Use it in place of the model that it wraps, with the same variables.

    Attributes:
        model: the network.
        upright: whether the images have a top, so that the network has seen none upside down. It
            takes 2 flips, left to right, and otherwise 4: so many times the work.
    """

    model: Any
    upright: bool = False

    @property
    def stride(self) -> int:
        return self.model.stride

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def overlapping(self) -> bool:
        return classes.is_overlapping(self.model)

    def apply(self, variables: Any, image: jax.Array) -> jax.Array:
        """Logits of an image [B, H, W, C]."""
        inference = accepted(self.model, train=False)
        flips = ((), (2,)) if self.upright else ((), (1,), (2,), (1, 2))
        views = [
            jnp.flip(self.model.apply(variables, jnp.flip(image, axes), **inference), axes)
            for axes in flips
        ]
        return jnp.stack(views).mean(0)


@lru_cache(maxsize=8)
def _apply(model: Any) -> Any:
    def proba(variables: Any, image: jax.Array) -> jax.Array:
        inference = accepted(model, train=False)
        logits: Any = model.apply(variables, pictures.as_float(image), **inference)
        return classes.probabilities(logits, overlapping=classes.is_overlapping(model))

    return cpu.jit(proba)


def predict_proba(model: Any, variables: Any, image: Any) -> jax.Array:
    """Probabilities of an image of any size, at that size.

    The image is edge-padded at the bottom and right to a multiple of the model's stride, and the
    result is cropped. It compiles once per shape.

    >>> from flax_unet import UNet
    >>> model = UNet(features=(8, 16))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> predict_proba(model, variables, np.zeros((45, 70, 3), np.uint8)).shape
    (45, 70, 1)

    Args:
        model: has a `stride`.
        variables: its parameters (and state).
        image: [H, W, C] or [B, H, W, C]; uint8, or float in [0, 1].

    Returns:
        Float32 [H, W, K] or [B, H, W, K] in [0, 1]; `classes.decide` makes masks of them.

    Raises:
        ValueError: the image has another rank, type, range or number of channels; inside of other
            JAX transformations its range is not checked.
    """
    traced = isinstance(image, Tracer)  # inside of jit, grad or vmap
    image = image if traced else np.asarray(image)
    if image.ndim not in (3, 4):
        raise ValueError(f"image has shape {image.shape}: it must be [H, W, C] or [B, H, W, C]")
    if image.dtype != np.uint8 and not traced and not ((image >= 0) & (image <= 1)).all():
        span = f"{image.min()} to {image.max()}"
        raise ValueError(f"image has values from {span}: use uint8, or float in [0, 1]")
    batch = image if image.ndim == 4 else image[None]
    height, width = batch.shape[1:3]
    bottom, right = -height % model.stride, -width % model.stride
    pad = jnp.pad if traced else np.pad  # NumPy's compiles nothing for each size
    padded = pad(batch, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
    try:
        proba = _apply(model)(variables, padded)[:, :height, :width]
    except ScopeParamShapeError as error:
        channels = f"the image has {image.shape[-1]} channels, and the model takes another number"
        raise ValueError(f"{channels}: {error}") from error
    return proba if image.ndim == 4 else proba[0]


def predict_picture(
    model: Any,
    variables: Any,
    picture: Content,
    size: int | tuple[int, int],
    image_format: ImageFormat | None = None,
) -> np.ndarray:
    """Probabilities at the picture's own size, computed at the size the model was trained on.

    Args:
        model: has a `stride`.
        variables: its parameters (and state).
        picture: of any size, from Pillow or `pictures.open_content`.
        size: height and width to which it is resized for the model.
        image_format: as in training (`runs.Trained.image_format`); by default 8 bits, and 3, 1 or 4
            channels, as the model takes them.

    Returns:
        Float32 [H, W, K] in [0, 1].

    Raises:
        DataError: the picture is not of the format.
        ValueError: the model takes another number of channels.
    """
    image_format = image_format or _format_for(model, variables)
    return predict_resized(model, variables, images.read(picture, image_format), size)


def _format_for(model: Any, variables: Any) -> ImageFormat:
    """Of 8 bits, with as many channels as the model takes."""
    for channels in (3, 1, 4):
        image = jax.ShapeDtypeStruct((1, model.stride, model.stride, channels), jnp.uint8)
        try:
            jax.eval_shape(_apply(model), variables, image)
            return ImageFormat(channels, convert=True)
        except ScopeParamShapeError:
            continue
    raise ValueError("the model takes neither 3, 1 nor 4 channels: give image_format")


def predict_resized(
    model: Any, variables: Any, image: np.ndarray, size: int | tuple[int, int]
) -> np.ndarray:
    """`predict_picture` of an image [H, W, C] that was read already."""
    size = (size, size) if isinstance(size, int) else size
    proba = np.asarray(predict_proba(model, variables, pictures.resize_image(image, size)))
    return pictures.resize_image(proba, image.shape[:2])
