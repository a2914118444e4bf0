"""Synthetic polyps, with the features of Kvasir-SEG and without a download."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tfds_kvasir.examples import SegmentationBuilder, boxes, encode_mask, features
from tfds_kvasir.synthetic_polyps.draw import draw

SEED = 0
SIZES = {"train": 320, "validation": 40, "test": 80}


class Builder(SegmentationBuilder):
    """Synthetic polyps, described in README.md in this folder."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "440 pictures of 128x128 from seed 0."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features(),
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
        jpeg = io.BytesIO()
        Image.fromarray(image).save(jpeg, format="JPEG", quality=95)
        yield {
            "image": jpeg.getvalue(),
            "mask": encode_mask(mask),
            "name": f"{split}_{index:03}",
            "bboxes": boxes(mask),
        }
