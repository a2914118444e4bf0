"""Pictures drawn for the tests."""

import io

import numpy as np
from PIL import Image


def encode(array, suffix="png", **options):
    stream = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(stream, suffix, **options)
    return stream.getvalue()


def rgb(seed=0, size=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
