"""Kvasir-SEG, synthetic polyps and synthetic cells as TFDS data sets, registered by the import."""

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core import constants

from tfds_kvasir.examples import SegmentationBuilder
from tfds_kvasir.kvasir_seg.kvasir_seg_dataset_builder import PICTURES, Protocol
from tfds_kvasir.synthetic_cells import synthetic_cells_dataset_builder  # noqa: F401
from tfds_kvasir.synthetic_polyps import synthetic_polyps_dataset_builder  # noqa: F401

__all__ = ["Protocol", "Source", "datasets", "open_splits", "sources"]

#: The splits that a training program needs, and the features that may hold an example's name.
SPLITS = ("train", "validation", "test")
NAMES = ("name", "file_name", "filename", "id")


def datasets() -> dict[str, list[str]]:
    """The names of the data sets imported above, and of the configurations of each.

    Not `pictures` of Kvasir-SEG, which has no splits to train on.
    """
    return {
        builder.name: [config.name for config in builder.BUILDER_CONFIGS if config is not PICTURES]
        for builder in SegmentationBuilder.__subclasses__()
    }


def sources(
    name: str,
    config: str | tfds.core.BuilderConfig | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    **builder_kwargs,
) -> dict[str, Sequence[dict]]:
    """Open all splits of a data set as {split: source}, and prepare it first if necessary.

    Args:
        name: one of `datasets()`.
        config: configuration of the data set, such as "medico"; the first one by default.
        data_dir: folder in which TFDS stores data sets; ~/tensorflow_datasets by default.
        **builder_kwargs: arguments of the data set's builder, such as
            kvasir_zip="kvasir-seg.zip".

    Returns:
        A `Source` per split.

    Raises:
        FileNotFoundError: kvasir_zip or KVASIR_SEG_ZIP is not a file.
        OSError: data_dir is full or cannot be written to.
        ConnectionError: no kvasir-seg.zip is present and it cannot be downloaded.
        ValueError: the zip is not a valid Kvasir-SEG (nothing incomplete is left in data_dir);
            or the data set in data_dir is stored as tfrecord, or is damaged (also raised when
            an example is read); or array_record is not installed (it is not available on Windows).
    """
    try:
        builder = tfds.builder(name, config=config, data_dir=data_dir, **builder_kwargs)
    except (ParseError, json.JSONDecodeError) as error:
        folder = Path(data_dir or constants.DATA_DIR).expanduser() / name
        raise ValueError(
            f"{folder} is damaged: delete it, and it will be prepared again ({error})"
        ) from error
    return open_splits(builder)


def open_splits(
    builder: tfds.core.DatasetBuilder,
    splits: Sequence[str] = (),
    *,
    image: str = "image",
    mask: str = "mask",
) -> dict[str, Sequence[dict]]:
    """Open splits of any TFDS data set with images and masks, and prepare it first if necessary.

    Args:
        builder: of the data set.
        splits: TFDS' names or slices, such as "train[:90%]", of the splits for training, validation
            and test; by default all splits under their own names.
        image, mask: the features with the image and the mask.

    Raises:
        ValueError: a split or a feature is missing, or one that is no image; or see `sources`.
    """
    if importlib.util.find_spec("array_record") is None:
        raise ValueError(
            f"{builder.name} needs array_record: pip install array-record (not available on "
            "Windows: use a folder of pictures)"
        )
    features: Any = builder.info.features
    images = [key for key in features if isinstance(features[key], tfds.features.Image)]
    for key in (image, mask):
        if key not in images:
            raise ValueError(
                f"{builder.name} has no image feature {key!r}: choose from {', '.join(images)}"
            )
    # Hide TFDS' progress bars and its report of unknown sizes; errors are raised regardless.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            builder.download_and_prepare(file_format="array_record")  # no-op if prepared
        except (ValueError, OSError):
            raise
        except Exception as error:  # TFDS and the builders of others raise any
            raise OSError(f"{builder.name} cannot be prepared: {error}") from error
    encoded = {key: tfds.decode.SkipDecoding() for key in (image, mask)}
    present, opened = list(builder.info.splits), {}
    names = splits or present
    for split in names:
        if split.split("[")[0] not in present:
            raise ValueError(
                f"{builder.name} has no split {split!r} but {', '.join(present)}: name those for "
                "training, validation and test (--tfds-splits), such as 'train[:90%]' 'train[90%:]'"
            )
    for name, split in zip(SPLITS if splits else names, names, strict=True):
        open_split: Any = builder.as_data_source  # decorated, so its type has no arguments
        try:
            data = open_split(split, decoders=encoded)
        except NotImplementedError as error:
            raise ValueError(
                f"{builder.data_path} holds {builder.name} in a format that only TensorFlow can "
                "read: choose another folder with data_dir (--data-dir)"
            ) from error
        opened[name] = Source(data, builder, name, image, mask)
    return opened


class Source(Sequence[dict]):
    """A split; several threads may read it.

    source[i] is {"name": str, "image": bytes, "mask": bytes}: the undecoded files of a picture and
    of its mask.

    Attributes:
        classes: the names of the classes, if the data set has them (`tfds.features.LabeledImage`).
        ignore: values of the masks that do not count, as far as the data set says.
    """

    def __init__(
        self, source, builder: tfds.core.DatasetBuilder, split: str, image: str, mask: str
    ):
        self._source, self._path, self._split = source, builder.data_path, split
        features: Any = builder.info.features
        self._keys = {"image": image, "mask": mask}
        self._name = next((key for key in NAMES if key in features), None)
        labelled = isinstance(features[mask], tfds.features.LabeledImage)
        self.classes = tuple(features[mask].names or ()) if labelled else ()
        self.ignore: tuple[int, ...] = getattr(builder, "IGNORE", ())

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        # Indexing a range resolves negative indices and raises the IndexError that ends a loop.
        i = range(len(self))[index]
        try:
            example = self._source[i]
        except RuntimeError as error:  # from the C++ reader
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self._path} cannot be read; if it is damaged, delete it and it will be prepared "
                f"again: {reason}"
            ) from error
        name = f"{self._split}-{i:06}" if self._name is None else example[self._name]
        name = name.decode() if isinstance(name, bytes) else str(name)
        return {"name": name} | {key: example[feature] for key, feature in self._keys.items()}
