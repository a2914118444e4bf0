"""A trained model as one StableHLO file, which jax alone loads, on a CPU, GPU or TPU.

    file.write_bytes(to_stablehlo(model, variables, raw=True))
    proba = jax.export.deserialize(bytearray(file.read_bytes())).call(image)

The file holds the forms of all three platforms (see `flax_unet.cpu`), of which XLA keeps one. It
loads on the version of jax that wrote it and on later ones. Both sides need flatbuffers, which jax
does not install.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_unet import classes
from flax_unet.model import accepted
from flax_unet.pictures import as_float

PLATFORMS = "cpu", "cuda", "tpu"


def to_stablehlo(model: Any, variables: Any, *, channels: int = 3, raw: bool = False) -> bytes:
    """Probabilities [B, H, W, K] of an image [B, H, W, C], as a serialised `jax.export.Exported`.

    Batch, height and width are free; the latter two are multiples of the model's stride.

    Args:
        model: has a `stride`.
        variables: what `model.apply` takes.
        channels: of the images.
        raw: whether the image is uint8, instead of float32 in [0, 1].

    Raises:
        ModuleNotFoundError: flatbuffers is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
        from jax import export
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "flatbuffers is not installed: pip install 'flax-unet[stablehlo]'"
        ) from error

    def proba(image: jax.Array) -> jax.Array:
        logits = model.apply(variables, as_float(image), **accepted(model, train=False))
        return classes.probabilities(logits, overlapping=classes.is_overlapping(model))

    batch, height, width = export.symbolic_shape(f"b, {model.stride}*h, {model.stride}*w")
    pixels = jnp.uint8 if raw else jnp.float32
    image = jax.ShapeDtypeStruct((batch, height, width, channels), pixels)
    return bytes(export.export(jax.jit(proba), platforms=PLATFORMS)(image).serialize())
