"""Pictures, masks and sizes of any kind, compared with NumPy; an error only where one is due.

Hypothesis chooses the cases; no failure reaches it, so it goes on to the given number.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from flax_unet import formats, images, pictures
from flax_unet.classes import IGNORE
from flax_unet.pictures import DataError

from .outcome import Outcome
from .pictures import encoded, saved

sides = st.integers(1, 24)
sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**32)
LOSSLESS = {"PNG": {}, "TIFF": {}, "BMP": {}, "WEBP": {"lossless": True, "exact": True}}
#: How an image with an EXIF orientation is turned upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x),
}


def explore(
    strategy: st.SearchStrategy, check: Callable[[Any], None], n: int, seed: int
) -> Outcome:
    """Check n cases of a strategy; a check itself expects the errors that are due."""
    outcome = Outcome()

    @seeded(seed)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(strategy)
    def attempt(case: Any) -> None:
        with outcome.attempt(repr(case)):
            check(case)

    attempt()
    return outcome


def filled(
    dtype: str, shape: tuple[int, ...], values: Sequence[int]
) -> st.SearchStrategy[np.ndarray]:
    """Arrays of some values: mostly one of them, which Hypothesis likes, or noise."""

    def noise(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).choice(values, shape).astype(dtype)

    return seeds.map(noise) | arrays(dtype, shape, elements=st.sampled_from(values))


# Images


@st.composite
def lossless(draw: st.DrawFn) -> tuple[np.ndarray, str, int]:
    """Values of 8 bits, a format that keeps them, and an EXIF orientation."""
    shape = (*draw(sizes), draw(st.sampled_from((1, 3))))
    kind = draw(st.sampled_from(("PNG", "TIFF", "BMP", "WEBP", "npy")))
    orientation = draw(st.integers(1, 8)) if kind in ("PNG", "TIFF") else 1
    return draw(filled("u1", shape, range(256))), kind, orientation


def check_lossless(case: tuple[np.ndarray, str, int]) -> None:
    values, kind, orientation = case
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = LOSSLESS.get(kind, {}) | ({"exif": exif} if orientation > 1 else {})
    squeezed = values[..., 0] if values.shape[2] == 1 else values
    data = saved(values) if kind == "npy" else encoded(Image.fromarray(squeezed), kind, **options)
    found = images.find([{"name": "a", "image": data}])
    channels = 3 if kind == "WEBP" else values.shape[2]  # WebP has only colours
    assert (found.channels, found.kind, found.raw) == (channels, "8 bits", True), found
    expected = UPRIGHT[orientation](values)
    for image_format in (found, images.RGB):
        image = images.read(pictures.open_content(data, "a"), image_format, "a")
        repeated = np.broadcast_to(expected, (*expected.shape[:2], image_format.channels))
        assert image.dtype == np.uint8 and np.array_equal(image, repeated), "other values"


@st.composite
def wide(draw: st.DrawFn) -> tuple[np.ndarray, str, tuple[float, ...] | None]:
    """Values of more than 8 bits, a format that keeps them, and their range if declared."""
    dtype = draw(st.sampled_from(("u2", "i2", "i4", "u4", "f4", "f8")))
    kinds = {"u2": ("PNG", "TIFF", "npy"), "i4": ("TIFF", "npy"), "f4": ("TIFF", "npy")}
    kind = draw(st.sampled_from(kinds.get(dtype, ("npy",))))
    channels = draw(st.sampled_from((1, 1, 2, 3, 5))) if kind == "npy" else 1
    values = draw(filled(dtype, (*draw(sizes), channels), range(30_000)))
    values = values / values.dtype.type(7) if dtype[0] == "f" else values
    ends = draw(st.sampled_from((None, (0.0, 1000.0), (-3.0, 1.0))))
    return values, kind, ends


def check_wide(case: tuple[np.ndarray, str, tuple[float, ...] | None]) -> None:
    values, kind, ends = case
    data = saved(values) if kind == "npy" else encoded(Image.fromarray(values[..., 0]), kind)
    exact = values.astype(np.float64)
    low, high = (np.percentile(exact, p, axis=(0, 1)) for p in (0.1, 99.9))
    try:
        found = images.find([{"name": "a", "image": data}], value_range=ends or ())
    except DataError:
        assert ends is None and (low >= high).any(), "refused, but no channel is constant"
        return
    if ends is not None:
        low, high = (np.full(values.shape[2], end) for end in ends)
    assert found.channels == values.shape[2], found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = images.read(pictures.open_content(data, "a"), found, "a")
    assert bool(caught) == ((exact > high + (high - low)).mean() > 0.5), "white without a word"
    expected = ((exact - low) / (high - low)).clip(0, 1)
    scale = np.maximum(abs(low), abs(high)) / (high - low)  # what float32 costs
    assert image.dtype == np.float32 and image.shape == values.shape, image.shape
    assert (abs(image - expected) <= 1e-6 * (1 + scale)).all(), abs(image - expected).max()


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")


@st.composite
def modes(draw: st.DrawFn) -> tuple[bytes, images.ImageFormat, tuple[int, int] | None]:
    """A picture of any mode in any format that takes it, and how it is to be read."""
    shape, mode = draw(sizes), draw(st.sampled_from(MODES))
    image = Image.fromarray(draw(filled("u1", (*shape, 4), range(256)))).convert("RGBA")
    simple = image.convert("RGB")
    picture = {
        "RGBA": lambda: image,
        "LA": lambda: image.convert("LA"),
        "PA": lambda: simple.convert("P").convert("PA"),
        "LAB": lambda: Image.merge("LAB", simple.split()),
        "I;16": lambda: simple.convert("L").convert("I;16"),
    }.get(mode, lambda: simple.convert(mode))()
    kind = draw(st.sampled_from(("PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG")))
    try:
        data = encoded(picture, kind)
    except (OSError, ValueError, KeyError):  # the format does not have the mode
        data = encoded(simple, "PNG")
    channels = draw(st.sampled_from((1, 3, 4)))
    percentiles = draw(st.sampled_from((None, (1.0, 99.0))))
    image_format = images.ImageFormat(
        channels,
        draw(st.sampled_from(("8 bits", None))),
        percentiles=percentiles,
        convert=draw(st.booleans()),
    )
    return data, image_format, draw(st.none() | sizes)


def check_modes(case: tuple[bytes, images.ImageFormat, tuple[int, int] | None]) -> None:
    data, image_format, size = case
    content = pictures.open_picture(data, "a")
    width, height = content.size
    try:
        image = images.read(content, image_format, "a", size)
    except DataError:
        converts = image_format.convert and image_format.channels == 3
        wide = content.mode.startswith(("I", "F")) and image_format.kind == "8 bits"
        assert wide or not converts, "refused, but it can be converted"
        return
    assert image.shape == (*(size or (height, width)), image_format.channels), image.shape
    assert image.dtype == (np.uint8 if image_format.raw else np.float32), image.dtype
    assert image.dtype == np.uint8 or (image.min() >= 0 and image.max() <= 1), "out of range"


@st.composite
def resizing(draw: st.DrawFn, masks: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """An image or a mask, and a size, often a whole multiple or fraction of its own."""
    height, width = draw(sizes)
    factors = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    smaller = height * factors[0], width * factors[1]
    shape, size = draw(
        st.sampled_from((((height, width), smaller), (smaller, (height, width))))
        | sizes.map(lambda other: ((height, width), other))
    )
    channels = draw(st.integers(1, 4))
    if masks:
        values = draw(st.sampled_from(((0, 1), (0, 1, 2), (0, 1, IGNORE), (3, 7, 11, 250))))
        rng = np.random.default_rng(draw(seeds))
        return rng.choice(values, (*shape, channels)).astype(np.uint8), size
    kind = draw(st.sampled_from(("random", "constant", "extreme")))
    rng = np.random.default_rng(draw(seeds))
    image = rng.integers(0, 256, (*shape, channels), np.uint8)
    if kind == "constant":
        image[:] = image[:1, :1]
    elif kind == "extreme":
        image = np.where(image > 127, np.uint8(255), np.uint8(0))
    return (image if draw(st.booleans()) else (image / 255).astype(np.float32)), size


def triangle(n: int, m: int) -> np.ndarray:
    """Weights [m, n] of an antialiased linear interpolation from n to m samples."""
    centre, support = (np.arange(m)[:, None] + 0.5) * n / m, max(n / m, 1)
    weights = (1 - abs(np.arange(n) + 0.5 - centre) / support).clip(0)
    return weights / weights.sum(1, keepdims=True)


def check_image_resizing(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    image, size = case
    resized = pictures.resize_image(image, size)
    assert resized.shape == (*size, image.shape[2]) and resized.dtype == image.dtype
    rows, columns = (triangle(a, b) for a, b in zip(image.shape[:2], size, strict=True))
    expected = np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(np.float64))
    # Pillow rounds twice: rows, then columns.
    allowed = 1.01 if image.dtype == np.uint8 else 1e-5
    assert (abs(resized - expected) <= allowed).all(), abs(resized - expected).max()
    if image.shape[:2] == size:
        assert np.array_equal(resized, image), "not the same"


def check_mask_resizing(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    mask, (height, width) = case
    resized = pictures.resize_mask(mask, (height, width))
    assert resized.shape == (height, width, mask.shape[2]) and resized.dtype == np.uint8
    for k in range(mask.shape[2]):
        assert set(np.unique(resized[..., k])) <= set(np.unique(mask[..., k])), "a new value"
    down, up = (
        np.divmod(mask.shape[:2], (height, width)),
        np.divmod((height, width), mask.shape[:2]),
    )
    if not np.any(up[1]):
        grown = mask.repeat(up[0][0], 0).repeat(up[0][1], 1)
        assert np.array_equal(resized, grown), "enlarged otherwise"
    if not np.any(down[1]) and np.prod(down[0]) <= 36:  # areas that 8 bits tell apart
        blocks = mask.reshape(height, down[0][0], width, down[0][1], -1)
        counts = np.stack([(blocks == value).sum((1, 3)) for value in range(256)])
        chosen = np.take_along_axis(counts, resized[None].astype(int), 0)[0]
        assert (chosen == counts.max(0)).all(), "not the class that covers most"
        if mask.max() <= 1:
            beyond = 2 * counts[1] - np.prod(down[0])  # 0 is rounded as it comes
            assert ((beyond > 0) == resized)[beyond != 0].all(), "not half"


# Masks


@st.composite
def indices(draw: st.DrawFn) -> tuple[np.ndarray, int, int | None, str]:
    """A mask of class indices, the number of classes, the ignored value, the format."""
    n, ignore = draw(st.integers(2, 20)), draw(st.sampled_from((None, 255, 100)))
    values = (*range(n), *(() if ignore is None else (ignore,)))
    mask = draw(filled("u1", draw(sizes), values))
    kinds = ("PNG", "TIFF", "BMP", "P", "RGB", "u2", "npy", "npy i8", "npy f4")
    return mask, n, ignore, draw(st.sampled_from(kinds))


def encode_indices(mask: np.ndarray, kind: str) -> bytes:
    if kind.startswith("npy"):
        return saved(mask.astype(kind[4:] or "u1"))
    if kind == "P":
        picture = Image.fromarray(mask)
        picture.putpalette([value for i in range(256) for value in (i, 255 - i, i * 7 % 256)])
        return encoded(picture, "PNG")
    if kind == "RGB":
        return encoded(Image.fromarray(mask[..., None].repeat(3, -1)), "PNG")
    return encoded(Image.fromarray(mask.astype(np.uint16 if kind == "u2" else np.uint8)), "PNG")


def check_indices(case: tuple[np.ndarray, int, int | None, str]) -> None:
    mask, n, ignore, kind = case
    data = encode_indices(mask, kind)
    names = [f"class {i}" for i in range(n)]
    ignored = () if ignore is None else (ignore,)
    found = formats.find([{"name": "a", "mask": data}], names=names, ignore=ignored)
    expected = mask if ignore is None else np.where(mask == ignore, np.uint8(IGNORE), mask)
    read = formats.read(pictures.open_picture(data, "a"), found)
    assert read.dtype == np.uint8 and np.array_equal(read, expected), "other classes"


@st.composite
def colours(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, int, int]], str]:
    """A mask of class indices, the colour of each, the format."""
    byte = st.integers(0, 255)
    table = draw(st.lists(st.tuples(byte, byte, byte), min_size=2, max_size=9, unique=True))
    mask = draw(filled("u1", draw(sizes), range(len(table))))
    return mask, table, draw(st.sampled_from(("PNG", "TIFF", "BMP", "P")))


def check_colours(folder: Path, case: tuple[np.ndarray, list[tuple[int, int, int]], str]) -> None:
    mask, table, kind = case
    file = folder / "classes.csv"
    rows = [f"class {i},{r},{g},{b}" for i, (r, g, b) in enumerate(table)]
    file.write_text("\n".join(["name,red,green,blue", *rows]))
    if kind == "P":
        picture = Image.fromarray(mask)
        picture.putpalette(np.ravel(table).tolist())
        data = encoded(picture, "PNG")
    else:
        data = encoded(Image.fromarray(np.array(table, np.uint8)[mask]), kind)
    found = formats.find([{"name": "a", "mask": data}], names=[str(file)])
    read = formats.read(pictures.open_picture(data, "a"), found)
    assert read.dtype == np.uint8 and np.array_equal(read, mask), "other classes"


@st.composite
def binary(draw: st.DrawFn) -> tuple[list[np.ndarray], int, str]:
    """Masks of 0 and one other value, and the format."""
    high = draw(st.sampled_from((1, 255, 65535)))
    several = st.lists(filled("?", draw(sizes), (0, 1)), min_size=1, max_size=3)
    kind = "u2" if high > 255 else draw(st.sampled_from(("PNG", "RGB", "npy", "npy i8", "u2")))
    return draw(several), high, kind


def check_binary(case: tuple[list[np.ndarray], int, str]) -> None:
    masks, high, kind = case
    grey = [mask * np.uint16(high) for mask in masks]
    data = [encode_indices(x if kind == "u2" else x.astype(np.uint8), kind) for x in grey]
    try:
        found = formats.find([{"name": str(i), "mask": each} for i, each in enumerate(data)])
    except DataError:
        borders = [np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]).mean() for x in masks]
        inverted = sum(border > 0.5 for border in borders) > len(masks) / 2
        assert inverted or not any(mask.any() for mask in masks), "refused, but clear"
        return
    for mask, each in zip(masks, data, strict=True):
        read = formats.read(pictures.open_picture(each, "a"), found)
        assert read.dtype == np.uint8 and np.array_equal(read, mask), "other classes"


@st.composite
def separate(draw: st.DrawFn) -> tuple[np.ndarray, bool]:
    """Masks [K, H, W] of classes in separate files, and whether they may overlap."""
    shape = (draw(st.integers(2, 4)), *draw(sizes))
    masks, overlapping = draw(filled("?", shape, (0, 1))), draw(st.booleans())
    if not overlapping and draw(st.booleans()):
        masks = masks & (np.cumsum(masks, 0) == 1)  # the first one has the pixel
    return masks, overlapping


def check_separate(case: tuple[np.ndarray, bool]) -> None:
    masks, overlapping = case
    files = [(i, encoded(Image.fromarray(x), "PNG")) for i, x in enumerate(masks, 1)]
    names = [f"class {i}" for i, _ in files]
    source = [{"name": "a", "mask": files}]
    found = formats.find(source, names=names, foreground=(255,), overlapping=overlapping)
    opened = [(i, pictures.open_picture(data, "a"), "a") for i, data in files]
    try:
        read = formats.read_separate(opened, found)
    except DataError:
        assert not overlapping and (masks.sum(0) > 1).any(), "refused, but there is no overlap"
        return
    if overlapping:
        expected = np.moveaxis(masks, 0, -1)
    else:
        assert masks.sum(0).max() <= 1, "an overlap is not found"
        expected = np.tensordot(np.arange(1, len(masks) + 1), masks, 1)[..., None]
    assert read.dtype == np.uint8 and np.array_equal(read, expected), "other classes"


def run_images(n: int, seed: int) -> Outcome:
    """Lossless pictures, values of more than 8 bits, and all modes: n cases."""
    parts = (lossless(), check_lossless), (wide(), check_wide), (modes(), check_modes)
    return _all(parts, n, seed)


def run_sizes(n: int, seed: int) -> Outcome:
    """Resized images and masks: n cases."""
    parts = (resizing(), check_image_resizing), (resizing(masks=True), check_mask_resizing)
    return _all(parts, n, seed)


def run_masks(n: int, seed: int) -> Outcome:
    """Masks of indices, colours, two values and separate files: n cases."""
    with tempfile.TemporaryDirectory() as place:
        by_colour = partial(check_colours, Path(place))
        parts = (indices(), check_indices), (colours(), by_colour), (binary(), check_binary)
        return _all((*parts, (separate(), check_separate)), n, seed)


def _all(parts: tuple[tuple[st.SearchStrategy, Callable], ...], n: int, seed: int) -> Outcome:
    total = Outcome()
    for i, (strategy, check) in enumerate(parts):
        share = n // len(parts) + (i < n % len(parts))
        total += explore(strategy, check, share, seed)
    return total
