"""A trained `UNet` as an ONNX file, and inference from such a file without JAX.

    file.write_bytes(to_onnx(model, variables, raw=True).SerializeToString())
    proba = OnnxModel(file).probabilities(image)  # uint8 [B, H, W, C]

The graph is written from the network's structure and its variables, by the names of the modules.
Inside, arrays are [B, C, H, W], the order that ONNX demands; batch norm is folded into the
convolutions before it.
"""

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax.traverse_util import flatten_dict
from scipy.special import expit, softmax

import flax_unet
from flax_unet import efficientnet
from flax_unet.model import BatchNorm, GroupNorm, UNet, variable_shapes

if TYPE_CHECKING:
    import onnx

#: Of 2022: read by ONNX Runtime 1.12 and by all programs since. A newer one would only
#: exclude older programs.
OPSET, IR_VERSION = 17, 8
#: Attributes of a `UNet` in the metadata of its file, as JSON.
OWN = "stride", "num_classes", "overlapping"


def _load(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX files need the package {package}: pip install 'flax-unet[onnx]'"
        ) from error


class _Graph:
    """Nodes and arrays so far; results are known by their names.

    Attributes:
        variables: the network's, by path, such as "down0/Conv_0/kernel".
    """

    def __init__(self, variables: dict[str, np.ndarray]):
        self.onnx = _load("onnx")
        self.variables, self.nodes, self.arrays = variables, [], []

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node; return its output, which has the node's name."""
        name = name or f"{operator}_{len(self.nodes)}"
        node = self.onnx.helper.make_node(operator, inputs, [name], name, **attributes)
        self.nodes.append(node)
        return name

    def array(self, value: Any, name: str = "", dtype: Any = np.float32) -> str:
        """Append a constant; return its name."""
        name = name or f"constant_{len(self.arrays)}"
        array = np.ascontiguousarray(value, dtype)
        self.arrays.append(self.onnx.numpy_helper.from_array(array, name))
        return name


# One function per kind of module; x is the name of its input.


def _conv(
    g: _Graph,
    x: str,
    name: str,
    kernel: np.ndarray,
    bias: np.ndarray,
    *,
    stride: int = 1,
    group: int = 1,
) -> str:
    """'Same' convolution with [h, w, C / group, F]; H and W are multiples of the stride."""
    before = (len(kernel) - stride) // 2
    after = len(kernel) - stride - before
    weights = g.array(kernel.transpose(3, 2, 0, 1), f"{name}/kernel")
    return g.node(
        "Conv",
        x,
        weights,
        g.array(bias, f"{name}/bias"),
        name=name,
        strides=[stride] * 2,
        pads=[before, before, after, after],
        group=group,
    )


def _folded(
    g: _Graph, norm: str, kernel: np.ndarray, bias: np.ndarray | float, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a convolution followed by a batch norm, as those of one convolution."""
    scale, shift, mean, variance = (
        g.variables[f"{norm}/{kind}"].astype(np.float64)
        for kind in ("scale", "bias", "mean", "variance")
    )
    factor = scale / np.sqrt(variance + epsilon)
    return kernel * factor, shift + (bias - mean) * factor


def _group_norm(g: _Graph, x: str, name: str, group_size: int) -> str:
    scale, bias = (g.variables[f"{name}/{kind}"] for kind in ("scale", "bias"))
    groups, epsilon = len(scale) // group_size, GroupNorm.epsilon
    if group_size == 1:
        arrays = g.array(scale, f"{name}/scale"), g.array(bias, f"{name}/bias")
        return g.node("InstanceNormalization", x, *arrays, name=name, epsilon=epsilon)
    # ONNX' GroupNormalization had another meaning before version 21, and few programs know it.
    shape = g.node("Shape", x)
    x = g.node("Reshape", x, g.array([0, groups, -1], dtype=np.int64))
    unit = g.array(np.ones(groups)), g.array(np.zeros(groups))
    x = g.node("Reshape", g.node("InstanceNormalization", x, *unit, epsilon=epsilon), shape)
    x = g.node("Mul", x, g.array(scale[:, None, None], f"{name}/scale"))
    return g.node("Add", x, g.array(bias[:, None, None], f"{name}/bias"), name=name)


def _conv_transpose(g: _Graph, x: str, name: str) -> str:
    kernel, bias = (g.variables[f"{name}/{kind}"] for kind in ("kernel", "bias"))
    if len(kernel) == 1:
        return _conv(g, x, name, kernel, bias)
    arrays = g.array(kernel.transpose(2, 3, 0, 1), f"{name}/kernel"), g.array(bias, f"{name}/bias")
    return g.node("ConvTranspose", x, *arrays, name=name, strides=kernel.shape[:2])


def _block(g: _Graph, x: str, name: str, model: UNet) -> str:
    block_input = x
    for i in range(model.convs):
        conv, norm = f"{name}/Conv_{i}", f"{name}/BatchNorm_{i}"
        kernel, bias = (g.variables[f"{conv}/{kind}"] for kind in ("kernel", "bias"))
        if model.norm == "batch":
            kernel, bias = _folded(g, norm, kernel, bias, BatchNorm.epsilon)
        x = _conv(g, x, conv, kernel, bias)
        if model.norm not in ("batch", None):
            size = 1 if model.norm == "instance" else model.norm
            x = _group_norm(g, x, f"{name}/GroupNorm_{i}", size)
        if model.residual and i == model.convs - 1:
            x = g.node("Add", x, _conv_transpose(g, block_input, f"{name}/shortcut"))
        x = g.node("Relu", x)
    return x


def _encoder(g: _Graph, x: str, encoder: efficientnet.Encoder) -> list[str]:
    """The maps of `efficientnet.Encoder`."""

    def conv(x: str, name: str, kernel: np.ndarray, **options: int) -> str:
        norm = f"{name.removesuffix('/kernel')}_norm"
        return _conv(g, x, name, *_folded(g, norm, kernel, 0.0, efficientnet.EPSILON), **options)

    def pointwise(x: str, name: str) -> str:
        return conv(x, name, g.variables[f"{name}/kernel"][None, None])

    def relu6(x: str) -> str:
        return g.node("Clip", x, zero, six)

    zero, six = g.array(0, "zero"), g.array(6, "six")
    # (255 x - 127) / 128, see efficientnet.py.
    x = g.node("Sub", g.node("Mul", x, g.array(255 / 128)), g.array(127 / 128))
    x = relu6(conv(x, "encoder/stem", g.variables["encoder/stem/kernel"], stride=2))
    maps, channels = [], efficientnet.STEM
    for i, (_, stride, expansion, features) in enumerate(efficientnet.blocks(encoder.variant)):
        name, block_input = f"encoder/block{i}", x
        if stride == 2:
            maps.append(x)
        if expansion > 1:
            x = relu6(pointwise(x, f"{name}/expand"))
        kernel, width = g.variables[f"{name}/depthwise"], expansion * channels
        x = relu6(conv(x, f"{name}/depthwise", kernel, stride=stride, group=width))
        x = pointwise(x, f"{name}/project")
        if (stride, channels) == (1, features):
            x = g.node("Add", x, block_input)
        channels = features
    return [*maps, x]


def _unet(g: _Graph, x: str, model: UNet) -> str:
    if model.encoder is None:
        maps, skips = [], len(model.features) - 1
        if model.patch > 1:
            x = g.node("SpaceToDepth", x, blocksize=model.patch)
        for level in range(skips):
            maps.append(_block(g, x, f"down{level}", model))
            x = g.node("MaxPool", maps[-1], kernel_shape=[2, 2], strides=[2, 2])
        x = _block(g, x, "bottleneck", model)
    else:
        *maps, x = _encoder(g, x, cast(efficientnet.Encoder, model.encoder))
    logits = []
    for level, skip in reversed(list(enumerate(maps))):
        x = g.node("Concat", _conv_transpose(g, x, f"upsample{level}"), skip, axis=1)
        x = _block(g, x, f"up{level}", model)
        if model.deep or level == 0:
            logits.append(_conv_transpose(g, x, f"head{level or ''}"))
    if not maps:
        logits.append(_conv_transpose(g, x, "head"))
    return logits[0] if len(logits) == 1 else g.node("Sum", *logits)


def to_onnx(
    model: UNet,
    variables: Any,
    *,
    channels: int = 3,
    probabilities: bool = False,
    raw: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> "onnx.ModelProto":
    """A network and its variables as an ONNX model, computed in float32.

    Its input `image` is [batch, height, width, channels], its output `logits` or `probabilities`
    [batch, height, width, classes]. Batch, height and width are free; the latter two are multiples
    of the network's stride.

    Args:
        model: `dtype` and `dropout` are ignored.
        variables: what `model.apply` takes.
        channels: of the images.
        probabilities: whether the output is `classes.probabilities` of the logits.
        raw: whether the image is uint8 and divided by 255 inside, instead of float32 in [0, 1].
        metadata: more entries of the file's metadata, beside `stride`, `num_classes` and
            `overlapping`, which are JSON.

    Raises:
        ValueError: the model is not a `UNet` without an encoder or with an EfficientNet-Lite, or
            the variables are not the model's, or not finite.
        ModuleNotFoundError: onnx is not installed.
    """
    graph, x = _Graph(_checked(model, variables, channels)), "image"
    helper, types = graph.onnx.helper, graph.onnx.TensorProto
    if raw:
        x = graph.node("Cast", x, to=types.FLOAT)
        x = graph.node("Div", x, graph.array(255))
    x = _unet(graph, graph.node("Transpose", x, perm=[0, 3, 1, 2]), model)
    x = graph.node("Transpose", x, name="logits", perm=[0, 2, 3, 1])
    if probabilities and (model.overlapping or model.num_classes == 1):
        x = graph.node("Sigmoid", x, name="probabilities")
    elif probabilities:
        x = graph.node("Softmax", x, name="probabilities", axis=-1)

    free = ["batch", "height", "width"]
    value, pixels = helper.make_tensor_value_info, types.UINT8 if raw else types.FLOAT
    inputs = [value("image", pixels, [*free, channels])]
    outputs = [value(x, types.FLOAT, [*free, model.num_classes])]
    made = helper.make_model(
        helper.make_graph(graph.nodes, "UNet", inputs, outputs, graph.arrays),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="flax-unet",
        producer_version=flax_unet.__version__,
    )
    own = {name: json.dumps(getattr(model, name)) for name in OWN}
    helper.set_model_props(made, {**(metadata or {}), **own})
    return made


def _checked(model: Any, variables: Any, channels: int) -> dict[str, np.ndarray]:
    """The variables by path, if the model can be written and they are its own and finite."""
    encoder = getattr(model, "encoder", None)
    for module, known in ((model, UNet), (encoder, efficientnet.Encoder)):
        if module is not None and type(module) is not known:
            raise ValueError(
                f"{type(module).__name__} cannot be written as ONNX, only {known.__name__} can"
            )
    flat: Any = flatten_dict(dict(variables), sep="/")
    shapes = {name: np.shape(x) for name, x in flat.items()}
    wanted = variable_shapes(model, channels)
    if different := sorted(dict(shapes.items() ^ wanted.items())):
        name = different[0]
        raise ValueError(
            f"the variables are not those of this model with {channels} channels: {name} is "
            f"{shapes.get(name, 'missing')}, and should be {wanted.get(name, 'missing')}"
        )
    arrays = {}
    for name, x in flat.items():
        collection, path = name.split("/", 1)
        arrays[path] = np.asarray(x, np.float32)
        if not np.isfinite(arrays[path]).all():
            raise ValueError(f"{name} has NaN or infinity: do not export it")
    return arrays


class OnnxModel:
    """A file of `to_onnx`, computed by ONNX Runtime on the CPU.

    With a file that computes logits it can stand in for the network in `predict.predict_proba`,
    `predict.Mirrored` and `predict.Tiled`; `variables` are then ignored.

    Attributes:
        stride: height and width of an image must be multiples of this.
        num_classes: of the probabilities.
        overlapping: whether the classes are independent of each other.
        channels: of the images.
        metadata: all of the file's.
    """

    stride: int
    num_classes: int
    overlapping: bool
    channels: int
    metadata: dict[str, str]
    on_host = True  # see `predict.is_on_host`

    def __init__(self, path: str | os.PathLike | bytes, *, threads: int | None = None):
        """Load a file.

        Args:
            path: of the file, or its content.
            threads: how many compute an image; by default as many as cores are usable.

        Raises:
            ValueError: the file is damaged, or `to_onnx` did not write it.
            OSError: it cannot be read.
            ModuleNotFoundError: onnxruntime is not installed.
        """
        runtime = _load("onnxruntime")
        content = path if isinstance(path, bytes) else Path(path).read_bytes()
        path = "the ONNX file" if isinstance(path, bytes) else path
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or _usable_cores()
        # Threads that wait actively take time from others: on busy cores they are no gain.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # an error is raised, and need not be printed as well
        try:
            self._session = runtime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            self.metadata = self._session.get_modelmeta().custom_metadata_map
            own = [json.loads(self.metadata[name]) for name in OWN]
            (image,), (output,) = self._session.get_inputs(), self._session.get_outputs()
            self.channels = image.shape[3]
            self._raw = {"tensor(uint8)": True, "tensor(float)": False}[image.type]
            self._logits = {"logits": True, "probabilities": False}[output.name]
            self.stride, self.num_classes, self.overlapping = own
            if [*map(type, own), type(self.channels)] != [int, int, bool, int] or self.stride < 1:
                raise ValueError("its metadata is not of a UNet")
            if (image.name, output.type, output.shape[3:]) != ("image", "tensor(float)", own[1:2]):
                raise ValueError("its metadata contradicts its graph")
        except Exception as error:  # ONNX Runtime raises a dozen kinds
            raise ValueError(
                f"{path} is damaged, or was not written by flax-unet: {error}"
            ) from error

    def apply(self, variables: Any, image: Any) -> np.ndarray:
        """Logits, float32 [B, H, W, num_classes]; `image` as in `probabilities`.

        Raises:
            ValueError: as `probabilities`, or the file computes probabilities.
        """
        if not self._logits:
            raise ValueError("the file computes probabilities: export it with --onnx-output logits")
        return self._run(np.asarray(image))

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Probabilities of each class, float32 [B, H, W, num_classes] in [0, 1].

        Args:
            image: [B, H, W, channels]; uint8, or float in [0, 1], which a file that takes uint8
                gets rounded. H and W are multiples of `stride`.

        Raises:
            ValueError: the image has another shape, type or range.
        """
        result = self._run(image)
        return _probabilities(result, self.overlapping) if self._logits else result

    def _run(self, image: np.ndarray) -> np.ndarray:
        shape, stride = image.shape, self.stride
        if len(shape) != 4 or shape[3] != self.channels or shape[1] % stride or shape[2] % stride:
            raise ValueError(
                f"image has shape {shape}: it must be [B, H, W, {self.channels}], H and W "
                f"multiples of {stride}"
            )
        if image.dtype == np.uint8:
            image = image if self._raw else image.astype(np.float32) / np.float32(255)
        elif not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"image has type {image.dtype}: use uint8, or float in [0, 1]")
        elif not ((image >= 0) & (image <= 1)).all():
            span = f"{image.min()} to {image.max()}"
            raise ValueError(f"image has values from {span}: use uint8, or float in [0, 1]")
        else:
            image = np.rint(image * 255).astype(np.uint8) if self._raw else image.astype("float32")
        return self._session.run(None, {"image": image})[0]


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _probabilities(logits: np.ndarray, overlapping: bool) -> np.ndarray:
    """`classes.probabilities` in NumPy."""
    if overlapping or logits.shape[-1] == 1:
        return expit(logits)
    return softmax(logits, axis=-1)
