"""Synthetic microscopy of two kinds of cells, as a 12-bit camera sees them."""

import numpy as np
from scipy import ndimage

from tfds_kvasir.synthetic_polyps.draw import noise

CLASSES = ("background", "round", "spindle")
IGNORE = 255  # the rim of a cell
HEIGHT, WIDTH = 120, 160
SPOTS = 0.2  # fraction of the round cells that are a few pixels wide


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image, uint16 [120, 160] in 0..4095, and its classes and `IGNORE`, uint8 [120, 160].

    Cells of both kinds have the same range of brightness. Half of them touch an earlier one, which
    they do not cover. The result depends only on the state of `rng`.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    nearest = np.full((HEIGHT, WIDTH), np.inf)  # distance from the cell at a pixel; inside it < 1
    owner = np.zeros((HEIGHT, WIDTH), int)  # number of that cell, from 1
    light = np.zeros((HEIGHT, WIDTH))
    kinds, placed = [0], []
    for number in range(1, rng.integers(10, 17) + 1):
        kind = int(rng.integers(1, 3))
        axes, angle = shape(rng, kind)
        centre = rng.uniform((0, 0), (HEIGHT, WIDTH))
        if placed and rng.random() < 0.5:  # beside an earlier one
            other, reach = placed[rng.integers(len(placed))]
            direction = rng.uniform(0, 2 * np.pi)
            step = (reach + axes[1]) * np.array([np.sin(direction), np.cos(direction)])
            centre = other + step
        placed.append((centre, axes[1]))
        kinds.append(kind)
        along = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
        across = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle)
        distance = np.hypot(along / axes[0], across / axes[1])
        inside = (distance < 1) & (owner == 0)
        owner[inside], nearest[inside] = number, distance[inside]
        brightness = rng.uniform(0.25, 0.9)
        light[inside] = brightness * (1 - 0.5 * distance[inside] ** 2)
    size = max(HEIGHT, WIDTH)
    texture, uneven = (noise(rng, size, grain)[:HEIGHT, :WIDTH] for grain in (0.02, 0.6))
    light *= 1 + 0.12 * texture
    debris = rng.random((HEIGHT, WIDTH)) < 4e-4
    debris = ndimage.binary_dilation(debris, np.ones((1, 3))) & (owner == 0)
    light[debris] = rng.uniform(0.3, 0.9)
    light = ndimage.gaussian_filter(0.06 + light, 0.7) * np.exp(0.2 * uneven)

    # Camera: offset, photons (whose deviation is the root of their number), reading noise.
    photons = np.maximum(900 * light, 0)
    signal = 200 + 3 * (photons + np.sqrt(photons) * rng.standard_normal(light.shape))
    image = np.clip(signal + 8 * rng.standard_normal(light.shape), 0, 4095)

    mask = np.array(kinds, np.uint8)[owner]
    rim = ndimage.maximum_filter(owner, 3) != ndimage.minimum_filter(owner, 3)
    return image.astype(np.uint16), np.where(rim, np.uint8(IGNORE), mask)


def shape(rng: np.random.Generator, kind: int) -> tuple[tuple[float, float], float]:
    """The half axes, in pixels, and the direction of a cell."""
    angle = rng.uniform(0, np.pi)
    if kind == 2:
        across = rng.uniform(4, 6)
        return (across * rng.uniform(2.5, 3.5), across), angle
    radius = rng.uniform(2.5, 3.5) if rng.random() < SPOTS else rng.uniform(7, 12)
    return (radius * rng.uniform(1, 1.2), radius), angle
