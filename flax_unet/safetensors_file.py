"""A trained model as weights.safetensors and model.json, for programs without JAX.

The tensors are named by their paths in the variables, with dots as in a state dict of PyTorch:
`params.down0.Conv_0.kernel`. `params` are learned; `batch_stats` are the moving averages of batch
norm. All are float32, in the layouts of Flax; the images are NHWC, in [0, 1]. For PyTorch:

- kernels of `Conv_i`, `stem` and `depthwise`, [height, width, in, out], become the weight of a
  Conv2d by `.permute(3, 2, 0, 1)`;
- kernels of `expand` and `project`, [in, out], that of a 1x1 Conv2d by `.T[:, :, None, None]`;
- kernels of `upsampleN`, `head`, `headN` and `shortcut`, [s, s, in, out], that of a ConvTranspose2d
  of stride s by `.permute(2, 3, 0, 1)`;
- `scale` and `bias` of a norm are its weight and bias, `mean` and `variance` its running_mean and
  running_var.

model.json is what `pack.save` writes: the network's attributes, as `pack.build` takes them, the
size of the images and the origin. If `about.settings.crop` is not null, the size is that of windows
over pictures that are not resized. Code for PyTorch builds the network itself. Neither file has a
checksum.
"""

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict

from flax_unet import pack


def save(folder: str | os.PathLike, packed: pack.Packed) -> None:
    """Write weights.safetensors and model.json; nothing is rounded.

    Args:
        folder: is created if it is missing. It may hold the same model as `pack.save` wrote it:
            model.json is left as it is then.
        packed: the model, with float32 variables.

    Raises:
        ValueError: a tensor is not finite, or the model cannot be described.
        TypeError: `about` is not JSON.
        FileExistsError: the folder holds a weights.safetensors, or the model.json of another model.
        ModuleNotFoundError: safetensors is not installed.
    """
    to_bytes = import_save()
    folder, tensors = Path(folder), {}
    for name, x in cast(dict[str, Any], flatten_dict(packed.variables, sep=".")).items():
        tensors[name] = np.array(x, np.float32, order="C")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} has NaN or infinity: do not export it")
    content = {
        "model": pack.describe(packed.model),
        "image_size": packed.image_size,
        "about": packed.about,
    }
    text = json.dumps(content, indent=2) + "\n"
    weights, config = folder / "weights.safetensors", folder / "model.json"
    described = _without_checksum(config) if config.exists() else None
    if weights.exists() or described not in (None, json.loads(text)):
        raise FileExistsError(f"{folder} holds another model: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (part := folder / "weights.safetensors.part").write_bytes(to_bytes(tensors))
    part.replace(weights)
    if described is None:
        (part := folder / "model.json.part").write_text(text)
        part.replace(config)


def import_save() -> Any:
    """The function `safetensors.numpy.save`.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "safetensors is not installed: pip install 'flax-unet[safetensors]'"
        ) from error
    return save


def _without_checksum(file: Path) -> Any:
    """The content of a model.json; {} if it is none."""
    try:
        content = json.loads(file.read_text())
        content.pop("checksum", None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return {}
    return content
