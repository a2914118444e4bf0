"""Shared by the data sets: features, mask encoding, bounding boxes, a base class of builders."""

import io
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from scipy import ndimage


def features() -> tfds.features.FeaturesDict:
    """An image, its mask of 0 and 1, its name, and the boxes of the mask's connected components."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "mask": tfds.features.Image(
                shape=(None, None, 1), encoding_format="png", use_colormap=True
            ),
            "name": tfds.features.Text(),
            "bboxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
        }
    )


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose data sets can be read with and without TensorFlow.

    They are prepared as array_record, which `as_data_source` reads, and `as_dataset` too.

    Attributes:
        IGNORE: values of the masks that do not count.
    """

    IGNORE: ClassVar[tuple[int, ...]] = ()

    def __init__(self, *, file_format: str | tfds.core.FileFormat | None = None, **kwargs):
        """Args, in addition to those of TFDS:

        file_format: format in which the data set is prepared; by default array_record.
        """
        super().__init__(file_format=file_format, **kwargs)
        if file_format is None and not self.data_path.exists():
            self.info.set_file_format("array_record", override=True)

    def _as_dataset(self, split, decoders=None, read_config=None, shuffle_files=False):
        """`as_dataset`, which TFDS itself has for tfrecord only.

        Raises:
            ValueError: a decoder is not `tfds.decode.SkipDecoding()`.
        """
        if self.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            return super()._as_dataset(split, decoders, read_config, shuffle_files)
        import tensorflow as tf  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

        spec: Any = self.info.features.get_tensor_spec()  # pyright: ignore
        for name, decoder in dict(decoders or {}).items():
            if not isinstance(decoder, tfds.decode.SkipDecoding):
                raise ValueError(f"the decoder of {name!r} must be tfds.decode.SkipDecoding()")
            spec[name] = tf.TensorSpec((), tf.string)
        read: Any = self.as_data_source  # decorated, so its type has no arguments
        source = read(split, decoders=decoders)
        examples = tf.data.Dataset.from_generator(lambda: iter(source), output_signature=spec)
        return examples.apply(tf.data.experimental.assert_cardinality(len(source)))


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a bool mask [H, W] as the bytes of a 1-channel PNG of 0 and 1.

    TFDS stores bytes unchanged; it would encode an array with TensorFlow.
    """
    _check(mask)
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def boxes(mask: np.ndarray) -> list[tfds.features.BBox]:
    """Bounding boxes of the 8-connected components of a bool mask [H, W].

    They are ordered by the first pixel of the component in row-major order. Coordinates are
    fractions of the height and width, in [0, 1]; ymax and xmax are exclusive, so the box of one
    pixel has the area 1 / (H * W). An empty mask has no box.
    """
    _check(mask)
    height, width = mask.shape
    components = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=components)
    return [
        tfds.features.BBox(
            ymin=y.start / height, xmin=x.start / width, ymax=y.stop / height, xmax=x.stop / width
        )
        for y, x in ndimage.find_objects(components)
    ]


def _check(mask: np.ndarray) -> None:
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool [H, W], got {mask.dtype} {mask.shape}; threshold it first"
        )
