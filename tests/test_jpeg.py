import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import fft

from flax_unet import jpeg


def waves(size):
    """An image without hard edges: float32 [H, W, 3] in [0.15, 0.75]."""
    y, x = np.mgrid[: size[0], : size[1]] / 5
    channels = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(2 * x)], -1)
    return (0.45 + 0.3 * channels).astype(np.float32)


@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize("quality", [5, 20, 50])
def test_grey_is_coded_as_pillow_codes_it_enlarged(quality, block):
    image = np.uint8(np.round(255 * waves((48, 72))))[..., 0]
    times = 8 // block
    large = Image.fromarray(image.repeat(times, 0).repeat(times, 1))
    large.save(stream := io.BytesIO(), "JPEG", quality=quality)
    coded = np.asarray(Image.open(stream), float).reshape(48, times, 72, times).mean((1, 3))
    grey = jnp.asarray(image[..., None] / 255, jnp.float32)
    ours = 255 * np.asarray(jpeg.code(grey, 50 / quality, block=block))[..., 0]
    # Pillow rounds pixels, and a coefficient just beside the middle of two steps either way.
    assert abs(ours - coded).mean() < 0.5 and abs(coded - image).mean() > 0.5


@pytest.mark.parametrize("quality", [10, 20])
def test_colours_are_coded_as_the_standard_defines(quality):
    image = waves((40, 56))
    # JFIF, version 1.02
    to_ycc = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    to_rgb = np.array([[1, 0, 1.402], [1, -0.34414, -0.71414], [1, 1.772, 0]])
    padded = np.pad(255.0 * image @ to_ycc.T, ((0, 8), (0, 8), (0, 0)), mode="edge")
    luma = as_coded(padded[..., 0] - 128, jpeg._LUMINANCE, quality) + 128
    halves = padded.reshape(24, 2, 32, 2, 3).mean((1, 3))
    blue, red = (as_coded(halves[..., c], jpeg._CHROMINANCE, quality) for c in (1, 2))
    planes = [luma, *(plane.repeat(2, 0).repeat(2, 1) for plane in (blue, red))]
    expected = (np.stack(planes, -1) @ to_rgb.T).clip(0, 255)[:40, :56]
    ours = 255 * np.asarray(jpeg.code(jnp.asarray(image), 50 / quality))
    np.testing.assert_allclose(ours, expected, atol=0.1)
    assert abs(expected - 255 * image).mean() > 2


def as_coded(plane, table, quality):
    """A plane after JPEG, with SciPy's transform."""
    steps = (np.array(table.split(), int) * (5000 // quality) + 50) // 100  # as in libjpeg
    steps = steps.clip(1, 255).reshape(8, 8)
    out = np.empty_like(plane)
    for y, x in np.ndindex(plane.shape[0] // 8, plane.shape[1] // 8):
        block = np.s_[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        coefficients = np.round(fft.dctn(plane[block], norm="ortho") / steps) * steps
        out[block] = fft.idctn(coefficients, norm="ortho")
    return out


def test_the_tables_of_jpeg_are_those_of_pillow():
    Image.new("RGB", (8, 8)).save(stream := io.BytesIO(), "JPEG", quality=50)
    tables = Image.open(stream).quantization
    for i, table in enumerate((jpeg._LUMINANCE, jpeg._CHROMINANCE)):
        assert [int(n) for n in table.split()] == list(tables[i])
