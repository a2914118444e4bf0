"""The tutorial's network in Keras, trained as the tutorial does, for time_to_dice.py.

`python benchmarks/quality_keras.py DATA MINUTES`; see quality.py.
"""

import sys
from collections.abc import Iterator

import keras_peer  # first: it chooses Keras' backend
import quality
from keras import utils


def main() -> None:
    file, minutes = sys.argv[1:]
    train, validation = quality.read(file)
    utils.set_random_seed(0)
    model = keras_peer.GOLDEN["article_keras"](keras_peer.GOLDEN["ARTICLE"])
    model.compile(optimizer="adam", loss="binary_crossentropy")

    def epochs() -> Iterator[float]:
        while True:
            yield model.fit(*train, batch_size=8, verbose=0).history["loss"][0]

    quality.train(
        epochs(), lambda image: model.predict(image, 8, verbose=0), validation, float(minutes)
    )


if __name__ == "__main__":
    main()
