"""A trained model as a folder to ship: model.json and weights.npz."""

import dataclasses
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_unet.efficientnet import Encoder, Variant
from flax_unet.model import UNet, variable_shapes

#: Attributes of a `UNet` that determine what it computes.
ATTRIBUTES = {f.name for f in dataclasses.fields(UNet)} - {"parent", "name", "remat"}


#: Largest values that `build` accepts, so that a damaged or hostile file cannot fill the memory.
MOST = {"features": 2**14, "convs": 16, "patch": 64, "num_classes": 2**14}
LARGEST_SIDE = 2**13  # of images, in pixels


class Packed(NamedTuple):
    """The result of `load`."""

    model: UNet
    variables: dict[str, Any]
    # Height and width of the images that it was trained on: resized pictures, or crops, of which
    # `runs.Trained.predictor` knows.
    image_size: int | tuple[int, int]
    about: dict[str, Any]  # its origin


def describe(model: nn.Module) -> dict[str, Any]:
    """The attributes of a network as JSON.

    Raises:
        ValueError: it is not a `UNet`, or its encoder not an `Encoder`: `build` could not make it.
    """
    encoder = getattr(model, "encoder", None)
    for module, known in ((model, UNet), (encoder, Encoder)):
        if module is not None and type(module) is not known:
            raise ValueError(
                f"{type(module).__name__} cannot be described, only {known.__name__} can: build "
                "your module yourself and save its variables"
            )
    attributes = {name: getattr(model, name) for name in sorted(ATTRIBUTES)}
    attributes["dtype"] = jnp.dtype(attributes["dtype"]).name
    if encoder is not None:
        dtype = jnp.dtype(encoder.dtype).name
        attributes["encoder"] = {"variant": encoder.variant, "dtype": dtype}
    return attributes


def build(described: dict[str, Any]) -> UNet:
    """The network that `describe` described; missing attributes have their defaults.

    Raises:
        ValueError: an attribute is unknown, or out of range.
    """
    attributes = _upgrade(described)
    if unknown := attributes.keys() - ATTRIBUTES:
        raise ValueError(f"a UNet has no {', '.join(sorted(unknown))}: a newer flax-unet may have")
    for name, most in MOST.items():
        value = attributes.get(name, 1)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not 1 <= len(numbers) <= 16 or not all(
            type(number) is int and 1 <= number <= most for number in numbers
        ):
            raise ValueError(f"{name} is {str(value)[:60]}: it must be from 1 to {most}")
    attributes["dtype"] = _float(attributes.get("dtype", "float32"))
    if (encoder := attributes.get("encoder")) is not None:
        if encoder["variant"] not in get_args(Variant):
            raise ValueError(f"there is no encoder {encoder['variant']!r}")
        attributes["encoder"] = Encoder(encoder["variant"], dtype=_float(encoder["dtype"]))
    return UNet(**attributes)


def _float(name: str) -> Any:
    if not jnp.issubdtype(dtype := jnp.dtype(name), jnp.floating):
        raise ValueError(f"dtype is {name}: it must be a floating-point type")
    return dtype


def _upgrade(described: dict[str, Any]) -> dict[str, Any]:
    """Convert a description by version 0.1.0, which had two attributes for the norm."""
    attributes = dict(described)
    batch_norm, group_size = attributes.pop("batch_norm", None), attributes.pop("group_size", 1)
    if not {"batch_norm", "group_size"}.isdisjoint(described):
        attributes["norm"] = (
            "batch" if batch_norm else "instance" if group_size == 1 else group_size
        )
    if isinstance(encoder := attributes.get("encoder"), str):
        dtype = attributes.get("dtype", "float32")
        attributes |= {"patch": 1, "encoder": {"variant": encoder, "dtype": dtype}}
    return attributes


def save(
    folder: str | os.PathLike, packed: Packed, *, kernels: type[np.floating] = np.float16
) -> None:
    """Write a model; kernels are rounded to float16, the few other arrays are float32.

    Args:
        folder: to create.
        packed: the model.
        kernels: their type in the file; np.float32 rounds nothing, in twice the space.

    Raises:
        ValueError: a kernel is not finite in its type, the model cannot be described, or its image
            size cannot be loaded again.
        TypeError: `about` is not JSON.
        FileExistsError: the folder has a model.json or a weights.npz.
    """
    folder, arrays = Path(folder), {}
    content = {
        "model": describe(packed.model),
        "image_size": _size(packed.image_size, packed.model),
        "about": packed.about,
    }
    by_name = cast(dict[str, Any], flatten_dict(packed.variables, sep="/"))
    for name, x in by_name.items():
        with np.errstate(over="ignore"):
            arrays[name] = np.asarray(x, kernels if np.ndim(x) > 1 else np.float32)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(
                f"{name} has NaN, infinity or values beyond {arrays[name].dtype}: do not export it"
            )
    weights, file = folder / "weights.npz", folder / "model.json"
    for each in (file, weights):
        if each.exists():
            raise FileExistsError(f"{each} exists: choose another folder")
    text = json.dumps(content | {"checksum": _checksum(content, arrays)}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(part := folder / "weights.part.npz", **arrays)
    part.replace(weights)
    (part := folder / "model.json.part").write_text(text)
    part.replace(file)  # last: a folder with this file is whole


def _checksum(content: dict[str, Any], arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 of a model: model.json without its checksum, and the arrays by name."""
    value = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name in sorted(arrays):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(
            np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data, value
        )
    return value


def load(folder: str | os.PathLike) -> Packed:
    """The model that `save` wrote, in float32.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another version, or not what `save` wrote: an array is
            missing, not finite, or of another shape or type.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "model.json").read_text())
        model = build(content["model"])
        size = _size(content["image_size"], model)
        arrays = _read_arrays(folder / "weights.npz", model)
        checksum = content.pop("checksum", None)  # before version 0.3.0 there was none
        if checksum not in (None, _checksum(content, arrays)):
            raise ValueError("model.json and weights.npz are not what was saved (checksum)")
        floats = {name: array.astype(np.float32) for name, array in arrays.items()}
        return Packed(model, unflatten_dict(floats, sep="/"), size, content["about"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing: there is no model here") from error
    except Exception as error:  # zip, NumPy and JSON raise a dozen kinds
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error


def _size(size: Any, model: UNet) -> int | tuple[int, int]:
    """The image size of a model.json, read or to be written."""
    sides = size if isinstance(size, list | tuple) else [size]
    if len(sides) not in (1, 2) or not all(
        type(side) is int and 1 <= side <= LARGEST_SIDE and side % model.stride == 0
        for side in sides
    ):
        raise ValueError(
            f"image_size is {str(size)[:60]}: it must be a multiple of {model.stride}, up to "
            f"{LARGEST_SIDE}"
        )
    return cast(Any, tuple(size) if isinstance(size, list) else size)


def _read_arrays(file: Path, model: UNet) -> dict[str, np.ndarray]:
    """The arrays in a weights.npz; nothing is allocated for one that the model does not have."""
    with zipfile.ZipFile(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        found = {name: _shape(archive, member) for name, member in members.items()}
        expected = _shapes(model, found)
        for words, names in (
            ("is missing", expected.keys() - found.keys()),
            ("is not of this model", found.keys() - expected.keys()),
            ("has another shape", {n for n in expected.keys() & found if found[n] != expected[n]}),
        ):
            if names:
                raise ValueError(f"{min(names)} {words}")
        arrays = {}
        for name, member in members.items():
            with archive.open(member) as stream:  # its end verifies the CRC of the zip
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
            with np.errstate(over="ignore"):
                if not np.isfinite(arrays[name].astype(np.float32)).all():
                    raise ValueError(f"{name} has NaN or infinity")
    return arrays


def _shape(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    """The shape of an array of floats, from its header alone."""
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{member} is not an array of np.savez")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{member} has the type {str(dtype)[:20]}, not float")
    return shape


def _shapes(model: UNet, found: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's arrays, by name, for images of the channels that were found.

    The sizes that depend on the channels grow linearly with them.
    """

    one, two = variable_shapes(model, 1), variable_shapes(model, 2)
    for name in one:
        if one[name] != two[name]:
            size, more = math.prod(one[name]), math.prod(two[name]) - math.prod(one[name])
            channels = 1 + (math.prod(found.get(name, one[name])) - size) // more
            return variable_shapes(model, min(max(channels, 1), LARGEST_SIDE))
    return one
