"""Tensors of a file that `torch.save` wrote before PyTorch 1.6, read without PyTorch.

Such a file holds five pickles (a magic number, the format's version, facts of the machine, the
object, the keys of its storages) and then each storage: its length in entries, int64, and its
bytes. A pickle can call any function there is; of this one only tensors and dicts are accepted.
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
    """What a tensor names as the place of its entries."""

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
    """Makes tensors and ordered dicts, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _, view = pid
        if view is not None:
            raise pickle.UnpicklingError("it holds a view of a storage")
        return _Storage(key, dtype)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises:
        ValueError: the file is of another format, is damaged, or holds something else.
        OSError: it cannot be read.
    """
    broken = (EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError)
    try:
        with Path(path).open("rb") as file:
            return _read(file)
    except (pickle.UnpicklingError, struct.error, *broken) as error:
        raise ValueError(f"{path} is no file of PyTorch's older format: {error}") from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    magic, version, machine, tensors, keys = (_Unpickler(file).load() for _ in range(5))
    if magic != MAGIC or version != 1001 or not machine["little_endian"]:
        raise ValueError("its head is another")
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    rest, at, storages = file.read(), 0, {}
    for key in keys:
        (length,) = struct.unpack_from("<q", rest, at)
        storages[key] = np.frombuffer(rest, dtypes[key], length, at + 8)
        at += 8 + storages[key].nbytes
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """A copy of a tensor's entries, once they are known to lie within its storage."""
    reach = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((n - 1) * step for n, step in reach)
    if min(tensor.offset, *tensor.strides, *tensor.shape, 0) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [step * storage.itemsize for step in tensor.strides]
    return as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
