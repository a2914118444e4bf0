"""The tutorial's network and training in Keras, as a worker.

`python benchmarks/keras_peer.py IMAGES`; see worker.py.
"""

import os
import runpy
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from worker import images, serve  # noqa: E402

GOLDEN = runpy.run_path(
    str(Path(__file__).parent.parent / "tests" / "golden" / "make_keras_golden.py")
)
CHANGES = [
    keras.layers.RandomFlip(),
    keras.layers.RandomRotation(0.5, fill_mode="constant"),
    keras.layers.RandomZoom(0.2, fill_mode="constant"),
    keras.layers.RandomShear(0.1, 0.1, fill_mode="constant"),
    keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant"),
    keras.layers.RandomBrightness(0.2, value_range=(0, 255)),
    keras.layers.RandomContrast(0.2, value_range=(0, 255)),
    keras.layers.RandomSaturation((0.4, 0.6), value_range=(0, 255)),
    keras.layers.RandomHue(0.03, value_range=(0, 255)),
]


def augment_batch(image, mask):
    """Augment a batch of images in [0, 255] and their masks."""
    batch = {"images": tf.cast(image, tf.float32), "segmentation_masks": mask}
    for layer in CHANGES:
        batch = layer(batch, training=True)
    return batch["images"], batch["segmentation_masks"]


def main() -> None:
    keras.utils.set_random_seed(0)
    model = GOLDEN["article_keras"](GOLDEN["ARTICLE"])
    assert model.count_params() == 11_707_729
    model.compile(optimizer="adam", loss="binary_crossentropy")
    image, mask = images(int(sys.argv[1]))
    predict = tf.function(lambda x: model(x, training=False))

    def dataset(kind: str, batch: int) -> tf.data.Dataset:
        batches = tf.data.Dataset.from_tensor_slices((image, mask)).shuffle(len(image)).batch(batch)
        if kind == "augmented":
            batches = batches.map(augment_batch, num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(tf.data.AUTOTUNE)

    def work(kind: str, precision: str, batch: int, times: int) -> None:
        assert precision == "float32"
        first = tf.constant(np.float32(image[:batch]))
        for _ in range(times):
            if kind == "step":
                model.train_on_batch(first, np.float32(mask[:batch]))
            elif kind == "infer":
                predict(first).numpy()
            else:
                model.fit(dataset(kind, batch), verbose=0)

    serve(work)


if __name__ == "__main__":
    main()
