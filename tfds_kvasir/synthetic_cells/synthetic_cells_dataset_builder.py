"""Synthetic cells: 16-bit grey, three classes, and pixels that do not count."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tfds_kvasir.examples import SegmentationBuilder
from tfds_kvasir.synthetic_cells.draw import CLASSES, IGNORE, draw

SEED = 0
SIZES = {"train": 240, "validation": 40, "test": 60}


class Builder(SegmentationBuilder):
    """Synthetic cells, described in README.md in this folder."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "340 pictures of 160x120 from seed 0."}
    IGNORE = (IGNORE,)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
        mask = tfds.features.LabeledImage(labels=list(CLASSES), encoding_format="png")
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"image": image, "mask": mask, "name": tfds.features.Text()}
            ),
            supervised_keys=("image", "mask"),
            license="Apache-2.0",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {split: enumerate(examples(split, SEED)) for split in SIZES}

    def _generate_examples(self):
        raise NotImplementedError("_split_generators yields the examples")


def examples(split: str, seed: int) -> Iterator[dict]:
    """Draw the examples of "train", "validation" or "test" as TFDS takes them, files as bytes.

    Every picture has its own random generator, seeded with (seed, split, index).
    """
    for index in range(SIZES[split]):
        image, mask = draw(np.random.default_rng((seed, list(SIZES).index(split), index)))
        yield {"image": _png(image), "mask": _png(mask), "name": f"{split}_{index:03}"}


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()
