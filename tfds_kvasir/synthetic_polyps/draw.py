"""Synthetic endoscopy images of polyps: a height map, lit from the camera."""

import numpy as np
from scipy import ndimage

COUNTS = (0.65, 0.25, 0.10)  # fractions of the images with one, two and three polyps


def draw(rng: np.random.Generator, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image, uint8 [size, size, 3], and the mask of its polyps, bool [size, size].

    The wall, with folds around a dark lumen, carries one to three polyps, which may overlap. Polyps
    and flat stains have the same random tints: a polyp differs by its dome, its rim and the absence
    of vessels on it. The result depends only on the state of `rng`.

    Raises:
        ValueError: size is below 32, where the smallest polyp would be only a few pixels wide.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    z = x + 1j * y  # the unit of length is half the image's side
    field = np.maximum(np.maximum(abs(x), abs(y)), (abs(x) + abs(y)) / 1.4) < 0.98

    # The wall is a tunnel, dark at the lumen; its folds are broken rings around the lumen.
    centre = np.sqrt(rng.uniform(0, 1.6)) * np.exp(1j * rng.uniform(0, 2 * np.pi))
    lumen = distance(rng, z, centre, rng.uniform(0.2, 0.4))
    near = 1 - np.exp(-0.7 * lumen**1.5)  # closeness to the lamp, in [0, 1]
    phase = rng.uniform(3, 6) * np.log(lumen + 0.5) + noise(rng, size, 0.25)
    folds = np.maximum(np.cos(phase), 0) ** 2 * np.clip(0.5 + noise(rng, size, 0.3), 0, 1.5)
    wall = rng.uniform(0.05, 0.2) * near * folds + 0.03 * noise(rng, size, 0.2)

    # Colour of the wall: pink to orange, with stains, and with vessels along the zeros of a noise.
    # It is a logarithm, so that tints add.
    skin = np.log(rng.uniform((0.75, 0.36, 0.26), (0.95, 0.58, 0.46)))
    colour = skin + noise(rng, size, 0.3)[..., None] * (0, 0.06, 0.12)
    for _ in range(rng.integers(1, 4)):
        stain = distance(rng, z, complex(*rng.uniform(-0.9, 0.9, 2)), radius(rng)) < 1
        colour += blur(stain, 0.03)[..., None] * tint(rng)
    vessels = np.exp(-((noise(rng, size, 0.08) / 0.12) ** 2)) * np.clip(noise(rng, size, 0.3), 0, 1)
    colour -= rng.uniform(0.1, 0.5) * vessels[..., None] * (0.4, 1, 0.9)

    # A polyp is a dome that covers what is behind it; two domes meet in a crease.
    domes = np.zeros((size, size))
    for _ in range(1 + rng.choice(3, p=COUNTS)):
        reach = radius(rng)
        d = distance(rng, z, complex(*rng.uniform(-0.65, 0.65, 2)), reach)
        inside = d < 1
        dome = reach * rng.uniform(0.6, 1) * np.maximum(1 - d**2, 0) ** 0.6
        domes = np.maximum(domes, dome)
        near = np.where(inside, np.maximum(near, rng.uniform(0.6, 1.1)), near)
        grain = 0.05 * noise(rng, size, 0.025)[..., None]
        colour = np.where(inside[..., None], skin + tint(rng) + grain, colour)
    polyp = domes > 0
    height = np.where(polyp, domes + 0.3 * wall, wall)

    # Light: Lambert's law, darker in hollows, plus highlights on wet surfaces that face the lamp.
    slope_y, slope_x = np.gradient(blur(height, 0.015), 2 / (size - 1))
    lamp_x, lamp_y = rng.uniform(-0.5, 0.5, 2)
    lamp_x, lamp_y = lamp_x - 0.3 * x, lamp_y - 0.3 * y
    facing = (1 - slope_x * lamp_x - slope_y * lamp_y) / np.sqrt(
        (1 + slope_x**2 + slope_y**2) * (1 + lamp_x**2 + lamp_y**2)
    )
    hollow = np.clip(blur(height, 0.08) - height, 0, 1)
    light = near * np.maximum(facing, 0) * np.exp(-4 * hollow)
    shine = blur(near * np.clip(100 * (facing - 1) + 1.2 * noise(rng, size, 0.02), 0, 1), 0.012)
    image = 1.45 * np.exp(colour) * light[..., None] + 0.7 * shine[..., None]

    # Camera: an octagonal field of view, vignetting, defocus and noise.
    image *= (field * (1 - 0.2 * abs(z) ** 2))[..., None]
    image = ndimage.gaussian_filter(image, rng.uniform(0, 0.006) * size, axes=(0, 1))
    image += 0.012 * rng.standard_normal(image.shape)
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), polyp & field


def distance(rng: np.random.Generator, z: np.ndarray, centre: complex, reach: float) -> np.ndarray:
    """Distance of the points z from a centre, relative to a random smooth outline around it.

    Values below 1 are inside. The outline is star-shaped with a radius of about `reach`: the log of
    the radius is a Fourier series in the direction, the real part of a polynomial in z / |z|.
    """
    z = z - centre
    r = np.maximum(abs(z), 1e-9)
    k = np.array([6, 5, 4, 3, 2])
    wave = rng.uniform(0, 0.9, 5) / k**2 * np.exp(1j * rng.uniform(0, 2 * np.pi, 5))
    return r / (reach * np.exp(np.polyval([*wave, 0, 0], z / r).real))


def radius(rng: np.random.Generator) -> float:
    """A log-uniform radius: many small polyps, and a few that fill half the image."""
    return np.exp(rng.uniform(np.log(0.18), np.log(0.65)))


def tint(rng: np.random.Generator) -> np.ndarray:
    """A random offset of log R, G and B: from hardly visible to clearly darker, paler or redder."""
    lightness, paleness, yellowness = rng.uniform(0, 0.2) * rng.standard_normal(3)
    return np.array([lightness, lightness + paleness, lightness + paleness - yellowness])


def noise(rng: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """Blurred white noise [size, size] of mean 0 and standard deviation 1, drawn as a spectrum.

    `grain` is the sigma of the blur, in units of half the image's side.
    """
    white = rng.standard_normal((size, size // 2 * 2 + 2)).view(complex)
    smooth = np.fft.irfft2(ndimage.fourier_gaussian(white, grain * size / 2, size), (size, size))
    return (smooth - smooth.mean()) / smooth.std()


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a square image or mask [H, W]; `sigma` in units of half its side."""
    return ndimage.gaussian_filter(image.astype(float), sigma * len(image) / 2)
