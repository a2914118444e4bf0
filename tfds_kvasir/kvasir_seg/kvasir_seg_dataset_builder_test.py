"""TFDS' standard test of a data set; tests/test_kvasir_seg.py has those without TensorFlow."""

import pytest

pytest.importorskip("tensorflow", reason="TFDS' standard test needs TensorFlow")
pytest.importorskip("dill", reason="TFDS' standard test needs dill")

import tensorflow_datasets as tfds  # noqa: E402

from tfds_kvasir.kvasir_seg import kvasir_seg_dataset_builder as kvasir_seg  # noqa: E402


class KvasirSegTest(tfds.testing.DatasetBuilderTestCase):
    """Prepares tfrecord files from the synthetic zip and reads them with tf.data."""

    DATASET_CLASS = kvasir_seg.Builder
    SPLITS = {"train": 3, "test": 1}
    BUILDER_CONFIG_NAMES_TO_TEST = [
        kvasir_seg.Protocol(
            name="dummy", splits={"train": ["rim", "disc", "pair"], "test": ["flat"]}
        )
    ]

    def _make_builder(self, config=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        path = self.dummy_data / "kvasir-seg.zip"
        return kvasir_seg.Builder(data_dir=self.tmp_dir, config=config, kvasir_zip=path)


if __name__ == "__main__":
    tfds.testing.test_main()
