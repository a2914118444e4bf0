"""Kvasir-SEG and drawn polyps as TFDS datasets: importing this registers them by name."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Sequence

import tensorflow_datasets as tfds

from tfds_kvasir.kvasir_seg import kvasir_seg_dataset_builder  # noqa: F401
from tfds_kvasir.synthetic_polyps import synthetic_polyps_dataset_builder  # noqa: F401

__all__ = ["sources"]


def sources(
    name: str,
    config: str | tfds.core.BuilderConfig | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    **builder_kwargs,
) -> dict[str, Sequence[dict]]:
    """Open every split of a dataset, {split: source}; prepare it first where it is not there yet.

    Args:
        name: "kvasir_seg" or "synthetic_polyps".
        config: of the dataset, such as "medico"; its first one by default.
        data_dir: where TFDS keeps datasets; ~/tensorflow_datasets by default.
        **builder_kwargs: of the dataset's builder, such as kvasir_zip="kvasir-seg.zip".

    Returns:
        Sources in the order of the split: source[i] is {"name": str, "image": bytes,
        "mask": bytes}, the files of a picture and of its mask of 0 and 1, not decoded. Threads
        may share a source.

    Raises:
        FileNotFoundError: kvasir_zip, or KVASIR_SEG_ZIP, is not a file.
        ConnectionError: Kvasir-SEG is not here and cannot be downloaded.
        ValueError: the zip is not a sound Kvasir-SEG, and nothing half-made is left; or data_dir
            holds the dataset as tfrecord, or damaged (also when an example is read);
            or array_record is missing, as on Windows.
    """
    if importlib.util.find_spec("array_record") is None:
        raise ValueError(
            f"{name} needs array_record, which Windows lacks: use a folder of pictures"
        )
    builder = tfds.builder(name, config=config, data_dir=data_dir, **builder_kwargs)
    # TFDS draws progress bars and prints its sizes as unknown; what fails is raised all the same.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")  # nothing, where it is prepared
    encoded = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
    try:
        splits = builder.as_data_source(decoders=encoded)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} holds {name} in a format that only TensorFlow reads: name "
            "another folder with data_dir (--data-dir)"
        ) from error
    assert isinstance(splits, dict)
    return {split: _Source(source, builder.data_path) for split, source in splits.items()}


class _Source(Sequence[dict]):
    """What TFDS read, with a str for a name and without the boxes."""

    def __init__(self, source, path):
        self._source, self._path = source, path

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        # A range gives negative indices their meaning, and the IndexError that ends a loop.
        try:
            example = self._source[range(len(self))[index]]
        except RuntimeError as error:  # of the C++ reader
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self._path} cannot be read; if it is damaged, remove it to have it prepared "
                f"anew: {reason}"
            ) from error
        return {
            "name": example["name"].decode(),
            "image": example["image"],
            "mask": example["mask"],
        }
