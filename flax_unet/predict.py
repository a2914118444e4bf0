"""Probabilities from a trained model. `variables` is what `model.apply` takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from math import lcm
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from jax.core import Tracer
from jax.sharding import Mesh
from tqdm import tqdm

from flax_unet import classes, cpu, devices, images, pictures, tiles
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


@dataclass(frozen=True)
class Ensemble:
    """Averages the probabilities of several networks, such as the folds of a cross-validation.

    Use it like one network, whose variables are a tuple: those of each member, in their order. The
    members may differ in their architecture.

    Probabilities are averaged, not logits, because networks differ in the scale of their logits:
    the one that is most sure of itself would decide alone. `apply` returns logits nevertheless, the
    ones that have the mean as their probabilities, so that all that takes a network takes an
    ensemble: `Mirrored(Ensemble(...))`, `Tiled(Ensemble(...))`, and the other way round.
    Lakshminarayanan et al.: "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles", NeurIPS 2017; nnU-Net averages its folds in the same way.

    >>> from flax_unet import UNet
    >>> model, image = UNet(features=(8, 16)), jnp.zeros((1, 32, 32, 3))
    >>> variables = tuple(model.init(jax.random.key(seed), image) for seed in (0, 1))
    >>> predict_proba(Ensemble((model, model)), variables, image).shape
    (1, 32, 32, 1)

    Attributes:
        models: the members; they predict the same classes.

    Raises:
        ValueError: there are none, or they predict different classes.
    """

    models: tuple[Any, ...]

    def __post_init__(self):
        object.__setattr__(self, "models", tuple(self.models))  # a list would not be hashable
        if not self.models:
            raise ValueError("an ensemble needs models: it has none")
        for name, values in {
            "num_classes": [getattr(model, "num_classes", None) for model in self.models],
            "overlapping": [classes.is_overlapping(model) for model in self.models],
        }.items():
            if len({*values}) > 1:
                raise ValueError(f"the models of an ensemble must agree in {name}: {values}")

    @property
    def stride(self) -> int:
        return lcm(*(model.stride for model in self.models))

    @property
    def num_classes(self) -> int:
        return self.models[0].num_classes

    @property
    def overlapping(self) -> bool:
        return classes.is_overlapping(self.models[0])

    def apply(self, variables: Sequence[Any], image: jax.Array) -> jax.Array:
        """Logits, float32, of the mean probability for an image [B, H, W, C].

        Of one class and of overlapping classes they are log(p / (1 - p)), of exclusive ones log(p).

        Args:
            variables: those of each member.
            image: uint8, or float in [0, 1].

        Raises:
            ValueError: there are more variables than members, or fewer.
        """
        if not isinstance(variables, list | tuple) or len(variables) != len(self.models):
            number = len(variables) if isinstance(variables, list | tuple) else "no"
            raise ValueError(
                f"an ensemble of {len(self.models)} models takes a tuple of their variables, one "
                f"for each: it has {number} such"
            )

        # If a member is on the host, `logits_function` has not converted uint8 for the others.
        def logits_of(model: Any, own: Any) -> jax.Array:
            x = image if is_on_host(model) else pictures.as_float(image)
            return jnp.asarray(model.apply(own, x, **accepted(model, train=False)), jnp.float32)

        logits = jnp.stack([*map(logits_of, self.models, variables)])
        log_sum = jax.nn.logsumexp  # of logarithms, because a probability may round to 0 or 1
        if self.overlapping or logits.shape[-1] == 1:
            sure, not_sure = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
            return log_sum(sure, axis=0) - log_sum(not_sure, axis=0)
        return log_sum(jax.nn.log_softmax(logits), axis=0) - np.log(np.float32(len(self.models)))


@dataclass(frozen=True)
class Tiled:
    """Predicts in overlapping windows and blends their logits: for images of any size.

    Use it in place of the model that it wraps, with the same variables. Memory beyond the image and
    its logits is that of one batch of windows, and one shape is compiled for all images. A smaller
    image is edge-padded to the window.

    Windows start at multiples of the model's stride, so that a pixel which is farther from the
    borders of its windows than the network sees has the logits of a prediction in one piece. That
    does not hold for a network with instance or group norm: its statistics are those of each window
    instead of the image, as they were in a training on crops of the window's size, and the logits
    differ everywhere: small windows of such a network can cost accuracy (docs/results.md, ISBI
    2012, has an example). Batch norm has fixed statistics.

    Attributes:
        model: the network, or `Ensemble`, or `Mirrored`, which flips each window.
        window: height and width, multiples of the model's stride; one number for squares. Best the
            size of the images it was trained on.
        overlap: least fraction of a window that the next one shares along each axis, in [0, 1).
            With 1/2 the network computes each pixel about 4 times.
        blend: how the weights of a window decrease from its centre, see `tiles.weights`.
        batch_size: windows at a time.
        mesh: devices that share the windows, see `devices.make_mesh`; then batch_size is of each.
        progress: whether to show a bar, on a terminal, if it takes more than a second.
    """

    model: Any
    window: int | tuple[int, int] = 256
    overlap: float = 0.5
    blend: tiles.Blend = "gaussian"
    batch_size: int = 4
    mesh: Mesh | None = None
    progress: bool = False

    def __post_init__(self):
        sides = self.window if isinstance(self.window, list | tuple) else (self.window,) * 2
        object.__setattr__(self, "window", tuple(sides))  # a list would not be hashable
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise ValueError(f"window is {self.window}: give one or two whole numbers")
        if any(side < 1 or side % self.model.stride for side in sides):
            raise ValueError(f"window {self.window} is not a multiple of {self.model.stride}")
        if self.blend not in get_args(tiles.Blend):
            raise ValueError(f"blend is {self.blend!r}: use one of {get_args(tiles.Blend)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be positive")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}: it must be in [0, 1)")
        if 0 in self.steps:
            raise ValueError(
                f"windows of {self.window} cannot overlap by {self.overlap:g}, because they start "
                f"at multiples of {self.model.stride}: choose larger ones, or less overlap"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a window."""
        height, width = self.window  # type: ignore[misc]
        return height, width

    @property
    def steps(self) -> tuple[int, int]:
        """From the start of a window to that of the next, down and right; multiples of stride."""
        stride = self.model.stride
        # 1e-6 is for products such as 320 * (1 - 0.8), which is a little less than 64.
        down, right = (
            int(side * (1 - self.overlap) + 1e-6) // stride * stride for side in self.size
        )
        return down, right

    @property
    def windows(self) -> int:
        """Windows at a time, on all devices together."""
        return self.batch_size * (1 if self.mesh is None else self.mesh.size)

    on_host = True  # see `is_on_host`
    stride = 1  # images of any size

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def overlapping(self) -> bool:
        return classes.is_overlapping(self.model)

    def apply(self, variables: Any, image: Any) -> np.ndarray:
        """Logits, float32 [B, H, W, K] in the memory of the host, of an image [B, H, W, C].

        Raises:
            ValueError: it is called inside of a JAX transformation, or with an empty image.
        """
        if isinstance(image, Tracer):
            raise ValueError("Tiled cuts images on the host: call it outside of jit, grad and vmap")
        image = np.asarray(image)
        if 0 in image.shape:
            raise ValueError(f"image has shape {image.shape}: it is empty")
        stride, shape = self.model.stride, image.shape[1:3]
        axes = list(zip(shape, self.size, self.steps, strict=True))
        rows, columns = grid = [tiles.starts(*axis, stride) for axis in axes]
        down, right = (
            tiles.weights(n, side, starts, self.blend)
            for (n, side, _), starts in zip(axes, grid, strict=True)
        )
        windows = list(product(range(len(image)), range(len(rows)), range(len(columns))))
        n = self.windows
        parts = [windows[i : i + n] for i in range(0, len(windows), n)]
        logits_of, result = logits_function(self.model), None
        if self.mesh is not None:
            variables = devices.spread(variables, self.mesh)

        def dispatch(part: list[tuple[int, int, int]]) -> jax.Array:
            cuts = [tiles.cut(image[b], rows[y], columns[x], self.size) for b, y, x in part]
            cuts += cuts[:1] * (n - len(cuts))
            images = np.stack(cuts)
            if self.mesh is not None:
                images = jax.device_put(images, devices.split(self.mesh))
            return logits_of(variables, images)

        with tqdm(
            total=len(windows),
            unit=" windows",
            leave=False,
            delay=1,
            disable=None if self.progress else True,
        ) as bar:
            following = dispatch(parts[0])
            for i, part in enumerate(parts):
                computed = following
                if i + 1 < len(parts):  # the device computes them while these are blended
                    following = dispatch(parts[i + 1])
                if result is None:
                    result = np.zeros((*image.shape[:3], computed.shape[-1]), np.float32)
                for (b, y, x), logits in zip(part, np.asarray(computed), strict=False):
                    place = result[b, rows[y] :, columns[x] :][: self.size[0], : self.size[1]]
                    height, width = place.shape[:2]
                    weight = down[y, :height, None] * right[x, None, :width]
                    place += logits[:height, :width] * weight[..., None]
                bar.update(len(part))
        assert result is not None
        return result


def is_on_host(model: Any) -> bool:
    """Whether a model computes logits in NumPy, such as `Tiled` or `onnx_file.OnnxModel`.

    JAX cannot compile such a model, which says so by an attribute `on_host`.
    """
    return getattr(model, "on_host", False) or any(map(is_on_host, _members(model)))


def is_tiled(model: Any) -> bool:
    """Whether a model takes images of any size in windows: `Tiled`, or others made of it alone."""
    members = _members(model)
    return isinstance(model, Tiled) or (bool(members) and all(map(is_tiled, members)))


def _members(model: Any) -> tuple[Any, ...]:
    """The models that `Mirrored` or an `Ensemble` is made of; () of another model."""
    if isinstance(model, Ensemble):
        return model.models
    return (model.model,) if isinstance(model, Mirrored) else ()


@lru_cache(maxsize=8)
def logits_function(model: Any) -> Any:
    """The compiled function of variables and an image to logits.

    Args:
        model: has a `stride`; the network, `Mirrored`, `Ensemble` or `Tiled`.

    Returns:
        It takes an image [B, H, W, C], uint8 or float in [0, 1], of multiples of the stride, and
        returns float32 [B, H, W, K]; of `Tiled` a NumPy array.
    """
    if is_on_host(model):
        return model.apply

    def logits(variables: Any, image: jax.Array) -> jax.Array:
        inference = accepted(model, train=False)
        return model.apply(variables, pictures.as_float(image), **inference)

    return cpu.jit(logits)


@lru_cache(maxsize=8)
def _apply(model: Any) -> Any:
    overlapping = classes.is_overlapping(model)
    if not is_on_host(model):
        return cpu.jit(
            lambda variables, image: classes.probabilities(
                logits_function(model)(variables, image), overlapping=overlapping
            )
        )
    probabilities = cpu.jit(partial(classes.probabilities, overlapping=overlapping))

    def proba(variables: Any, image: Any) -> np.ndarray:
        logits = np.require(model.apply(variables, image), requirements="W")
        flat = logits.reshape(-1, logits.shape[-1])
        for start in range(0, len(flat), CHUNK):  # in place: it may be most of the memory
            chunk = flat[start : start + CHUNK]
            padded = np.pad(chunk, ((0, CHUNK - len(chunk)), (0, 0)))
            chunk[:] = np.asarray(probabilities(padded))[: len(chunk)]
        return logits

    return proba


#: Pixels of which the probabilities are computed at a time, in one compiled shape.
CHUNK = 2**18


def predict_proba(model: Any, variables: Any, image: Any, mesh: Mesh | None = None) -> Any:
    """Probabilities of an image of any size, at that size.

    The image is edge-padded at the bottom and right to a multiple of the model's stride, and the
    result is cropped. It compiles once per shape; `Tiled`, which works in windows, once for all.

    >>> from flax_unet import UNet
    >>> model = UNet(features=(8, 16))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> predict_proba(model, variables, np.zeros((45, 70, 3), np.uint8)).shape
    (45, 70, 1)

    Args:
        model: has a `stride`; the network, `Mirrored`, `Ensemble` or `Tiled`.
        variables: its parameters (and state); of an `Ensemble` a tuple of them.
        image: [H, W, C] or [B, H, W, C]; uint8, or float in [0, 1].
        mesh: devices that share the images, see `devices.put`; not of `Tiled`, which has its own.

    Returns:
        Float32 [H, W, K] or [B, H, W, K] in [0, 1], a JAX array, or with `Tiled` or a mesh a NumPy
        array; `classes.decide` makes masks of them.

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
    padded = batch
    if bottom or right:
        padded = pad(batch, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
    try:
        if mesh is None:
            proba = _apply(model)(variables, padded)
        else:
            placed = devices.put({"image": padded, "weight": np.ones(len(padded))}, mesh)["image"]
            shared = _apply(model)(devices.spread(variables, mesh), placed)
            proba = np.asarray(shared)[: len(padded)]
        proba = proba[:, :height, :width]
    except ScopeParamShapeError as error:
        channels = f"the image has {image.shape[-1]} channels, and the model takes another number"
        raise ValueError(f"{channels}: {error}") from error
    return proba if image.ndim == 4 else proba[0]


def predict_picture(
    model: Any,
    variables: Any,
    picture: Content,
    size: int | tuple[int, int] | None,
    image_format: ImageFormat | None = None,
) -> np.ndarray:
    """Probabilities at the picture's own size, computed at the size the model was trained on.

    Args:
        model: has a `stride`.
        variables: its parameters (and state).
        picture: of any size, from Pillow or `pictures.open_content`.
        size: height and width to which it is resized for the model; None for a model that takes
            pictures at their own size, such as `Tiled`.
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
    while isinstance(model, Ensemble | Mirrored | Tiled):
        if isinstance(model, Ensemble):  # its members take the same images
            model, variables = model.models[0], variables[0]
        else:
            model = model.model
    if is_on_host(model):
        return ImageFormat(model.channels, convert=True)
    for channels in (3, 1, 4):
        image = jax.ShapeDtypeStruct((1, model.stride, model.stride, channels), jnp.uint8)
        try:
            jax.eval_shape(_apply(model), variables, image)
            return ImageFormat(channels, convert=True)
        except ScopeParamShapeError:
            continue
    raise ValueError("the model takes neither 3, 1 nor 4 channels: give image_format")


def predict_resized(
    model: Any, variables: Any, image: np.ndarray, size: int | tuple[int, int] | None
) -> np.ndarray:
    """`predict_picture` of an image [H, W, C] that was read already."""
    return next(predict_images(model, variables, [image], size))


def predict_images(
    model: Any,
    variables: Any,
    images: Sequence[np.ndarray],
    size: int | tuple[int, int] | None,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Predict several images at once, each of its own size, as `predict_resized` does one.

    The network runs once for all of them, when this is called. With at most as many images as
    devices each one has exactly the result that it has alone.

    Args:
        model, variables, size: see `predict_picture`.
        images: [H, W, C] each, of the same number of channels and type.
        mesh: devices that share the images, see `devices.make_mesh`; for a size of None unused.

    Returns:
        Float32 [H, W, K] of each image in turn, resized when it is asked for.
    """
    if size is None:
        return iter([np.asarray(predict_proba(model, variables, image)) for image in images])
    size = (size, size) if isinstance(size, int) else size
    own = [image.shape[:2] for image in images]
    batch = np.stack([pictures.resize_image(image, size) for image in images])
    probas = np.asarray(predict_proba(model, variables, batch, mesh))
    return map(pictures.resize_image, probas, own)
