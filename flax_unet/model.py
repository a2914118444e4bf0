"""The U-Net: image [B, H, W, C] in [0, 1] to logits [B, H, W, classes].

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015.
"""

import inspect
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from flax_unet import cpu

#: Batch norm, instance norm, group norm with this many channels per group, or no normalisation.
Norm = Literal["batch", "instance"] | int | None

glorot_uniform = nn.initializers.glorot_uniform()
he_normal = nn.initializers.he_normal()


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which flipping any input bit flips about half of the output bits."""
    # The least biased constants that Chris Wellons' hash-prospector found.
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


class Dropout(nn.Module):
    """In training, zero a fraction `rate` of the entries and scale up the others.

    The random bits are a hash of each entry's flat index and two words of the key. Unlike the
    output of a generator, they are computed by all cores inside the kernel that uses them, and are
    never written to memory.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        index = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
        bits = _mix(_mix(index ^ seed[0]) ^ seed[1])
        scale = jnp.asarray(1 / (1 - self.rate), x.dtype)
        return jnp.where(bits >= jnp.uint32(self.rate * 2**32), x * scale, 0)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and mean square per channel and image: [B, H, W, C] to float32 [B, C] each."""
    x = x.astype(jnp.float32)
    return x.mean((1, 2)), (x * x).mean((1, 2))


def _scale_and_shift(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Channels times `factor` plus `offset`, [B, C] or [1, C]; computed in float32."""
    return (x.astype(jnp.float32) * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group normalisation of [B, H, W, C]: Wu, He: "Group Normalization", ECCV 2018.

    With one channel per group it is instance normalisation: Ulyanov, Vedaldi, Lempitsky, 2016.

    It averages per channel first and then over each group, which reads the array once in memory
    order; reshaping it into groups costs several passes. The variance is E[x^2] - E[x]^2 in
    float32, which loses precision once the standard deviation is below 1 % of the mean.
    """

    group_size: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, _, _, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)

        def group_mean(moment: jax.Array) -> jax.Array:
            per_group = moment.reshape(b, -1, self.group_size).mean(-1)
            return per_group.repeat(self.group_size, axis=1)

        mean, square = map(group_mean, _moments(x))
        factor = scale[None] * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon)
        return _scale_and_shift(x, factor, bias[None] - mean * factor)


def warm_up(decay: float, step: jax.Array) -> jax.Array:
    """The decay of a moving average at update `step` (from 0): at most (1 + step) / (10 + step)."""
    step = jnp.asarray(step, jnp.float32)  # also with 64 bits enabled
    return jnp.minimum(decay, (1 + step) / (10 + step))


class BatchNorm(nn.Module):
    """Batch normalisation of [B, H, W, C]: Ioffe, Szegedy: "Batch Normalization", ICML 2015.

    In training it normalises by the mean and variance of the batch, in which each image counts by
    its `weight` [B], and updates their moving averages in the collection `batch_stats`. Otherwise
    it normalises by those averages. After `step` updates their momentum is at most
    (1 + step) / (10 + step), as in `train.average_params`: short trainings, too, forget the initial
    values.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        weight: jax.Array | None = None,
        step: jax.Array | None = None,
    ) -> jax.Array:
        b, _, _, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        averages = [
            self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32),
            self.variable("batch_stats", "variance", jnp.ones, (c,), jnp.float32),
        ]
        if train:
            weight = jnp.ones(b) if weight is None else weight
            images = weight.sum()
            fraction = weight[:, None] / jnp.maximum(images, jnp.finfo(jnp.float32).tiny)
            mean, square = ((fraction * moment).sum(0) for moment in _moments(x))
            variance = jnp.maximum(square - mean * mean, 0)
            momentum = self.momentum if step is None else warm_up(self.momentum, step)
            momentum = jnp.where(images > 0, momentum, 1.0)
            for average, new in zip(averages, (mean, variance), strict=True):
                average.value = momentum * average.value + (1 - momentum) * new
        else:
            mean, variance = (average.value for average in averages)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return _scale_and_shift(x, factor[None], (bias - mean * factor)[None])


class Block(nn.Module):
    """`convs` times 3x3 convolution, norm and ReLU.

    Dropout precedes the last convolution. A residual block adds its input, projected by a 1x1
    convolution, before the last ReLU: He et al., "Deep Residual Learning", CVPR 2016.
    """

    features: int
    convs: int
    norm: Norm
    dropout: float
    residual: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        weight: jax.Array | None = None,
        step: jax.Array | None = None,
    ) -> jax.Array:
        block_input = x
        for i in range(self.convs):
            if i == self.convs - 1:
                x = Dropout(self.dropout)(x, train)
            x = nn.Conv(
                self.features,
                (3, 3),
                dtype=self.dtype,
                kernel_init=he_normal,
                conv_general_dilated=cpu.convolve,
            )(x)
            if self.norm == "batch":
                x = BatchNorm()(x, train, weight, step)
            elif self.norm is not None:
                x = GroupNorm(1 if self.norm == "instance" else self.norm)(x)
            if self.residual and i == self.convs - 1:
                project = ConvTranspose(self.features, 1, self.dtype, name="shortcut")
                x = x + project(block_input)
            x = nn.relu(x)
        return x


class ConvTranspose(nn.Module):
    """Transposed convolution, kernel and stride s: [B, H, W, C] to [B, s H, s W, features].

    Because the kernel is as large as the stride, no two input pixels touch the same output pixel:
    it is one matrix product and a reshape (depth to space), equal to the general form and much
    faster. With stride 1 it is a 1x1 convolution.
    """

    features: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (b, h, w, c), s = x.shape, self.stride
        kernel = self.param("kernel", glorot_uniform, (s, s, c, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Flattened to two dimensions: with more, XLA transposes the operands for the gradients.
        x = x.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
        x = x.reshape(b, h, w, s, s, self.features).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, s * h, s * w, self.features) + bias[None, None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 window, NaN if one is: [B, 2H, 2W, C] to [B, H, W, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    x = _maximum(x[:, :, 0], x[:, :, 1])
    return _maximum(x[:, :, :, 0], x[:, :, :, 1])


def _maximum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Elementwise maximum whose gradient goes to exactly one operand.

    The gradient of `jnp.max` goes to the operands that equal the result. On jax 0.7 XLA may compute
    the operands a second time with other rounding: then none is equal, and the gradient is lost.
    """
    return jnp.where((a > b) | jnp.isnan(a), a, b)


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """Fold squares of pixels into channels: [B, s H, s W, C] to [B, H, W, s s C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
    return x.reshape(b, h // size, w // size, -1)


def variable_shapes(model: Any, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's variables by path, such as "params/head/kernel"."""
    image = jnp.zeros((1, model.stride, model.stride, channels))
    flat: Any = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image), sep="/")
    return {name: x.shape for name, x in flat.items()}


def accepted(function: Any, **options: Any) -> dict[str, Any]:
    """Those of the keyword arguments that a function or a module accepts."""
    if not callable(function):  # `predict.Mirrored`, which has an `apply` only
        return {}
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


class UNet(nn.Module):
    """A U-Net: `model.init(key, image)`, `model.apply(variables, image)`.

    >>> model = UNet(features=(8, 16, 32))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    >>> model.apply(variables, jnp.zeros((2, 96, 64, 3))).shape
    (2, 96, 64, 1)

    Attributes:
        features: channels of each level; the last is the bottleneck. With an `encoder`, channels of
            each level of the decoder only.
        num_classes: channels of the logits: one class against the background, or two and more
            exclusive classes (softmax).
        overlapping: whether the classes are independent of each other instead (sigmoid).
        convs: 3x3 convolutions per block.
        norm: after each convolution: "batch", "instance", the number of channels per group of a
            group norm, or None. With "batch" the variables include `batch_stats`.
        dropout: dropout rate, one for all levels or one per level.
        residual: whether each block adds its input to its output.
        patch: side of the pixel squares that are folded into channels before the network (space to
            depth) and unfolded by the head. 1 is the plain U-Net, 2 costs about a quarter of it. An
            `encoder` has its own.
        deep: deep supervision: each level of the decoder has a head, and the logits are their sum.
            Kayalibay, Jensen, van der Smagt: "CNN-based Segmentation of Medical Imaging Data",
            2017.
        dtype: type of the computation; parameters and logits are float32.
        remat: recompute the activations inside the blocks in the backward pass, to save memory.
        encoder: a module in place of the descending blocks, such as
            `flax_unet.efficientnet.Encoder`. It is called with an image (and with `train`,
            `weight` and `step`, if it has such arguments) and returns `encoder.levels` + 1 feature
            maps. The first has 1/`encoder.patch` of the image's height and width, each following
            map half the size of the one before.
    """

    features: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    num_classes: int = 1
    overlapping: bool = False
    convs: int = 3
    norm: Norm = "instance"
    dropout: float | tuple[float, ...] = 0.0
    residual: bool = False
    patch: int = 1
    deep: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    encoder: nn.Module | None = None

    def __post_init__(self):
        for name in ("features", "dropout"):  # a list would make the module unhashable
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        super().__post_init__()

    @property
    def stride(self) -> int:
        """Height and width of an image must be multiples of this."""
        patch, skips = self._patch_and_skips()
        return patch * 2**skips

    def _patch_and_skips(self) -> tuple[int, int]:
        """Pixels per side of an entry of the first feature map, and the number of skip maps."""
        if self.encoder is None:
            return self.patch, len(self.features) - 1
        encoder: Any = self.encoder
        if not (hasattr(encoder, "patch") and hasattr(encoder, "levels")):
            raise ValueError(
                f"{type(encoder).__name__} needs the attributes `patch` and `levels` to be an "
                "encoder: see UNet"
            )
        return encoder.patch, encoder.levels

    def _check(self, image: jax.Array) -> tuple[int, int, tuple[float, ...]]:
        """`_patch_and_skips` and a dropout rate per level; ValueError if something does not fit."""
        for name in ("features", "num_classes", "convs", "patch"):
            value = getattr(self, name)
            if not value or np.min(value) < 1:
                raise ValueError(f"{name} is {value}: it must be positive")
        (patch, skips), levels = self._patch_and_skips(), len(self.features)
        if self.encoder is not None and self.patch not in (1, patch):
            raise ValueError(f"patch is {self.patch}, but the encoder's is {patch}: leave it out")
        if self.encoder is not None and levels != skips:
            raise ValueError(
                f"features is {self.features}: this encoder has {skips} skip connections, so give "
                f"{skips} numbers of channels"
            )
        rates = self.dropout if isinstance(self.dropout, tuple) else (self.dropout,) * levels
        if len(rates) != levels:
            raise ValueError(f"dropout has {len(rates)} rates for {levels} levels: give one each")
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f"dropout is {self.dropout}: each rate must be in [0, 1)")
        if type(self.norm) is not int and self.norm not in ("batch", "instance", None):
            raise ValueError(f"norm is {self.norm!r}: use 'batch', 'instance', a number or None")
        if isinstance(self.norm, int) and (
            self.norm < 1 or any(channels % self.norm for channels in self.features)
        ):
            raise ValueError(
                f"features {self.features} cannot be split into groups of {self.norm} channels: "
                "choose multiples of it, or another norm"
            )
        if image.ndim != 4 or image.shape[1] % self.stride or image.shape[2] % self.stride:
            raise ValueError(
                f"image has shape {image.shape}: it must be [B, H, W, C], H and W multiples of "
                f"{self.stride}; flax_unet.predict pads and crops for you"
            )
        return patch, skips, rates

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        train: bool = False,
        weight: jax.Array | None = None,
        step: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of an image.

        Args:
            image: [B, H, W, C] in [0, 1].
            train: enable dropout, which needs `rngs={"dropout": key}`, and batch statistics, which
                need `mutable=["batch_stats"]`.
            weight: [B], 0 for images to leave out of the batch statistics.
            step: number of updates so far, for the warm-up of the batch statistics.

        Returns:
            Logits, float32 [B, H, W, num_classes].

        Raises:
            ValueError: H or W is not a multiple of `stride`, or the attributes do not fit together.
        """
        patch, skips, rates = self._check(image)
        # `train` is static under remat: argument 2, because `self` is 0.
        make = nn.remat(Block, static_argnums=(2,)) if self.remat else Block

        def block(level: int, name: str) -> nn.Module:
            settings = self.convs, self.norm, rates[level], self.residual, self.dtype
            return make(self.features[level], *settings, name=name)

        def head(level: int, name: str) -> nn.Module:
            return ConvTranspose(self.num_classes, patch * 2**level, jnp.float32, name=name)

        if self.encoder is None:
            x, maps = space_to_depth(image.astype(self.dtype), patch), []
            for level in range(skips):
                x = block(level, f"down{level}")(x, train, weight, step)
                maps.append(x)
                x = max_pool(x)
            x = block(skips, "bottleneck")(x, train, weight, step)
        else:
            *maps, x = self._encode(image, train=train, weight=weight, step=step)
        logits = []
        for level in reversed(range(skips)):
            x = ConvTranspose(self.features[level], 2, self.dtype, name=f"upsample{level}")(x)
            x = jnp.concatenate([x, maps[level]], axis=-1)
            x = block(level, f"up{level}")(x, train, weight, step)
            if self.deep and level:
                logits.append(head(level, f"head{level}")(x))
        return sum(logits, head(0, "head")(x))

    def _encode(self, image: jax.Array, **options: Any) -> list[jax.Array]:
        """The encoder's maps; ValueError unless they are as its `patch` and `levels` promise."""
        assert self.encoder is not None
        maps = self.encoder(image, **accepted(self.encoder, **options))
        patch, skips = self._patch_and_skips()
        sides = [patch * 2**i for i in range(skips + 1)]
        expected = [(image.shape[1] // side, image.shape[2] // side) for side in sides]
        if (sizes := [x.shape[1:3] for x in maps]) != expected:
            raise ValueError(
                f"{type(self.encoder).__name__} returns maps of {sizes} for an image of "
                f"{image.shape[1:3]}, and its `patch` and `levels` promise {expected}"
            )
        return maps


#: The tutorial's network: 11,707,729 parameters, with Keras' initial distributions.
ARTICLE = UNet(norm=None, dropout=(0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
