"""Reads the weights of the tutorial's network from the files of Keras, without Keras.

Three formats: `.keras`, a zip of config.json and model.weights.h5; `.weights.h5` alone; and the
older `.h5`, of Keras 2 or 3, of a model or its weights. Nothing in a file is executed: the pickled
functions of Lambda layers are not read.

What `.keras` and a whole model in `.h5` say of the network (activations, padding, what is connected
with what) is compared with ours. A file of weights alone has only the layers' order and shapes:
that its network was the tutorial's is up to you.
"""

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_unet import hdf5_file
from flax_unet.hdf5_file import Node
from flax_unet.model import ARTICLE, UNet, variable_shapes

#: Settings of Keras layers that our network shares; a file may leave out a default.
CONVOLUTION = {"data_format": "channels_last", "dilation_rate": [1, 1]}
SETTINGS = {
    "Conv2D": CONVOLUTION | {"strides": [1, 1], "groups": 1},
    "Conv2DTranspose": CONVOLUTION | {"strides": [2, 2], "activation": "linear"},
    "MaxPooling2D": {"data_format": "channels_last", "pool_size": [2, 2], "strides": [2, 2]},
}
#: Layers that scale the pixels, directly after the input.
SCALING = ("Lambda", "Rescaling", "TrueDivide", "TFOpLambda")
#: By what the tutorial's network divides them.
DIVISOR = 256.0


class _Layer(NamedTuple):
    """A layer of Keras, or the one that our network needs in its place."""

    name: str  # ours: the path in the parameters; or another unique name
    kind: str  # the class in Keras
    inputs: tuple[str, ...]


def read_weights(
    path: str | os.PathLike, model: UNet = ARTICLE, *, divisor: float | None = None
) -> dict[str, Any]:
    """The variables of `model` with the weights in a file of Keras.

    Keras' network takes pixel values from 0 to 255 and divides them by `divisor`; ours takes images
    in [0, 1]. The first kernel is multiplied by 255 / divisor, so that both give a picture the same
    probabilities, within 1e-5.

    Args:
        path: the file, whatever its name ends with.
        model: the tutorial's network, or a smaller or wider one: no norm, encoder, patches,
            residual blocks or deep supervision. Its images have three channels.
        divisor: by default 256, as in the tutorial; 1 if the network took pixel values as they are,
            255 if it took images in [0, 1]. It must be given if the file shows that no layer
            divides.

    Returns:
        {"params": ...}, float32.

    Raises:
        ValueError: the file has another format or is damaged; or its network is another one: a
            layer is missing, left over, connected or set in another way; an array has another shape
            or type, is not finite or not in the file. The message names the layers of both.
        OSError: it cannot be read.
    """
    plain = UNet(features=model.features, num_classes=model.num_classes, norm=None)
    free = {name: getattr(model, name) for name in ("overlapping", "convs", "dropout", "remat")}
    if model != plain.clone(**free, dtype=model.dtype):
        raise ValueError("the model is not like the tutorial's: see read_weights")
    if divisor is not None and not 1 <= divisor <= 2**16:
        raise ValueError(f"divisor is {divisor}: it must be from 1 to 65536")
    expected = variable_shapes(model)
    # With the state of an optimizer: Adam's is twice the weights.
    most = 5 * 4 * sum(map(math.prod, expected.values())) + 2**24
    with Path(path).open("rb") as stream:
        try:
            arrays = _read(_all(stream, most), model, expected, divisor)
        except Exception as error:  # zip, struct and JSON raise a dozen kinds
            raise ValueError(f"{path} has no weights of this network: {error}") from error
    first = next(_layers(model)).name
    arrays[f"{first}/kernel"] *= np.float32(255 / (divisor or DIVISOR))
    return {"params": unflatten_dict(arrays, sep="/")}


def _all(stream: Any, most: int) -> bytes:
    """The bytes of a stream, unless there are too many for this network."""
    if len(data := stream.read(most + 1)) > most:
        raise ValueError(f"it is larger than {most / 1e6:.0f} MB, too large for this network")
    return data


def _layers(model: UNet) -> Iterator[_Layer]:
    """The layers of our network in Keras' terms, in the order in which Keras lists them."""
    *outer, bottom = range(len(model.features))

    def block(name: str, source: str) -> Iterator[_Layer]:
        for i in range(model.convs):
            yield _Layer(f"{name}/Conv_{i}", "Conv2D", (source,))
            source = f"{name}/Conv_{i}"

    last, source = f"Conv_{model.convs - 1}", "image"
    for level in outer:
        yield from block(f"down{level}", source)
        source = f"pool{level}"
        yield _Layer(source, "MaxPooling2D", (f"down{level}/{last}",))
    yield from block("bottleneck", source)
    source = f"bottleneck/{last}"
    for level in reversed(outer):
        up, both = f"upsample{level}", f"concatenate{level}"
        yield _Layer(up, "Conv2DTranspose", (source,))
        yield _Layer(both, "Concatenate", (up, f"down{level}/{last}"))
        yield from block(f"up{level}", both)
        source = f"up{level}/{last}"
    yield _Layer("head", "Conv2D", (source,))


def _read(
    data: bytes, model: UNet, expected: dict[str, tuple[int, ...]], divisor: float | None
) -> dict[str, np.ndarray]:
    """The arrays by our names, in our layout."""
    config = None
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            with archive.open("config.json") as member:
                config = json.loads(_all(member, 2**24))
            with archive.open("model.weights.h5") as member:
                data = _all(member, len(data))  # Keras stores it without compression
    root = hdf5_file.read(data)
    if root.has_attribute("model_config"):
        config = json.loads("".join(root.texts("model_config")))
    names = {} if config is None else _check_network(config, model, divisor)
    root = root["model_weights"] if "model_weights" in root else root
    found = (_in_order if root.has_attribute("layer_names") else _by_class)(root, model)
    arrays = {}
    for layer, (name, weights) in found.items():
        name = f"{names.get(layer, name)} (our {layer})"
        if len(weights) != 2:
            raise ValueError(f"{name} has {len(weights)} arrays, not a kernel and a bias")
        for part, weight in zip(("kernel", "bias"), weights, strict=True):
            ours = f"{layer}/{part}"
            # A transposed convolution has [s, s, out, in] in Keras, and [s, s, in, out] here.
            swap = part == "kernel" and layer.startswith("upsample")
            arrays[ours] = _array(f"the {part} of {name}", weight, expected[f"params/{ours}"], swap)
    return arrays


def _by_class(file: Node, model: UNet) -> dict[str, tuple[str, list[Node]]]:
    """{our layer: (Keras' name, weights)} in .weights.h5.

    There the layers of each class are numbered from 0, whatever their names are in the network.
    HDF5 lists them alphabetically, conv2d_10 before conv2d_2.
    """
    groups = [name for name in ("layers", "_layer_checkpoint_dependencies") if name in file]
    if not groups:
        raise ValueError("it has no group of layers")
    layers, counted = file[groups[0]], {}
    for name in layers:
        group = layers[name]
        weights = group["vars"] if "vars" in group else {}
        kind = re.fullmatch(r"(conv2d|conv2d_transpose)(?:_(\d{1,6}))?", name)
        if kind:
            counted[kind[1], int(kind[2] or 0)] = name, weights
        elif len(weights):
            raise ValueError(f"{name} has weights, and our network has no such layer")
    found = {}
    for kind, keras in (("Conv2D", "conv2d"), ("Conv2DTranspose", "conv2d_transpose")):
        needed = [layer.name for layer in _layers(model) if layer.kind == kind]
        for i, layer in enumerate(needed):
            if (keras, i) not in counted:
                raise ValueError(
                    f"{keras}{f'_{i}' if i else ''} (our {layer}) is missing: our network has "
                    f"{len(needed)} {kind} layers"
                )
            name, weights = counted.pop((keras, i))
            found[layer] = name, [weights[str(i)] for i in range(len(weights))]
    for name, weights in counted.values():
        shape = list(weights["0"].shape) if "0" in weights else "without weights"
        raise ValueError(f"{name} {shape} is left over: our network has no layer for it")
    return found


def _in_order(root: Node, model: UNet) -> dict[str, tuple[str, list[Node]]]:
    """The same in the older .h5, which lists the layers in the order of the network."""
    theirs = []
    for name in root.texts("layer_names"):
        group = root[name]
        if paths := group.texts("weight_names"):
            parts = (path.split("/") for path in paths)
            theirs.append((name, [reduce(Node.__getitem__, part, group) for part in parts]))
    ours = [layer.name for layer in _layers(model) if layer.kind.startswith("Conv2D")]
    if len(theirs) < len(ours):
        layer = ours[len(theirs)]
        raise ValueError(
            f"it has {len(theirs)} layers with weights, our network {len(ours)}: {layer} is missing"
        )
    for name, weights in theirs[len(ours) :]:
        raise ValueError(
            f"{name} {list(weights[0].shape)} is left over: our network has no layer for it"
        )
    return dict(zip(ours, theirs, strict=True))


def _array(name: str, weight: Node, ours: tuple[int, ...], swap: bool) -> np.ndarray:
    """A copy of the entries in our layout."""
    expected = (*ours[:-2], ours[-1], ours[-2]) if swap else ours
    if (shape := weight.shape) != expected:
        note = f" (in Keras {list(expected)})" if swap else ""
        raise ValueError(f"{name} has the shape {list(shape)}, and ours is {list(ours)}{note}")
    try:
        array = weight.array()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has NaN or infinity")
    return np.array(array.swapaxes(-1, -2) if swap else array, np.float32, order="C")


def _check_network(config: Any, model: UNet, divisor: float | None) -> dict[str, str]:
    """{our layer: Keras' name}; ValueError unless the network that is described is ours."""
    content = config["config"]
    if not isinstance(content, dict) or "layers" not in content:
        raise ValueError(f"a {config['class_name']} does not say what its layers are")
    ours, names, scaled = _layers(model), {}, False
    known: dict[str, str] = {}  # Keras' name: the layer of ours whose output this is
    for described in content["layers"]:
        kind, settings = described["class_name"], described["config"]
        name = described.get("name", settings["name"])
        inputs = tuple(_sources(described["inbound_nodes"], known))
        if kind == "InputLayer":
            known[name] = "image"
        elif kind == "Dropout" and len(inputs) == 1:
            known[name] = inputs[0]
        elif kind in SCALING and inputs == ("image",):
            if scaled:
                raise ValueError(f"{name} ({kind}) scales the pixels again; ours does it once")
            _check_scaling(name, described, divisor or DIVISOR)
            known[name], scaled = "image", True
        elif kind == "Activation" and inputs == ("head",):
            _check_settings(name, "head", settings, _activations(model, "head"))
            known[name] = "head"
        else:
            layer = next(ours, None)
            if layer is None or (kind, inputs) != (layer.kind, layer.inputs):
                needed = "no more layers" if layer is None else _as_text(layer)
                raise ValueError(f"{_as_text(_Layer(name, kind, inputs))}; ours has {needed}")
            _check_layer(name, layer, settings, model)
            known[name] = layer.name
            names[layer.name] = name
    if (layer := next(ours, None)) is not None:
        raise ValueError(f"{_as_text(layer)} is missing")
    if list(_sources(content["output_layers"], known)) != ["head"]:
        raise ValueError("its output is not the last layer's")
    if not scaled and divisor is None:
        raise ValueError(
            "none of its layers divides the pixels: say what it took, values from 0 to 255 by "
            "divisor 1, or images in [0, 1] by divisor 255"
        )
    return names


def _as_text(layer: _Layer) -> str:
    return f"{layer.name} ({layer.kind} of {' and '.join(layer.inputs)})"


def _sources(nodes: Any, known: dict[str, str]) -> Iterator[str]:
    """The layers whose outputs are used: Keras writes [name, node, tensor], nested in any way."""
    if isinstance(nodes, dict):
        nodes = list(nodes.values())
    if isinstance(nodes, list):
        if len(nodes) >= 3 and type(nodes[0]) is str and type(nodes[1]) is type(nodes[2]) is int:
            yield known.get(nodes[0], nodes[0])
        else:
            for node in nodes:
                yield from _sources(node, known)


def _activations(model: UNet, layer: str) -> dict[str, Any]:
    """What may follow a convolution: the head's logits, or their probabilities."""
    if layer != "head":
        return {"activation": ["relu"]}
    exclusive = model.num_classes > 1 and not model.overlapping
    return {"activation": ["linear", "softmax" if exclusive else "sigmoid"]}


def _check_layer(name: str, layer: _Layer, settings: dict[str, Any], model: UNet) -> None:
    allowed = {key: [value] for key, value in SETTINGS.get(layer.kind, {}).items()}
    if layer.kind == "Conv2D":
        allowed |= _activations(model, layer.name)
        allowed["padding"] = ["valid", "same"] if layer.name == "head" else ["same"]
    if layer.kind == "Concatenate":
        allowed["axis"] = [-1, 3]
    _check_settings(name, layer.name, settings, allowed)


def _check_settings(name: str, ours: str, settings: Any, allowed: dict[str, Any]) -> None:
    for key, values in allowed.items():
        if (value := settings.get(key, values[0])) not in values:
            raise ValueError(
                f"{name} (our {ours}) has {key} {str(value)[:60]}, and ours "
                f"{' or '.join(map(str, values))}"
            )


def _check_scaling(name: str, described: dict[str, Any], divisor: float) -> None:
    """The scale of a layer; what a Lambda does cannot be known without executing it."""
    kind, settings = described["class_name"], described["config"]
    if kind == "Lambda":
        return
    scale, offset = float(settings.get("scale", 1.0)), float(settings.get("offset", 0.0))
    if kind != "Rescaling":
        if (function := settings.get("function", "math.truediv")) != "math.truediv":
            raise ValueError(f"{name} is {function}, and ours only divides the pixels")
        scale = 1 / _operand(described["inbound_nodes"])
    if not math.isclose(scale * divisor, 1, rel_tol=1e-6) or offset:
        raise ValueError(
            f"{name} multiplies by {scale} and adds {offset}, and the divisor is {divisor}: "
            f"give {1 / scale if scale > 0 else 'another'}, without an offset"
        )


def _operand(nodes: Any) -> float:
    """What an operation divides its tensor by, as Keras 2 or 3 writes it."""
    try:
        node = nodes[0]
        return float(node["args"][1] if isinstance(node, dict) else node[0][3]["y"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("a layer divides the pixels, and does not say by what") from error
