"""Files of PyTorch's older format, written here without PyTorch."""

import io
import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest

from flax_unet.torch_file import read_tensors

HEAD = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


class Storage:
    """A storage, pickled by its key as torch.save does."""

    def __init__(self, key, kind, values):
        self.key, self.kind, self.values = key, kind, values


class Tensor:
    """A tensor over a storage; `rebuild` stands for PyTorch's own function."""

    def __init__(self, storage, offset, shape, strides):
        self.given = storage, offset, shape, strides, False, OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.given


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes {name: tensor} and returns the file."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def rebuild(*given):
        raise AssertionError("never called")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                kind = getattr(torch, obj.kind)
                return "storage", kind, obj.key, "cpu", len(obj.values), None
            return None

    def write(tensors, head=HEAD, cut=None):
        file = io.BytesIO()
        for part in head:
            pickle.dump(part, file, protocol=2)
        Pickler(file, protocol=2).dump(tensors)
        storages = {t.given[0].key: t.given[0] for t in tensors.values() if isinstance(t, Tensor)}
        pickle.dump(list(storages), file, protocol=2)
        for storage in storages.values():
            file.write(len(storage.values).to_bytes(8, "little") + storage.values.tobytes())
        path = tmp_path / "weights.pth"
        path.write_bytes(file.getvalue()[:cut])
        return path

    return write


def test_tensors_are_read_whatever_their_order_type_and_place(write):
    numbers = np.arange(24, dtype="<f4")
    first = Storage("7", "FloatStorage", numbers)
    state = OrderedDict(
        plain=Tensor(first, 0, (2, 3, 4), (12, 4, 1)),
        turned=Tensor(first, 0, (4, 3, 2), (1, 4, 12)),
        later=Tensor(first, 20, (4,), (1,)),
        half=Tensor(Storage("9", "HalfStorage", np.array([0.5, -2], "<f2")), 0, (2,), (1,)),
        count=Tensor(Storage("8", "LongStorage", np.array([2**40], "<i8")), 0, (), ()),
    )
    state._metadata = OrderedDict(version=1)  # PyTorch's state dicts have such an attribute
    found = read_tensors(write(state))
    assert list(found) == list(state)
    np.testing.assert_array_equal(found["plain"], numbers.reshape(2, 3, 4))
    np.testing.assert_array_equal(found["turned"], numbers.reshape(2, 3, 4).T)
    np.testing.assert_array_equal(found["later"], [20, 21, 22, 23])
    assert found["half"].dtype == np.float16 and found["half"].tolist() == [0.5, -2]
    assert found["count"] == 2**40 and found["count"].shape == ()


class Command:
    """What a harmful pickle holds: a call of any function."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((25,), (1,), 0), ((2, 2), (23, 1), 1), ((3,), (-1,), 4), ((3,), (1,), -1), ((-3,), (1,), 0)],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(write, shape, strides, offset):
    storage = Storage("0", "FloatStorage", np.zeros(24, "<f4"))
    with pytest.raises(ValueError, match="reaches beyond"):
        read_tensors(write({"x": Tensor(storage, offset, shape, strides)}))


def test_what_is_no_tensor_is_neither_called_nor_accepted(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds posix.mkdir, which is no tensor"):
        read_tensors(write({"x": Command()}))
    assert not (tmp_path / "harm").exists()
    with pytest.raises(ValueError, match="older format"):
        read_tensors(write({"x": 3.0}))


def test_a_damaged_file_is_named(write):
    tensors = {"x": Tensor(Storage("0", "FloatStorage", np.ones(9, "<f4")), 0, (9,), (1,))}
    size = write(tensors).stat().st_size
    assert read_tensors(write(tensors))["x"].sum() == 9
    for cut in (0, 5, size // 2, size - 40, size - 1):
        with pytest.raises(ValueError, match="weights.pth is no file of PyTorch's older format"):
            read_tensors(write(tensors, cut=cut))
    with pytest.raises(ValueError, match="its head is another"):
        read_tensors(write(tensors, head=(1, 1001, {"little_endian": True})))
