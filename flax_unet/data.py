"""Data sets: pictures decoded and resized once into arrays, then served in batches.

A source is a sequence of dicts `{"name": str, "image": bytes, "mask": bytes}`, encoded in any
format that Pillow reads or as `.npy`: a split of `tfds_kvasir.sources`, or a `FolderSource`. If an
entry also has `files`, the paths of image and mask, error messages name those. A mask in separate
files (see `formats.MaskFormat`) is a sequence of pairs of a class index and bytes.
"""

import contextlib
import hashlib
import io
import json
import os
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL
from jax.sharding import Mesh
from PIL import Image

from flax_unet import classes, devices, formats, images, processes, summary
from flax_unet.folders import SPLITS as SPLITS
from flax_unet.folders import FolderSource as FolderSource
from flax_unet.folders import list_pictures as list_pictures
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.parallel import map_all
from flax_unet.pictures import (
    DataError,
    name_of,
    open_content,
    open_picture,
    resize_mask,
    size_of,
)
from flax_unet.summary import Facts


class Arrays(NamedTuple):
    """A data set in memory.

    Attributes:
        image: [N, H, W, C], uint8 or float32 in [0, 1]; a NumPy array, or on a device (see
            `to_device`).
        mask: uint8 [N, H, W, 1] of 0 and 1 or of class indices, and `classes.IGNORE`; or
            [N, H, W, K] of 0 and 1 for overlapping classes; likewise.
        name: N names.
        fingerprint: the source's, see the function `fingerprint`.
        mask_format: what the values of the mask files meant.
        facts: what each mask held at its own size, for a summary; N, or none.
        image_format: channels and range of the pictures.
        decoded: whether the masks were read by `mask_format`: 255 can only mean that a pixel does
            not count.
    """

    image: np.ndarray | jax.Array
    mask: np.ndarray | jax.Array
    name: list[str]
    fingerprint: str
    mask_format: MaskFormat = formats.BINARY
    facts: Sequence[Facts] = ()
    image_format: ImageFormat = images.RGB
    decoded: bool = False


def decode_pair(
    example: dict[str, Any],
    mask_format: MaskFormat,
    image_format: ImageFormat,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode an entry of a source.

    Args:
        example: the entry.
        mask_format, image_format: what its values mean.
        size: height and width to which the image, but not the mask, is resized, if given.

    Returns:
        The image [H, W, C], uint8 or float32 in [0, 1], and the mask, uint8 [H, W, 1] of class
        indices, or [H, W, K] of 0 and 1 for overlapping classes.

    Raises:
        DataError: one of them is unusable, or their sizes or EXIF orientations differ.
    """
    if mask_format.separate == isinstance(example["mask"], bytes):
        layout = "one mask file" if mask_format.separate else "separate mask files"
        raise DataError(
            f"{example['name']} has {layout}, and the format is another: see --mask-files"
        )
    masks = formats.files_of(example)
    name = name_of(example)
    picture = open_content(example["image"], name)
    image = images.read(picture, image_format, name, size)
    orientation = picture.info["orientation"] if isinstance(picture, Image.Image) else 1
    opened = [(index, open_picture(data, file), file) for index, data, file in masks]
    for _, mask, file in opened:
        _check_pair(size_of(picture), orientation, name, mask, file)
    if mask_format.separate:
        return image, formats.read_separate(opened, mask_format)
    ((_, mask, file),) = opened
    return image, formats.read(mask, mask_format, file)[..., None]


def encode_pair(
    name: str, image: np.ndarray, mask: np.ndarray, *, separate: bool
) -> dict[str, Any]:
    """An entry of a source, of an image and a mask as `decode_pair` returns them, as `.npy`.

    Args:
        name: of the entry.
        image: uint8 or float32 [H, W, C].
        mask: uint8 [H, W, 1], or [H, W, K] of overlapping classes. Of its values
            `formats.of_indices` is the format.
        separate: whether the mask has a file for each class, as overlapping ones do.
    """
    masks = [(k + 1, _encode(mask[..., k])) for k in range(mask.shape[-1])]
    return {"name": name, "image": _encode(image), "mask": masks if separate else masks[0][1]}


def _encode(array: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def _check_pair(
    size: tuple[int, ...], orientation: int, name: str, mask: Image.Image, file: str
) -> None:
    if size != mask.size:
        raise DataError(
            f"{name} is {size[0]}x{size[1]} but {file} is {mask.width}x{mask.height}: make them "
            "the same size"
        )
    turns = orientation, mask.info["orientation"]
    quarter = (turns[0] > 4) != (turns[1] > 4)
    if turns[0] != turns[1] and not (quarter and size[0] != size[1]):
        raise DataError(
            f"{name} has the EXIF orientation {turns[0]} and {file} {turns[1]}, so it is not clear "
            "how they belong together: save both upright"
        )


def fingerprint(source: Sequence[dict[str, Any]], pictures: dict[bytes, str] | None = None) -> str:
    """SHA-256 of the names and encoded bytes of a source, in order.

    Of several processes the first one reads them.

    Args:
        source: see above.
        pictures: if given, the SHA-256 of each image is added, and its name.
    """

    def read() -> tuple[str, dict[bytes, str] | None]:
        return _fingerprint(source, pictures), pictures

    digest, found = processes.first(read)
    if pictures is not None and found is not None:
        pictures.update(found)
    return digest


def _fingerprint(source: Sequence[dict[str, Any]], pictures: dict[bytes, str] | None) -> str:
    digest = hashlib.sha256()
    for i in range(len(source)):
        example = source[i]
        masks = example["mask"]
        if not isinstance(masks, bytes):
            masks = b"".join(b"%d:%d:%b" % (index, len(part), part) for index, part in masks)
        for part in (example["name"].encode(), example["image"], masks):
            digest.update(len(part).to_bytes(8, "little") + part)
        if pictures is not None:
            pictures[hashlib.sha256(example["image"]).digest()] = example["name"]
    return digest.hexdigest()


def load(
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int],
    mask_format: MaskFormat | None = None,
    image_format: ImageFormat | None = None,
    *,
    cache: str | os.PathLike | None = None,
    pictures: dict[bytes, str] | None = None,
) -> Arrays:
    """Decode and resize an entire source on all cores, or read the result of an earlier call.

    Args:
        source: a sequence of `{"name", "image", "mask"}`.
        size: height and width of the arrays.
        mask_format: what the values of the masks mean; by default found from this source, which
            takes about as long again.
        image_format: channels and range of the images; by default found from this source, see
            `images.find`.
        cache: a folder for the results. File names have hashes of the source's content and of the
            formats, the size, and the version of Pillow, whose decoders differ. If a file cannot be
            written, a warning is issued.
        pictures: see `fingerprint`.

    Raises:
        DataError: the source is empty, or an entry is unusable.
    """
    if not len(source):
        raise DataError("the source has no examples: check the folder or the split")
    size = (size, size) if isinstance(size, int) else size
    content, file, stored = fingerprint(source, pictures), None, None
    mask_format = mask_format or formats.find(source)
    image_format = image_format or images.find(source)
    if cache is not None:
        # "4" is the version of our decoding and resizing: bump it when they change.
        meaning = hashlib.sha256(repr((mask_format, image_format)).encode()).hexdigest()[:8]
        key = f"4-{content[:32]}-{meaning}-{size[0]}x{size[1]}-pillow{PIL.__version__}"
        file = Path(cache).expanduser() / f"{key}.npz"
        try:
            with zipfile.ZipFile(file) as archive, np.load(file) as content_of:
                names = content_of["name"].tolist()
                known = [Facts(*each) for each in json.loads(str(content_of["facts"]))]
                both = content_of["image"], content_of["mask"]
                # NumPy compares no checksum if the shape that it reads is too small.
                if archive.testzip() is None and len(names) == len(source):
                    stored = Arrays(*both, names, content, mask_format, known, image_format, True)
        except Exception:  # missing, or damaged, of which zipfile and NumPy raise a dozen kinds
            pass  # decode again
    if all(processes.each(lambda: stored is not None)):
        return stored  # type: ignore[return-value]

    def decode(i: int) -> tuple[np.ndarray, np.ndarray, str, Facts]:
        image, resized, name, mask = decode_resized(source, i, size, mask_format, image_format)
        return image, resized, name, summary.facts(mask, resized)

    resized, masks, names, known = zip(*map_all(decode, range(len(source))), strict=True)
    stacked = np.stack(resized), np.stack(masks)
    arrays = Arrays(*stacked, list(names), content, mask_format, known, image_format, True)
    if file is not None and processes.first_of_host():
        part = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                name, text = np.array(arrays.name), np.array(json.dumps(known))
                np.savez(stream, image=arrays.image, mask=arrays.mask, name=name, facts=text)
            part.replace(file)
        except OSError as error:
            warnings.warn(f"the decoded pictures could not be cached: {error}", stacklevel=2)
            with contextlib.suppress(OSError):
                part.unlink()
    return arrays


def decode_resized(
    source: Sequence[dict[str, Any]],
    i: int,
    size: tuple[int, int],
    mask_format: MaskFormat,
    image_format: ImageFormat,
) -> tuple[np.ndarray, np.ndarray, str, np.ndarray]:
    """Image and mask of an entry at the network's size, its name, and the mask at its own size."""
    example = source[i]
    image, mask = decode_pair(example, mask_format, image_format, size)
    return image, resize_mask(mask, size), example["name"], mask


def check(image: Any, mask: Any, *, decoded: bool = False) -> None:
    """Raise ValueError if images or masks in memory have other values than they should have.

    Args:
        image: uint8, or float in [0, 1].
        mask: see `classes.check_mask`; not one of 0 and 255, which is a common form of 0 and 1.
        decoded: whether such masks are possible, see `Arrays`.
    """
    if image.dtype != np.uint8 and not ((image >= 0) & (image <= 1)).all():
        raise ValueError(
            f"the image has type {image.dtype} and values from {image.min()} to {image.max()}: use "
            "uint8, or float in [0, 1]"
        )
    classes.check_mask(mask)
    if not decoded and mask.dtype != bool and mask.max() == (ignore := classes.IGNORE):
        if classes.largest_counted(mask) == 0:
            raise ValueError(
                f"the mask has no values but 0 and {ignore}, and {ignore} means that a pixel does "
                f"not count: use 0 and 1, as in (mask == {ignore}).astype(np.uint8)"
            )


def to_device(arrays: Arrays, mesh: Mesh | None = None) -> Arrays:
    """Copy to each device of a mesh; without one to the first.

    `batches` then yields indices, so no image moves per step.
    """
    image, mask = devices.replicate((arrays.image, arrays.mask), mesh)
    return arrays._replace(image=image, mask=mask)


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in an epoch: a permutation that depends only on the arguments."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    arrays: Arrays, batch_size: int, order: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Batches of equal shape; the last one is padded with copies of weight 0.

    Args:
        arrays: the data set.
        batch_size: images per batch.
        order: indices of the images, in order; by default all of them as they are.

    Yields:
        `image` [B, H, W, C], `mask` uint8 as in `Arrays`, `weight` float32 [B]. For arrays on a
        device: the entire `image` and `mask`, the rows `index` int32 [B], and `weight`.

    Raises:
        ValueError: the images or masks have values that no network can be trained on.
    """
    check(arrays.image, arrays.mask, decoded=arrays.decoded)
    order = np.arange(len(arrays.image)) if order is None else order
    for start in range(0, len(order), batch_size):
        index, weight = pad(order[start : start + batch_size], batch_size)
        if isinstance(arrays.image, jax.Array):
            resident = {"image": arrays.image, "mask": arrays.mask}
            yield resident | {"index": index.astype(np.int32), "weight": weight}
        else:
            yield {"image": arrays.image[index], "mask": arrays.mask[index], "weight": weight}


def pad(real: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices repeated to the batch size, and weights: 1 for the real ones, 0 for the padding."""
    return np.resize(real, batch_size), (np.arange(batch_size) < len(real)).astype(np.float32)


def stream(
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int],
    batch_size: int,
    order: np.ndarray | None = None,
    *,
    mask_format: MaskFormat,
    image_format: ImageFormat,
    mesh: Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """The batches of `batches`, decoded and resized on all cores while they are consumed.

    Meant for a source that does not fit into memory: nothing is kept. Needs grain, the extra
    `stream`.

    Args:
        source, size, mask_format, image_format: as `load` takes them.
        batch_size, order: as `batches` takes them.
        mesh: see `decoded_batches`.

    Raises:
        DataError: an entry of the source is unusable.
    """
    size = (size, size) if isinstance(size, int) else size
    formats = {"mask_format": mask_format, "image_format": image_format}
    order = np.arange(len(source)) if order is None else order
    decode = partial(decode_resized, source, size=size, **formats)
    yield from decoded_batches(decode, order, batch_size, mesh)


def decoded_batches(
    decode: Callable[[int], Sequence[Any]],
    order: np.ndarray,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """Batches of what a function makes of each index, on all cores while they are consumed.

    Args:
        decode: an index to image, mask, and perhaps more.
        order, batch_size: as `batches` takes them.
        mesh: if it has devices of several processes, each decodes those images of a batch that its
            devices get. `image` and `mask` are then on the mesh already, filled as by
            `devices.put`.
    """
    import grain

    rows = devices.rows_here(batch_size, mesh)
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if rows is None:
        here, size = order, batch_size
    else:
        filled = [np.resize(pad(part, batch_size)[0], rows.max() + 1)[rows] for part in parts]
        here, size = np.array(filled, int).ravel(), len(rows)

    def stack(examples: Sequence[Sequence[Any]]) -> list[np.ndarray]:
        index, _ = pad(np.arange(len(examples)), size)
        return [np.stack([examples[i][part] for i in index]) for part in (0, 1)]

    read_options = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=2 * size)
    decoded = grain.MapDataset.source(here.tolist()).map(decode)
    batches = decoded.to_iter_dataset(read_options).batch(size, batch_fn=stack)
    for part, (image, mask) in zip(parts, batches, strict=True):
        if rows is not None and mesh is not None:
            image, mask = (devices.join(x, batch_size, mesh) for x in (image, mask))
        yield {"image": image, "mask": mask, "weight": pad(part, batch_size)[1]}
