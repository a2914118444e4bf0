"""Reads the tensors of a file that `torch.save` wrote before PyTorch 1.6, without PyTorch.

Such a file consists of five pickles (magic number, format version, machine properties, the object,
the keys of its storages), followed by each storage: its number of entries, int64, and its bytes.
Unpickling can run arbitrary code, so everything but tensors and dicts is refused.
"""

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
}


class _Storage(NamedTuple):
    """A tensor's reference to the storage of its entries."""

    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """The arguments of torch._utils._rebuild_tensor_v2."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: Any


class _Unpickler(pickle.Unpickler):
    """Creates tensors and ordered dicts, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise pickle.UnpicklingError(f"it contains {module}.{name}, not a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _, view = pid
        if view is not None:
            raise pickle.UnpicklingError("it contains a view of a storage")
        return _Storage(key, dtype)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises:
        ValueError: the file has another format, is damaged, or contains other objects.
        OSError: it cannot be read.
    """
    malformed = (EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError)
    try:
        with Path(path).open("rb") as file:
            return _read(file)
    except (pickle.UnpicklingError, struct.error, *malformed) as error:
        raise ValueError(f"{path} is not a valid PyTorch file from before 1.6: {error}") from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    magic, version, machine, tensors, keys = (_Unpickler(file).load() for _ in range(5))
    if magic != MAGIC or version != 1001 or not machine["little_endian"]:
        raise ValueError("unexpected header")
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    data, offset, storages = file.read(), 0, {}
    for key in keys:
        (length,) = struct.unpack_from("<q", data, offset)
        storages[key] = np.frombuffer(data, dtypes[key], length, offset + 8)
        offset += 8 + storages[key].nbytes
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """A copy of a tensor's entries, after checking that all of them are in its storage."""
    axes = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((n - 1) * step for n, step in axes)
    if min(tensor.offset, *tensor.strides, *tensor.shape, 0) < 0 or last >= len(storage):
        raise ValueError("a tensor extends beyond its storage")
    strides = [step * storage.itemsize for step in tensor.strides]
    return as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
