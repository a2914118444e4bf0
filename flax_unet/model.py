"""The U-Net: image [B, H, W, 3] in [0, 1] to logits [B, H, W, classes].

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from flax_unet import cpu

glorot_uniform = nn.initializers.glorot_uniform()
he_normal = nn.initializers.he_normal()


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the argument flips about half of the result's."""
    # The constants that Chris Wellons' hash-prospector found to have the least bias.
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


class Dropout(nn.Module):
    """Zero a share `rate` of the entries and scale the others up, when `train`.

    The random bits are a hash of the entry's place and two words of the key: unlike a generator's
    they are made where they are used, by all cores, and never pass through memory.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        place = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
        bits = _mixed(_mixed(place ^ seed[0]) ^ seed[1])
        scale = jnp.asarray(1 / (1 - self.rate), x.dtype)
        return jnp.where(bits >= jnp.uint32(self.rate * 2**32), x * scale, 0)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and mean square of each channel of each image: [B, H, W, C] to float32 [B, C] each."""
    wide = x.astype(jnp.float32)
    return wide.mean((1, 2)), (wide * wide).mean((1, 2))


def _scaled(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Each channel times a factor plus an offset, [B, C] or [1, C], computed in float32."""
    return (x.astype(jnp.float32) * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group normalisation of [B, H, W, C]: Wu, He: "Group Normalization", ECCV 2018.

    Groups of one channel are instance normalisation: Ulyanov, Vedaldi, Lempitsky, 2016.

    Moments are taken of each channel first and of each group after: one pass over the channels as
    they lie in memory, where a reshape into groups costs several. The variance is E[x^2] - E[x]^2
    in float32, which loses the digits of a deviation below a hundredth of the mean.
    """

    group_size: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, _, _, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))

        def group_mean(moment: jax.Array) -> jax.Array:
            of_group = moment.reshape(b, -1, self.group_size).mean(-1)
            return of_group.repeat(self.group_size, axis=1)

        mean, square = map(group_mean, _moments(x))
        factor = scale[None] * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon)
        return _scaled(x, factor, bias[None] - mean * factor)


class BatchNorm(nn.Module):
    """Batch normalisation of [B, H, W, C]: Ioffe, Szegedy: "Batch Normalization", ICML 2015.

    In training by the mean and variance over the images, each counting by its `weight` [B]; their
    moving averages are kept in the collection `batch_stats`, and normalise when not `train`.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        b, _, _, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        kept = [
            self.variable("batch_stats", "mean", jnp.zeros, (c,)),
            self.variable("batch_stats", "variance", jnp.ones, (c,)),
        ]
        if train:
            weight = jnp.ones(b) if weight is None else weight
            images = weight.sum()
            share = weight[:, None] / jnp.maximum(images, jnp.finfo(jnp.float32).tiny)
            mean, square = ((share * moment).sum(0) for moment in _moments(x))
            variance = jnp.maximum(square - mean * mean, 0)
            keep = jnp.where(images > 0, self.momentum, 1.0)
            for average, now in zip(kept, (mean, variance), strict=True):
                average.value = keep * average.value + (1 - keep) * now
        else:
            mean, variance = (average.value for average in kept)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return _scaled(x, factor[None], (bias - mean * factor)[None])


class Block(nn.Module):
    """`convs` times 3x3 convolution, norm (see `UNet`) and ReLU.

    Dropout stands before the last convolution. A residual block adds what it was given before the
    last ReLU, through a 1x1 convolution: He et al., "Deep Residual Learning", CVPR 2016.
    """

    features: int
    convs: int
    group_size: int | None
    batch_norm: bool
    dropout: float
    residual: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None = None) -> jax.Array:
        given = x
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
            if self.batch_norm:
                x = BatchNorm()(x, train, weight)
            elif self.group_size is not None:
                x = GroupNorm(self.group_size)(x)
            if self.residual and i == self.convs - 1:
                # Of stride 1 it is the 1x1 convolution, as one product.
                x = x + Upsample(self.features, 1, self.dtype, name="shortcut")(given)
            x = nn.relu(x)
        return x


class Upsample(nn.Module):
    """Transposed convolution, kernel and stride s: [B, H, W, C] to [B, s H, s W, features].

    The kernel's size is its stride, so no two input pixels touch the same output pixel: it is one
    matrix product and a reshape (depth to space), equal to and much faster than the general form.
    """

    features: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (b, h, w, c), s = x.shape, self.stride
        kernel = self.param("kernel", glorot_uniform, (s, s, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Of two dimensions, for XLA copies more of them into another order for the gradients.
        x = x.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
        x = x.reshape(b, h, w, s, s, self.features).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, s * h, s * w, self.features) + bias[None, None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 window: [B, 2H, 2W, C] to [B, H, W, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    x = _larger(x[:, :, 0], x[:, :, 1])
    return _larger(x[:, :, :, 0], x[:, :, :, 1])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger of two numbers, whose gradient goes to one of them.

    That of `jnp.max` goes to those that equal the result, and to none where XLA computes them a
    second time and rounds otherwise, as it does on jax 0.7.
    """
    return jnp.where(a > b, a, b)


def patches(x: jax.Array, size: int) -> jax.Array:
    """Space to depth: [B, s H, s W, C] to [B, H, W, s s C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
    return x.reshape(b, h // size, w // size, -1)


class UNet(nn.Module):
    """A U-Net: `model.init(key, image)`, `model.apply(variables, image)`.

    Attributes:
        features: channels of each level, the last being the bottleneck's.
        num_classes: channels of the logits; each is a yes or no of its own (sigmoid).
        convs: 3x3 convolutions a block.
        group_size: channels a group of the group norm after each convolution; 1 is instance norm,
            None no normalisation.
        batch_norm: batch norm in place of the group norm; the variables then have `batch_stats`.
        dropout: share dropped in each level's blocks, or one share a level.
        residual: whether each block adds its input to its output.
        patch: the network works on squares of this many pixels a side, as if they were pixels of
            more channels; 1 is the plain U-Net, 2 costs a quarter of it.
        deep: the logits are the sum of what each level of the decoder says, so that each learns
            from the loss directly: Kayalibay, Jensen, van der Smagt: "CNN-based Segmentation of
            Medical Imaging Data", 2017.
        dtype: type of the computation; parameters and logits are float32.
        remat: in the backward pass, compute again what is inside of the blocks.
        encoder: a module in place of the descending blocks, such as an
            `flax_unet.efficientnet.Encoder`; called with (image, train, weight) it gives maps that
            halve from one to the next, the first at 1/`patch` of the image's size. `features` are
            then the channels of the decoder, one less than there are maps.
    """

    features: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    num_classes: int = 1
    convs: int = 3
    group_size: int | None = 1
    batch_norm: bool = False
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
        return self.patch * 2 ** (len(self.features) - (self.encoder is None))

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, weight: jax.Array | None = None
    ) -> jax.Array:
        """Logits of an image.

        Args:
            image: [B, H, W, C] in [0, 1].
            train: drop entries, which needs `rngs={"dropout": key}`; normalise by the batch, which
                needs `mutable=["batch_stats"]`.
            weight: [B], 0 for an image that must not enter the batch's statistics.

        Returns:
            Logits, float32 [B, H, W, num_classes].

        Raises:
            ValueError: H or W is no multiple of `stride`, or the attributes do not fit together.
        """
        levels = len(self.features)
        rates = self.dropout if isinstance(self.dropout, tuple) else (self.dropout,) * levels
        if len(rates) != levels:
            raise ValueError(
                f"dropout has {len(rates)} rates for {levels} levels: give one a level"
            )
        if not all(0 <= rate < 1 for rate in rates):
            raise ValueError(f"dropout is {self.dropout}: each rate must be in [0, 1)")
        size = self.group_size
        if size is not None and (size < 1 or any(f % size for f in self.features)):
            raise ValueError(
                f"features {self.features} cannot be split into groups of {size}: choose "
                "multiples, or group_size=None"
            )
        if image.ndim != 4 or image.shape[1] % self.stride or image.shape[2] % self.stride:
            raise ValueError(
                f"image has shape {image.shape}: it must be [B, H, W, C], H and W multiples of "
                f"{self.stride}; flax_unet.predict pads and crops for you"
            )

        # The second argument of a block's call, `train`, is no array.
        make = nn.remat(Block, static_argnums=(2,)) if self.remat else Block

        def block(level: int, name: str) -> nn.Module:
            width, rate = self.features[level], rates[level]
            settings = self.convs, size, self.batch_norm, rate, self.residual, self.dtype
            return make(width, *settings, name=name)

        def head(level: int, name: str) -> nn.Module:
            return Upsample(self.num_classes, self.patch * 2**level, jnp.float32, name=name)

        if self.encoder is None:
            *outer, bottleneck = range(levels)
            x = patches(image.astype(self.dtype), self.patch)
            skips = []
            for level in outer:
                x = block(level, f"down{level}")(x, train, weight)
                skips.append(x)
                x = max_pool(x)
            x = block(bottleneck, "bottleneck")(x, train, weight)
        else:
            *skips, x = self.encoder(image, train, weight)
            if len(skips) != levels:
                raise ValueError(
                    f"features is {self.features}: this encoder's maps need {len(skips)} numbers"
                )
        deeper = []
        for level in reversed(range(len(skips))):
            x = Upsample(self.features[level], 2, self.dtype, name=f"upsample{level}")(x)
            x = jnp.concatenate([x, skips[level]], axis=-1)
            x = block(level, f"up{level}")(x, train, weight)
            if self.deep and level:
                deeper.append(head(level, f"head{level}")(x))
        return sum(deeper, head(0, "head")(x))


#: The tutorial's network: 11,707,729 parameters, with Keras' initial distributions.
ARTICLE = UNet(group_size=None, dropout=(0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
