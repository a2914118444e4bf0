"""Files of Keras, written here with h5py in the layouts of Keras 2.21 and 3.15."""

import io
import json
import os
import runpy
import struct
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_unet import hdf5_file, runs
from flax_unet.keras_file import read_weights
from flax_unet.model import ARTICLE, UNet
from flax_unet_cli import import_keras

h5py = pytest.importorskip("h5py")
GOLDEN = Path(__file__).parent / "golden"
MODEL = UNet(features=(4, 5, 6), norm=None)
FORMATS = ("keras", "weights.h5", "h5", "old.h5")
CONV = {
    "strides": [1, 1],
    "padding": "same",
    "data_format": "channels_last",
    "dilation_rate": [1, 1],
    "groups": 1,
    "activation": "relu",
}
UP = CONV | {"strides": [2, 2], "activation": "linear"}
POOL = {"pool_size": [2, 2], "padding": "valid", "strides": [2, 2], "data_format": "channels_last"}


def network(levels):
    """The layers as the tutorial creates them: [class, name, inputs, settings, our name]."""
    layers, numbers = [["InputLayer", "input_1", [], {}, None]], {}

    def add(kind, stem, inputs, settings, ours=None):
        numbers[stem] = numbers.get(stem, 33) + 1  # as after other networks in the same notebook
        layers.append([kind, f"{stem}_{numbers[stem]}", inputs, settings, ours])
        return layers[-1][1]

    def block(x, ours):
        for i in range(3):
            if i == 2:
                x = add("Dropout", "dropout", [x], {"rate": 0.1})
            x = add("Conv2D", "conv2d", [x], CONV, f"{ours}/Conv_{i}")
        return x

    code = {"class_name": "__lambda__", "config": {"code": "4wEAAA=="}}
    x, skips = add("Lambda", "lambda", ["input_1"], {"function": code}), []
    for level in range(levels - 1):
        skips.append(block(x, f"down{level}"))
        x = add("MaxPooling2D", "max_pooling2d", [skips[-1]], POOL)
    x = block(x, "bottleneck")
    for level in reversed(range(levels - 1)):
        x = add("Conv2DTranspose", "conv2d_transpose", [x], UP, f"upsample{level}")
        x = add("Concatenate", "concatenate", [x, skips[level]], {"axis": -1})
        x = block(x, f"up{level}")
    add("Conv2D", "conv2d", [x], CONV | {"padding": "valid", "activation": "sigmoid"}, "head")
    return layers


def config(layers, keras=3):
    """What Keras 2 or 3 writes of the network."""

    def nodes(inputs):
        if keras == 2:
            return [[[name, 0, 0, {}] for name in inputs]] if inputs else []
        tensors = [
            {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}
            for name in inputs
        ]
        args = tensors if len(tensors) == 1 else [tensors]
        return [{"args": args, "kwargs": {"mask": None}}] if inputs else []

    described = [
        {
            "class_name": kind,
            "config": {"name": name, **settings},
            "name": name,
            "inbound_nodes": nodes(inputs),
        }
        for kind, name, inputs, settings, _ in layers
    ]
    last = [layers[-1][1], 0, 0]
    outputs = [last] if keras == 2 else last
    return {
        "class_name": "Functional",
        "config": {"layers": described, "output_layers": outputs},
    }


def draw(model=MODEL, seed=0):
    """Random weights in Keras' layout, by our names: {"head": [kernel, bias]}."""
    image = jnp.zeros((1, model.stride, model.stride, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    rng, weights = np.random.default_rng(seed), {}
    for name, x in flatten_dict(shapes, sep="/").items():
        layer, part = name.rsplit("/", 1)
        shape = x.shape
        if layer.startswith("upsample") and part == "kernel":
            shape = (*shape[:2], shape[3], shape[2])
        array = rng.normal(size=shape).astype(np.float32)
        weights.setdefault(layer, [None, None])[part == "bias"] = array
    return weights


def write_layers(file, layers, weights, top="layers"):
    """.weights.h5: the layers of each class are numbered from 0."""
    numbers = {}
    for _, name, _, _, ours in layers:
        stem = name.rsplit("_", 1)[0]
        numbers[stem] = number = numbers.get(stem, -1) + 1
        group = file.create_group(f"{top}/{stem}" + (f"_{number}" if number else ""))
        vars_ = group.create_group("vars")
        vars_.attrs["name"] = name
        for i, array in enumerate(weights.get(ours, ())):
            vars_[str(i)] = array
    file.create_group("optimizer/vars")["0"] = np.int32(7)


def write_legacy(file, layers, weights, end=""):
    """.h5: layers by their names, listed in the network's order."""
    file.attrs["layer_names"] = [name for _, name, *_ in layers]
    for _, name, _, _, ours in layers:
        parts = [f"{name}/kernel{end}", f"{name}/bias{end}"] if ours in weights else []
        group = file.create_group(name)
        group.attrs["weight_names"] = parts
        for part, array in zip(parts, weights.get(ours, ()), strict=False):
            group[part] = array


def write(path, layers=None, weights=None, change=None, described=None):
    """Write a file in the format that its name ends with.

    `change` gets the group of layers in HDF5, `described` is another config.
    """
    layers = network(3) if layers is None else layers
    weights = draw() if weights is None else weights
    change = change or (lambda group: None)
    form = path.name.split(".", 1)[1]
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        if form in ("keras", "weights.h5"):
            write_layers(file, layers, weights)
            change(file["layers"])
        elif form == "h5":
            file.attrs["keras_version"] = "2.21.0"
            text = json.dumps(described or config(layers, keras=2))
            file.attrs["model_config"] = text.encode()
            write_legacy(group := file.create_group("model_weights"), layers, weights, ":0")
            change(group)
        else:
            write_legacy(file, layers, weights)
            change(file)
    if form == "keras":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", "{}")
            archive.writestr("config.json", json.dumps(described or config(layers)))
            archive.writestr("model.weights.h5", stream.getvalue())
    else:
        path.write_bytes(stream.getvalue())
    return path


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    return tmp_path / f"model.{request.param}"


def test_each_array_is_where_it_belongs(path):
    """With 15 convolutions and more, alphabetical order is another one."""
    weights = draw()
    params = flatten_dict(read_weights(write(path), MODEL, divisor=255)["params"], sep="/")
    assert len(params) == 2 * len(weights) == 36
    for layer, (kernel, bias) in weights.items():
        if layer.startswith("upsample"):
            kernel = kernel.transpose(0, 1, 3, 2)
        np.testing.assert_array_equal(params[f"{layer}/kernel"], kernel)
        np.testing.assert_array_equal(params[f"{layer}/bias"], bias)
        assert params[f"{layer}/kernel"].dtype == np.float32


def test_keras_computes_the_same(path):
    """Weights and logits that Keras computed, see golden/make_keras_golden.py."""
    golden = dict(np.load(GOLDEN / "keras_unet.npz"))
    model = UNet(features=tuple(golden["features"].tolist()), norm=None)
    weights = {}
    for name, array in golden.items():
        if name.startswith("params/"):
            layer, part = name.removeprefix("params/").rsplit("/", 1)
            up = layer.startswith("upsample") and part == "kernel"
            weights.setdefault(layer, [None, None])[part == "bias"] = (
                array.swapaxes(-1, -2) if up else array
            )
    write(path, network(6), weights)
    # Keras got 256 / 255 times these pixel values.
    variables = read_weights(path, model)
    image = jnp.asarray(golden["image"] / 255 * (256 / 255), jnp.float32)
    logits = jax.jit(model.apply)(variables, image)
    proba, keras = jax.nn.sigmoid(logits), jax.nn.sigmoid(golden["logits"])
    assert keras.std() > 0.02
    np.testing.assert_allclose(proba, keras, rtol=0, atol=1e-5)


def test_the_divisor_scales_the_first_kernel_only(tmp_path):
    file = write(tmp_path / "model.keras")
    by_default, scaled = (
        flatten_dict(read_weights(file, MODEL, **options)["params"], sep="/")
        for options in ({}, {"divisor": 255.0})
    )
    for name, array in scaled.items():
        scale = np.float32(255 / 256) if name == "down0/Conv_0/kernel" else np.float32(1)
        np.testing.assert_array_equal(by_default[name], scale * array)
    with pytest.raises(ValueError, match="divisor is 0"):
        read_weights(file, MODEL, divisor=0)


def test_keras_2_has_another_name_for_the_group_of_layers(tmp_path):
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        write_layers(file, network(3), draw(), "_layer_checkpoint_dependencies")
    params = read_weights(tmp_path / "model.weights.h5", MODEL)["params"]
    np.testing.assert_array_equal(params["head"]["bias"], draw()["head"][1])


def test_names_may_be_texts_of_fixed_length(tmp_path):
    def fix(root):
        for group, name in [(root, "layer_names"), *((root[g], "weight_names") for g in root)]:
            group.attrs[name] = np.array(group.attrs[name], "S")

    params = read_weights(write(tmp_path / "model.old.h5", change=fix), MODEL)["params"]
    np.testing.assert_array_equal(params["head"]["bias"], draw()["head"][1])


@pytest.mark.parametrize("activation", ["linear", "sigmoid"])
def test_the_sigmoid_may_be_a_layer_of_its_own(tmp_path, activation):
    layers = network(3)
    layers[-1][3]["activation"] = "linear"
    layers.append(["Activation", "activation", [layers[-1][1]], {"activation": activation}, None])
    read_weights(write(tmp_path / "model.keras", layers), MODEL)


# What does not match is named.


def refused(file, *words, model=MODEL, **options):
    """Check that the file is refused, with all of these words."""
    with pytest.raises(ValueError) as caught:
        read_weights(file, model, **options)
    assert str(file) in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


def keras_name(path, number):
    """How the convolution of that number, from 0, is called."""
    if path.suffix == ".keras" or not path.name.endswith("weights.h5"):
        return f"conv2d_{34 + number}"
    return f"conv2d_{number}" if number else "conv2d"


def test_another_shape(path):
    weights = draw()
    weights["down1/Conv_0"][0] = np.zeros((3, 3, 4, 7), np.float32)
    name = keras_name(path, 3)
    words = f"kernel of {name} ", "our down1/Conv_0", "[3, 3, 4, 7]", "[3, 3, 4, 5]"
    refused(write(path, weights=weights), *words)


def test_the_shape_of_a_transposed_kernel(path):
    weights = draw()
    weights["upsample0"][0] = weights["upsample0"][0].swapaxes(-1, -2)
    words = "conv2d_transpose_", "our upsample0", "[2, 2, 5, 4]", "in Keras [2, 2, 4, 5]"
    refused(write(path, weights=weights), *words)


def test_another_type(path):
    weights = draw()
    weights["head"][1] = weights["head"][1].astype(np.float64)
    refused(write(path, weights=weights), "the bias of", "our head", "not of the type float32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(path, value):
    weights = draw()
    weights["up1/Conv_2"][0][0, 0, 0, 0] = value
    refused(write(path, weights=weights), "the kernel of", "our up1/Conv_2", "NaN or infinity")


def test_without_bias(path):
    def remove(group):
        layer = "conv2d" if "conv2d" in group else "conv2d_34"
        if "vars" in group[layer]:
            del group[layer]["vars/1"]
        else:
            names = group[layer].attrs["weight_names"]
            group[layer].attrs["weight_names"] = list(names[:1])

    name = keras_name(path, 0)
    refused(write(path, change=remove), f"{name} (our down0/Conv_0) has 1 arrays")


def test_a_missing_layer(path):
    layers = [layer for layer in network(3) if layer[4] != "head"]
    refused(write(path, layers), "head", "missing")


def test_a_layer_too_much(path):
    layers, weights = network(3), draw()
    layers.append(["Conv2D", "conv2d_90", [layers[-1][1]], CONV, "more"])
    weights["more"] = [np.zeros((3, 3, 1, 1), np.float32), np.zeros(1, np.float32)]
    refused(write(path, layers, weights), "conv2d_")


@pytest.mark.parametrize("form", ["weights.h5", "old.h5"])
def test_a_layer_too_much_is_named_with_its_shape(tmp_path, form):
    layers, weights = network(3), draw()
    layers.append(["Conv2D", "conv2d_90", [layers[-1][1]], CONV, "more"])
    weights["more"] = [np.zeros((3, 3, 1, 2), np.float32), np.zeros(2, np.float32)]
    name = "conv2d_16" if form == "weights.h5" else "conv2d_90"
    file = write(tmp_path / f"model.{form}", layers, weights)
    refused(file, f"{name} [3, 3, 1, 2] is left over")


@pytest.mark.parametrize("form", ["keras", "weights.h5"])
def test_a_layer_of_another_class_with_weights(tmp_path, form):
    layers, weights = network(3), draw()
    name = "batch_normalization_34"
    layers.insert(4, ["BatchNormalization", name, [layers[3][1]], {}, "norm"])
    weights["norm"] = [np.zeros(4, np.float32)]
    refused(write(tmp_path / f"model.{form}", layers, weights), "batch_normalization")


def test_a_network_of_other_channels_or_levels(path):
    write(path)
    refused(path, "conv2d", "[3, 3, 3, 4]", model=UNet(features=(8, 5, 6), norm=None))
    refused(path, "our", model=UNet(features=(4, 5, 6, 8), norm=None))
    refused(path, model=UNet(features=(4, 5), norm=None))


@pytest.mark.parametrize(
    "model",
    [
        UNet((4, 8)),
        UNet((4, 8), norm=None, residual=True),
        UNet((4, 8), norm=None, patch=2),
        UNet((4, 8), norm=None, deep=True),
    ],
)
def test_another_kind_of_model_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="not like the tutorial's"):
        read_weights(tmp_path / "any", model)


def test_dropout_and_the_type_of_the_computation_do_not_matter(tmp_path):
    file = write(tmp_path / "model.keras")
    read_weights(file, MODEL.clone(dropout=(0.1, 0.2, 0.3), dtype=jnp.bfloat16, remat=True))


def changed(kind, settings, which=0):
    """The network with other settings in one layer."""
    layers = network(3)
    layer = [layer for layer in layers if layer[0] == kind][which]
    layer[3] = layer[3] | settings
    return layers


@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Conv2D", {"activation": "elu"}),
        ("Conv2D", {"padding": "valid"}),
        ("Conv2D", {"strides": [2, 2]}),
        ("Conv2D", {"dilation_rate": [2, 2]}),
        ("Conv2D", {"data_format": "channels_first"}),
        ("Conv2DTranspose", {"activation": "relu"}),
        ("MaxPooling2D", {"pool_size": [3, 3]}),
        ("Concatenate", {"axis": 1}),
    ],
)
def test_other_settings_of_a_layer(tmp_path, form, kind, settings):
    file = write(tmp_path / f"model.{form}", changed(kind, settings))
    refused(file, *settings, str(next(iter(settings.values()))), "_34 (our ")


def test_another_activation_of_the_head(tmp_path):
    layers = changed("Conv2D", {"activation": "softmax"}, -1)
    refused(write(tmp_path / "model.keras", layers), "our head", "linear or sigmoid")


@pytest.mark.parametrize("form", ["keras", "h5"])
def test_skip_connections_before_the_upsampled_maps(tmp_path, form):
    """The shapes are the same, and the probabilities would be wrong."""
    layers = network(3)
    for layer in layers:
        if layer[0] == "Concatenate":
            layer[2].reverse()
    refused(write(tmp_path / f"model.{form}", layers), "concatenate_34", "upsample1")


def test_a_layer_that_reads_another_one(tmp_path):
    layers = network(3)
    layers[-1][2] = [layers[3][1]]
    refused(write(tmp_path / "model.keras", layers), "conv2d_49", "down0/Conv_1", "up0/Conv_2")


@pytest.mark.parametrize(
    ("settings", "divisor"),
    [({"scale": 1 / 255, "offset": 0.0}, 256), ({"scale": 1 / 256, "offset": -1}, 256)],
)
def test_another_scale_of_the_pixels(tmp_path, settings, divisor):
    layers = network(3)
    layers[1][0], layers[1][3] = "Rescaling", settings
    refused(write(tmp_path / "model.keras", layers), "lambda_34", divisor=divisor)
    layers[1][3] = {"scale": 1 / 255, "offset": 0.0}
    read_weights(write(tmp_path / "model.keras", layers), MODEL, divisor=255)


@pytest.mark.parametrize("keras", [2, 3])
def test_a_division_must_be_by_the_divisor(tmp_path, keras):
    """As `x / 255` of a functional model is saved."""
    form = {2: "h5", 3: "keras"}[keras]

    def saved(function, value):
        described = config(network(3), keras)
        layer = described["config"]["layers"][1]
        layer["class_name"] = {2: "TFOpLambda", 3: "TrueDivide"}[keras]
        layer["config"] = {"name": layer["name"]} | ({"function": function} if keras == 2 else {})
        node = layer["inbound_nodes"][0]
        node[0][3].update(y=value) if keras == 2 else node["args"].append(value)
        return write(tmp_path / f"model.{form}", described=described)

    path = saved("math.truediv", 127.5)
    refused(path, "lambda_34", "give 127.5")
    refused(path, "give 127.5", divisor=255)
    read_weights(path, MODEL, divisor=127.5)
    refused(saved("math.truediv", None), "does not say by what")
    if keras == 2:
        refused(saved("math.subtract", 1.0), "lambda_34 is math.subtract")


def test_a_second_scaling_is_refused(tmp_path):
    layers = network(3)
    layers.insert(2, ["Lambda", "again", [layers[1][1]], {}, None])
    layers[3][2] = ["again"]
    refused(write(tmp_path / "model.keras", layers), "again (Lambda) scales the pixels again")


def test_the_divisor_must_be_given_if_the_network_divides_nothing(tmp_path):
    layers = network(3)
    del layers[1]
    layers[1][2] = ["input_1"]
    path = write(tmp_path / "model.keras", layers)
    refused(path, "none of its layers divides the pixels", "divisor 255")
    read_weights(path, MODEL, divisor=255)


def test_a_function_in_the_middle_is_refused_and_none_is_unpickled(tmp_path, monkeypatch):
    def loads(*_):
        raise AssertionError("a function was read")

    monkeypatch.setattr("marshal.loads", loads)
    read_weights(write(tmp_path / "model.keras"), MODEL)
    layers = network(3)
    middle = ["Lambda", "lambda_90", [layers[3][1]], {}, None]
    layers.insert(4, middle)
    layers[5][2] = ["lambda_90"]
    refused(write(tmp_path / "model.keras", layers), "lambda_90")


def test_a_model_that_is_not_functional(tmp_path):
    described = {"class_name": "MyModel", "config": {"name": "my_model"}}
    refused(write(tmp_path / "model.keras", described=described), "MyModel does not say")


# Hostile and damaged files.


def first(group):
    """The group and the name of an array, in any format."""
    layer = group["conv2d" if "conv2d" in group else "conv2d_34"]
    if "vars" in layer:
        return layer["vars"], "0"
    return layer["conv2d_34"], next(name for name in layer["conv2d_34"] if "kernel" in name)


def replaced(make):
    """A change that replaces an array by what `make(group, name, array)` makes of it."""

    def change(group):
        group, name = first(group)
        array = group[name][...]
        del group[name]
        make(group, name, array)

    return change


def external_link(group, name, array):
    group[name] = h5py.ExternalLink("/etc/other.h5", "/secret")


def soft_link(group, name, array):
    group[name] = h5py.SoftLink(f"{group.name}/other")
    group["other"] = array


def external_storage(group, name, array):
    group.create_dataset(
        name, array.shape, np.float32, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    )


def compressed(group, name, array):
    group.create_dataset(name, data=array, compression="gzip")


def virtual(group, name, array):
    layout = h5py.VirtualLayout(array.shape, np.float32)
    layout[...] = h5py.VirtualSource("/etc/other.h5", "x", array.shape, np.float32)
    group.create_virtual_dataset(name, layout)


def never_written(group, name, array):
    group.create_dataset(name, array.shape, np.float32)


def huge(group, name, array):
    group.create_dataset(name, (2**40, 3), np.float32)


def a_group(group, name, array):
    group.create_group(name)


def big_endian(group, name, array):
    group[name] = array.astype(">f4")


HOSTILE = [external_link, soft_link, external_storage, compressed, virtual, never_written, huge]


@pytest.mark.parametrize("make", [*HOSTILE, a_group, big_endian])
def test_arrays_that_keras_does_not_write(path, make):
    file = write(path, change=replaced(make))
    read_weights(write(path.with_name("sound." + path.name.split(".", 1)[1])), MODEL)
    tracemalloc.start()
    refused(file)
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


def test_external_links_to_layers_are_not_followed(path, tmp_path):
    other = write(tmp_path / "other.old.h5")

    def link(group):
        name = "conv2d_1" if "conv2d_1" in group else "conv2d_35"
        del group[name]
        group[name] = h5py.ExternalLink(str(other), "conv2d_35")

    refused(write(path, change=link), "has links to other files")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04 no zip", b"\x89HDF\r\n\x1a\n", b"x" * 99]
)
def test_other_files(tmp_path, content):
    (tmp_path / "model.keras").write_bytes(content)
    refused(tmp_path / "model.keras")


def test_truncated_files(path):
    content = write(path).read_bytes()
    for size in range(0, len(content) - 1, len(content) // 20):
        path.write_bytes(content[:size])
        refused(path)


def test_files_of_newer_hdf5(tmp_path):
    with h5py.File(tmp_path / "model.weights.h5", "w", libver="latest") as file:
        write_layers(file, network(3), draw())
    refused(tmp_path / "model.weights.h5", "a version that Keras does not write")


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "model.keras")


def archive(file, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file


def test_wrong_zips(tmp_path):
    file, description = tmp_path / "model.keras", json.dumps(config(network(3)))
    refused(archive(file, {}), "config.json")
    refused(archive(file, {"config.json": description}), "model.weights.h5")
    for text in ("", "[]", "7", "[" * 100_000, '{"config": {"layers": [{}]}}'):
        refused(archive(file, {"config.json": text, "model.weights.h5": b""}))


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_members_that_are_larger_than_their_zip(tmp_path, name):
    members = {"config.json": json.dumps(config(network(3))), "model.weights.h5": b""}
    members[name] = bytes(10**8)
    file = archive(tmp_path / "model.keras", members, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refused(file, "larger than")
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


def test_a_file_that_is_too_large_for_the_network(tmp_path):
    file = write(tmp_path / "model.weights.h5")
    with file.open("r+b") as stream:
        stream.truncate(2**40)  # sparse
    refused(file, "too large for this network")


def test_circles_end(tmp_path):
    """A B-tree whose child is itself; an object of size -16 in a heap, where HDF5 hangs."""
    content = write(tmp_path / "model.old.h5").read_bytes()
    tree, heap = content.index(b"TREE"), content.index(b"GCOL")
    child = struct.pack("<Q", tree)
    circle = content[: tree + 5] + b"\x07" + content[tree + 6 : tree + 32] + child
    circle += content[tree + 40 :]
    endless = content[: heap + 24] + struct.pack("<Q", 2**64 - 16) + content[heap + 32 :]
    for damaged in (circle, endless):
        (tmp_path / "model.old.h5").write_bytes(damaged)
        refused(tmp_path / "model.old.h5")


def test_time_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_file, "STEPS", 500)
    refused(write(tmp_path / "model.weights.h5"), "its structure is too large")


# The program.


def test_the_program_writes_a_model(tmp_path, capsys):
    file, out = write(tmp_path / "model.keras"), tmp_path / "out"
    flags = [str(file), "--out", str(out), "--image-size", "32", "64", "--features", "4", "5", "6"]
    assert import_keras.main(flags) == 0
    assert str(out) in capsys.readouterr().out
    trained = runs.load_model(out)
    assert (trained.settings.recipe, trained.settings.size) == ("article", (32, 64))
    assert trained.model.features == MODEL.features and trained.mask_format is None
    expected = flatten_dict(read_weights(file, MODEL))
    for name, array in flatten_dict(trained.variables).items():
        np.testing.assert_allclose(array, expected[name], rtol=2**-11)
    # train --init accepts it
    settings = runs.Settings("article", init=out, features=MODEL.features, image_size=32)
    recipe = runs.recipe_of(settings)
    training = runs.build(settings, recipe, 8)
    state = runs.create_state(settings, recipe, training, jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal, state.variables["params"], trained.variables["params"]
    )
    assert import_keras.main(flags) == 1
    assert "exists" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    flags[2] = str(tmp_path / "run")
    assert import_keras.main(flags) == 1 and "is the workdir of a run" in capsys.readouterr().err


def test_the_program_says_what_does_not_match(tmp_path, capsys):
    file = write(tmp_path / "model.keras")
    assert import_keras.main([str(file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "conv2d_transpose_34" in error and "pool2" in error
    assert not (tmp_path / "out").exists()


# Keras itself.


@pytest.mark.parametrize("form", ["keras", "weights.h5", "h5"])
@pytest.mark.parametrize("features", [(8, 12, 16), ARTICLE.features], ids=["small", "tutorial"])
def test_keras_itself(tmp_path, form, features):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    article_keras = runpy.run_path(str(GOLDEN / "make_keras_golden.py"))["article_keras"]
    keras_model, rng = article_keras(features), np.random.default_rng(0)
    for weight in keras_model.weights:
        if weight.name in ("kernel", "bias"):
            fan_in = np.prod(weight.shape[:-1]) if weight.name == "kernel" else 100
            weight.assign(rng.normal(0, np.sqrt(2 / fan_in), weight.shape).astype(np.float32))
    image = rng.integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    file = tmp_path / f"model.{form}"
    (keras_model.save_weights if form == "weights.h5" else keras_model.save)(file)
    expected = np.asarray(keras_model(image.astype(np.float32), training=False))
    model = UNet(features=features, norm=None)
    logits = jax.jit(model.apply)(read_weights(file, model), image / np.float32(255))
    proba = jax.nn.sigmoid(logits)
    np.testing.assert_allclose(proba, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3
