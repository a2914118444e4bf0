"""Reads the tensors of a file that `torch.save` wrote before PyTorch 1.6, without PyTorch.

Such a file consists of five pickles (magic number, format version, machine properties, the object,
the keys of its storages), followed by each storage: its number of entries, int64, and its bytes.
Unpickling can run arbitrary code, and take any time and memory. So only the opcodes that
`torch.save` writes are known here, and they make nothing but tensors, numbers, text, lists and
dicts.
"""

import io
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

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


#: What torch.save writes: no DUP, and nothing that allocates a size that a file names.
OPCODES = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE EMPTY_TUPLE "
        "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT GLOBAL REDUCE BINPERSID "
        "BINPUT LONG_BINPUT BINGET LONG_BINGET"
    ).split()
]


def _empty_dict() -> dict[str, Any]:
    return {}


_known: dict[int, Any] = pickle._Unpickler.dispatch  # type: ignore[attr-defined]


# The unpickler in Python: its opcodes are a table, and its memo is a dict. That in C allocates a
# memo of any size that a file names.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Creates tensors, and calls nothing else."""

    stack: list[Any]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())  # type: ignore[attr-defined]

    def _set(self, items: list[Any]) -> None:
        """Keys are text: to hash tuples of tuples can take for ever."""
        if not all(type(key) is str for key in items[::2]):
            raise pickle.UnpicklingError("a key is not text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        """Ignore attributes; those of a state dict are the versions of its modules."""
        self.stack.pop()

    dispatch: ClassVar[Any] = {code: _known[code] for code in OPCODES} | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it contains {module}.{name}, not a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _, view = pid
        if view is not None:
            raise pickle.UnpicklingError("it contains a view of a storage")
        if type(key) is not str or dtype not in STORAGES.values():
            raise pickle.UnpicklingError("it contains a storage of another kind")
        return _Storage(key, np.dtype(dtype))


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises:
        ValueError: the file has another format, is damaged, or contains other objects.
        OSError: it cannot be read.
    """
    malformed = (EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
    try:
        return _read(io.BytesIO(Path(path).read_bytes()))
    except (pickle.UnpicklingError, struct.error, RecursionError, *malformed) as error:
        raise ValueError(f"{path} is not a valid PyTorch file from before 1.6: {error}") from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    magic, version, machine, tensors, keys = (_Unpickler(file).load() for _ in range(5))
    if magic != MAGIC or version != 1001 or not machine["little_endian"]:
        raise ValueError("unexpected header")
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    data, offset, storages = file.read(), 0, {}
    for key in keys:
        (length,) = struct.unpack_from("<q", data, offset)
        if length < 0:
            raise ValueError("a storage has a negative length")
        storages[key] = np.frombuffer(data, dtypes[key], length, offset + 8)
        offset += 8 + storages[key].nbytes
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """A copy of a tensor's entries, after checking that all of them are in its storage."""
    axes = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((n - 1) * step for n, step in axes)
    if min(tensor.offset, *tensor.strides, *tensor.shape, 0) < 0 or last >= len(storage):
        raise ValueError("a tensor extends beyond its storage")
    if math.prod(tensor.shape) > len(storage):
        raise ValueError("a tensor is larger than its storage")
    strides = [step * storage.itemsize for step in tensor.strides]
    return as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
