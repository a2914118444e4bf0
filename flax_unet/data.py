"""Pictures to arrays: decoded and resized once, kept as uint8, then dealt out in batches.

A source is a sequence of dicts `{"name": str, "image": bytes, "mask": bytes}`, encoded in any
format that Pillow reads: a split of `tfds_kvasir.sources`, or a `FolderSource`. With `files` too,
the paths of image and mask, errors name these.
"""

import contextlib
import hashlib
import io
import os
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from PIL import Image, ImageOps

#: A picture that claims more pixels than this is refused before it is decoded.
MAX_PIXELS = 100_000_000


class DataError(ValueError):
    """A picture, or a set of them, that cannot be used; the message names the file."""


class Arrays(NamedTuple):
    """A data set in memory.

    Attributes:
        image: uint8 [N, H, W, 3]; NumPy's, or on a device, see `to_device`.
        mask: uint8 [N, H, W, 1] of 0 and 1; likewise.
        name: N names.
        fingerprint: of the source it was made from, see `fingerprint`.
    """

    image: np.ndarray | jax.Array
    mask: np.ndarray | jax.Array
    name: list[str]
    fingerprint: str


def as_float(image: jax.Array) -> jax.Array:
    """An image as the networks take it: uint8 is divided by 255, float is in [0, 1] already."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    raise ValueError(f"image has type {image.dtype}: give uint8 in 0..255 or float in [0, 1]")


def open_picture(data: bytes | Path, name: str) -> Image.Image:
    """Decode a picture and turn it upright, as its EXIF orientation says.

    Args:
        data: its encoded bytes, or its file.
        name: what an error calls it.

    Raises:
        DataError: it cannot be decoded, or has more than `MAX_PIXELS` pixels.
    """
    try:
        picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if picture.width * picture.height > MAX_PIXELS:
            raise DataError(f"{picture.width} x {picture.height} pixels are too many")
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's decoders raise a dozen kinds on a broken file
        reason = "of no known format" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise DataError(f"{name}: not a picture that can be read ({reason})") from error


def to_rgb(picture: Image.Image, name: str = "picture") -> Image.Image:
    """A picture of any mode as 8-bit RGB; transparency is dropped.

    Grey of 16 bits is divided by 257, grey of floats in [0, 1] multiplied by 255.

    Raises:
        DataError: floats out of [0, 1].
    """
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float64)
        values = values / 257 if picture.mode.startswith("I") else values * 255
        if not ((values >= 0) & (values <= 255)).all():
            raise DataError(f"{name}: its grey values must be 16 bits, or floats in [0, 1]")
        picture = Image.fromarray(values.round().astype(np.uint8))
    return picture.convert("RGB")


def to_mask(picture: Image.Image, name: str = "mask") -> Image.Image:
    """A mask of {0, 1}, or of values near {0, 255} or {0, 65535}, as a picture of 0 and 255.

    Near is within an eighth, for JPEG blurs edges. The values of a palette are its indices, unless
    its colours are black and white.

    Raises:
        DataError: other values, with a list of them; or it is transparent in places.
    """
    if picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema()[0] != 255:
        raise DataError(f"{name}: a mask must be opaque, and this one has transparent pixels")
    if picture.mode == "P":
        colours = picture.convert("RGB").getcolors() or []  # None: more than 256
        black_and_white = {(0, 0, 0), (255, 255, 255)}
        if colours and {colour for _, colour in colours} <= black_and_white:
            picture = picture.convert("L")
    elif not picture.mode.startswith(("I", "F")):
        picture = picture.convert("L")
    values = np.asarray(picture)
    # Of bytes Pillow counts them, which is much quicker than to compare every pixel.
    counts = picture.histogram() if picture.mode in ("L", "P") else None
    present = np.unique(values) if counts is None else np.flatnonzero(counts)
    if np.isin(present, (0, 1)).all():
        least = 1
    else:
        full = 255 if present.max() <= 255 else 65535
        least = full - full // 8
        strange = present[~(present >= least) & ~((present >= 0) & (present <= full // 8))]
        if strange.size or present.max() < least:
            listed = (strange if strange.size else present)[:8]
            raise DataError(
                f"{name}: a mask must have the values 0 and 1, or values near 0 and 255, and this "
                f"one has {', '.join(map(str, listed))}: write one of 0 and 255 for what is to be "
                "found"
            )
    positive = values >= least
    return Image.fromarray(np.where(positive, np.uint8(255), np.uint8(0)))


def resize_image(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize an RGB picture, antialiased, to (height, width): uint8 [H, W, 3]."""
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask of 0 and 255 to (height, width): uint8 [H, W, 1].

    A pixel is 1 where at least half of its area is.
    """
    share = np.asarray(mask.resize((size[1], size[0]), Image.Resampling.BOX))
    return (share > 127).astype(np.uint8)[..., None]


def decode_pair(example: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """The RGB image and the mask of 0 and 255 of an entry of a source.

    Raises:
        DataError: one cannot be read, or their sizes differ.
    """
    name = example["name"]
    files = example.get("files", (f"image {name}", f"mask {name}"))
    image = to_rgb(open_picture(example["image"], files[0]), files[0])
    mask = to_mask(open_picture(example["mask"], files[1]), files[1])
    if image.size != mask.size:
        raise DataError(f"{files[0]} is {image.size} pixels and its mask {mask.size}")
    return image, mask


def fingerprint(source: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the names and encoded bytes of a source, in order."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        example = source[i]
        for part in (example["name"].encode(), example["image"], example["mask"]):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def load(
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int],
    *,
    cache: str | os.PathLike | None = None,
) -> Arrays:
    """Decode and resize a whole source, on all cores, or read the result of an earlier call.

    Args:
        source: a sequence of `{"name", "image", "mask"}`.
        size: the height and width of the arrays.
        cache: a folder for the results; a file in it is named for the source's content, the size
            and the version of Pillow, whose decoders differ. One that cannot be written is only
            warned about.

    Raises:
        DataError: the source is empty, or an entry of it cannot be used.
    """
    if not len(source):
        raise DataError("the data set is empty")
    size = (size, size) if isinstance(size, int) else size
    content, file = fingerprint(source), None
    if cache is not None:
        # The 1 counts our own ways to decode and resize.
        key = f"1-{content[:32]}-{size[0]}x{size[1]}-pillow{PIL.__version__}"
        file = Path(cache).expanduser() / f"{key}.npz"
        try:
            with file.open("rb") as stream, np.load(stream) as stored:
                return Arrays(stored["image"], stored["mask"], stored["name"].tolist(), content)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            pass  # not there, or damaged: it is made (anew)

    decode = partial(_decode, source, size=size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images, masks, names = zip(*pool.map(decode, range(len(source))), strict=True)
    arrays = Arrays(np.stack(images), np.stack(masks), list(names), content)
    if file is not None:
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                np.savez(stream, image=arrays.image, mask=arrays.mask, name=np.array(arrays.name))
            part.replace(file)
        except OSError as error:
            warnings.warn(f"the decoded pictures are not kept for next time: {error}", stacklevel=2)
            with contextlib.suppress(OSError):
                part.unlink()
    return arrays


def _decode(
    source: Sequence[dict[str, Any]], i: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, str]:
    example = source[i]
    image, mask = decode_pair(example)
    return resize_image(image, size), resize_mask(mask, size), example["name"]


SPLITS = ("train", "validation", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class FolderSource(Sequence):
    """Pairs of pictures with the same stem in two folders, sorted by stem.

    Args:
        images, masks: the folders.
        split: `train`, `validation`, `test`: about 80, 10 and 10 % of the pairs, chosen by a hash
            of the stem, so that a picture stays in its split when others come; None for all.

    Raises:
        DataError: an image has no mask or two, or there are no images.
    """

    def __init__(
        self, images: str | os.PathLike, masks: str | os.PathLike, split: str | None = None
    ):
        image, mask = _by_stem(Path(images)), _by_stem(Path(masks))
        if odd := sorted(image.keys() ^ mask.keys()):
            raise DataError(
                f"{odd[0]!r} is only in {images if odd[0] in image else masks}: each image needs "
                f"a mask with the same stem, and {len(odd)} of the stems are only in one folder"
            )
        if not image:
            raise DataError(f"{images} has no pictures ({', '.join(SUFFIXES)})")
        if split is not None and split not in SPLITS:
            raise DataError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
        stems = [stem for stem in sorted(image) if split in (None, _split_of(stem))]
        self._pairs = [(stem, image[stem], mask[stem]) for stem in stems]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: int) -> dict[str, Any]:  # type: ignore[override]
        name, *files = self._pairs[i]
        image, mask = (file.read_bytes() for file in files)
        return {"name": name, "image": image, "mask": mask, "files": [str(file) for file in files]}


def list_pictures(folder: str | os.PathLike) -> list[Path]:
    """The pictures in a folder by their suffix, sorted; hidden files and subfolders are left out.

    Raises:
        DataError: it is not a folder.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder")
    return [
        file
        for file in sorted(Path(folder).iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in list_pictures(folder):
        # macOS and Linux write an accent differently.
        stem = unicodedata.normalize("NFC", file.stem)
        if stem in found:
            raise DataError(f"{found[stem]} and {file.name} have one stem: keep one")
        found[stem] = file
    return found


def _split_of(stem: str) -> str:
    share = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def to_device(arrays: Arrays) -> Arrays:
    """The same on the first device: `batches` then deals out indices, and no picture travels."""
    return arrays._replace(image=jax.device_put(arrays.image), mask=jax.device_put(arrays.mask))


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in an epoch: a permutation that depends on the arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    arrays: Arrays, batch_size: int, order: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Deal out batches of one shape; the last is filled with copies of weight 0.

    Args:
        arrays: the data set.
        batch_size: images a batch.
        order: indices of the images, in the order wanted; by default all as they stand.

    Yields:
        `image` uint8 [B, H, W, 3], `mask` uint8 [B, H, W, 1], `weight` float32 [B]; of arrays on a
        device, all of `image` and `mask`, and which of them are meant: `index` int32 [B].
    """
    order = np.arange(len(arrays.image)) if order is None else order
    for start in range(0, len(order), batch_size):
        index, weight = _filled(order[start : start + batch_size], batch_size)
        if isinstance(arrays.image, jax.Array):
            whole = {"image": arrays.image, "mask": arrays.mask}
            yield whole | {"index": index.astype(np.int32), "weight": weight}
        else:
            yield {"image": arrays.image[index], "mask": arrays.mask[index], "weight": weight}


def _filled(real: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices repeated to the size of a batch, and weights: 1 for the real ones, 0 for the rest."""
    return np.resize(real, batch_size), (np.arange(batch_size) < len(real)).astype(np.float32)


def stream(
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int],
    batch_size: int,
    order: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
    """The batches of `batches`, decoded and resized on all cores while they are dealt out.

    For a source that is too large for the device and for memory: nothing of it is kept. Needs
    grain, the extra `stream`.

    Args:
        source, size: as `load` takes them.
        batch_size, order: as `batches` takes them.

    Raises:
        DataError: an entry of the source cannot be used.
    """
    import grain

    order = np.arange(len(source)) if order is None else order
    size = (size, size) if isinstance(size, int) else size

    def together(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> dict[str, np.ndarray]:
        index, weight = _filled(np.arange(len(pairs)), batch_size)
        images, masks, _ = zip(*(pairs[i] for i in index), strict=True)
        return {"image": np.stack(images), "mask": np.stack(masks), "weight": weight}

    ahead = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=2 * batch_size)
    decoded = grain.MapDataset.source(order.tolist()).map(partial(_decode, source, size=size))
    yield from decoded.to_iter_dataset(ahead).batch(batch_size, batch_fn=together)
