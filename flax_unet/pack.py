"""A trained model as a folder to be shipped: model.json and weights.npz."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_unet.efficientnet import Encoder
from flax_unet.model import UNet

#: Attributes of a `UNet` that determine what it computes.
DESCRIBED = {f.name for f in dataclasses.fields(UNet)} - {"parent", "name", "remat"}


class Packed(NamedTuple):
    """What `load` returns."""

    model: UNet
    variables: dict[str, Any]
    image_size: int  # height and width of the pictures that it learned from
    about: dict[str, Any]  # where it comes from


def describe(model: UNet) -> dict[str, Any]:
    """The attributes of a network as JSON; its encoder by the name of its variant."""
    found = {name: getattr(model, name) for name in sorted(DESCRIBED)}
    variant = None if model.encoder is None else model.encoder.variant
    return found | {"dtype": jnp.dtype(model.dtype).name, "encoder": variant}


def build(described: dict[str, Any]) -> UNet:
    """The network that `describe` described; an attribute that is not there has its default.

    Raises:
        ValueError: it has another attribute.
    """
    if unknown := described.keys() - DESCRIBED:
        raise ValueError(f"no network has {', '.join(sorted(unknown))}")
    dtype = jnp.dtype(described.get("dtype", "float32"))
    variant = described.get("encoder")
    encoder = None if variant is None else Encoder(variant, dtype=dtype)
    return UNet(**described | {"dtype": dtype, "encoder": encoder})


def save(folder: str | os.PathLike, packed: Packed) -> None:
    """Write a model; kernels are rounded to float16, the few other numbers stay float32.

    Raises:
        ValueError: a kernel is not finite in float16.
        FileExistsError: the folder holds a model.
    """
    folder, arrays = Path(folder), {}
    by_name = cast(dict[str, Any], flatten_dict(packed.variables, sep="/"))
    for name, x in by_name.items():
        with np.errstate(over="ignore"):
            arrays[name] = np.asarray(x, np.float16 if np.ndim(x) > 1 else np.float32)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} has values that are not finite in {arrays[name].dtype}")
    file = folder / "model.json"
    if file.exists():
        raise FileExistsError(f"{file} is there: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "weights.npz", **arrays)
    said = {"model": describe(packed.model), "image_size": packed.image_size, "about": packed.about}
    file.write_text(json.dumps(said, indent=2) + "\n")


def load(folder: str | os.PathLike) -> Packed:
    """The model that `save` wrote, in float32.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    folder = Path(folder)
    try:
        said = json.loads((folder / "model.json").read_text())
        with np.load(folder / "weights.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name].astype(np.float32) for name in stored.files}
        variables = unflatten_dict(arrays, sep="/")
        return Packed(build(said["model"]), variables, int(said["image_size"]), said["about"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing: there is no model here") from error
    except Exception as error:  # zip, NumPy and JSON raise a dozen kinds
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error
