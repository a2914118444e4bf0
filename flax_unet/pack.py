"""A trained model as a folder to ship: model.json and weights.npz."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_unet.efficientnet import Encoder
from flax_unet.model import UNet

#: Attributes of a `UNet` that determine what it computes.
ATTRIBUTES = {f.name for f in dataclasses.fields(UNet)} - {"parent", "name", "remat"}


class Packed(NamedTuple):
    """The result of `load`."""

    model: UNet
    variables: dict[str, Any]
    image_size: int | tuple[int, int]  # height and width of the images that it was trained on
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
        ValueError: an attribute is unknown.
    """
    attributes = _upgrade(described)
    if unknown := attributes.keys() - ATTRIBUTES:
        raise ValueError(f"a UNet has no {', '.join(sorted(unknown))}: a newer flax-unet may have")
    attributes["dtype"] = jnp.dtype(attributes.get("dtype", "float32"))
    if (encoder := attributes.get("encoder")) is not None:
        attributes["encoder"] = Encoder(encoder["variant"], dtype=jnp.dtype(encoder["dtype"]))
    return UNet(**attributes)


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


def save(folder: str | os.PathLike, packed: Packed) -> None:
    """Write a model; kernels are rounded to float16, the few other arrays are float32.

    Raises:
        ValueError: a kernel is not finite in float16, or the model cannot be described.
        FileExistsError: the folder already holds a model.
    """
    folder, arrays = Path(folder), {}
    content = {
        "model": describe(packed.model),
        "image_size": packed.image_size,
        "about": packed.about,
    }
    by_name = cast(dict[str, Any], flatten_dict(packed.variables, sep="/"))
    for name, x in by_name.items():
        with np.errstate(over="ignore"):
            arrays[name] = np.asarray(x, np.float16 if np.ndim(x) > 1 else np.float32)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(
                f"{name} has NaN, infinity or values beyond {arrays[name].dtype}: do not export it"
            )
    file = folder / "model.json"
    if file.exists():
        raise FileExistsError(f"{file} exists: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "weights.npz", **arrays)
    file.write_text(json.dumps(content, indent=2) + "\n")


def load(folder: str | os.PathLike) -> Packed:
    """The model that `save` wrote, in float32.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "model.json").read_text())
        with np.load(folder / "weights.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name].astype(np.float32) for name in stored.files}
        model, variables = build(content["model"]), unflatten_dict(arrays, sep="/")
        size = content["image_size"]
        size = tuple(size) if isinstance(size, list) else int(size)
        return Packed(model, variables, size, content["about"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing: there is no model here") from error
    except Exception as error:  # zip, NumPy and JSON raise a dozen kinds
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error
