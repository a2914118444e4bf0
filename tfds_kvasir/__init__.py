"""Kvasir-SEG and synthetic polyps as TFDS data sets; importing this package registers them."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Sequence

import tensorflow_datasets as tfds

from tfds_kvasir.examples import SegmentationBuilder
from tfds_kvasir.kvasir_seg import kvasir_seg_dataset_builder  # noqa: F401
from tfds_kvasir.synthetic_polyps import synthetic_polyps_dataset_builder  # noqa: F401

__all__ = ["datasets", "sources"]


def datasets() -> dict[str, list[str]]:
    """The names of the data sets imported above, and of the configurations of each."""
    return {
        builder.name: [config.name for config in builder.BUILDER_CONFIGS]
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
        A sequence per split, in the split's order. source[i] is {"name": str, "image": bytes,
        "mask": bytes}: the undecoded files of a picture and of its mask, whose pixels are 0 or 1.
        Several threads may read the same source.

    Raises:
        FileNotFoundError: kvasir_zip or KVASIR_SEG_ZIP is not a file.
        ConnectionError: no kvasir-seg.zip is present and it cannot be downloaded.
        ValueError: the zip is not a valid Kvasir-SEG (nothing incomplete is left in data_dir);
            or the data set in data_dir is stored as tfrecord, or is damaged (also raised when
            an example is read); or array_record is not installed (it is not available on Windows).
    """
    if importlib.util.find_spec("array_record") is None:
        raise ValueError(
            f"{name} needs array_record: pip install array-record (not available on Windows: use "
            "a folder of pictures)"
        )
    builder = tfds.builder(name, config=config, data_dir=data_dir, **builder_kwargs)
    # Hide TFDS' progress bars and its report of unknown sizes; errors are raised regardless.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")  # no-op if prepared
    encoded = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
    try:
        splits = builder.as_data_source(decoders=encoded)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} holds {name} in a format that only TensorFlow can read: choose "
            "another folder with data_dir (--data-dir)"
        ) from error
    assert isinstance(splits, dict)
    return {split: _Source(source, builder.data_path) for split, source in splits.items()}


class _Source(Sequence[dict]):
    """A TFDS source, with names decoded to str and without the boxes."""

    def __init__(self, source, path):
        self._source, self._path = source, path

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        # Indexing a range resolves negative indices and raises the IndexError that ends a loop.
        try:
            example = self._source[range(len(self))[index]]
        except RuntimeError as error:  # from the C++ reader
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self._path} cannot be read; if it is damaged, delete it and it will be prepared "
                f"again: {reason}"
            ) from error
        return {
            "name": example["name"].decode(),
            "image": example["image"],
            "mask": example["mask"],
        }
