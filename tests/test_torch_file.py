"""Files in PyTorch's format before 1.6, written here without PyTorch."""

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
    """A storage, pickled as a reference to its key, as torch.save does."""

    def __init__(self, key, kind, values):
        self.key, self.kind, self.values = key, kind, values


class Tensor:
    """A tensor over a storage; `rebuild` replaces PyTorch's function of that name."""

    def __init__(self, storage, offset, shape, strides):
        self.args = storage, offset, shape, strides, False, OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.args


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes {name: tensor} and returns the path."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def rebuild(*args):
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
        for value in head:
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump(tensors)
        storages = {t.args[0].key: t.args[0] for t in tensors.values() if isinstance(t, Tensor)}
        pickle.dump(list(storages), file, protocol=2)
        for storage in storages.values():
            file.write(len(storage.values).to_bytes(8, "little") + storage.values.tobytes())
        path = tmp_path / "weights.pth"
        path.write_bytes(file.getvalue()[:cut])
        return path

    return write


def test_tensors_of_any_layout_type_and_offset_are_read(write):
    numbers = np.arange(24, dtype="<f4")
    first = Storage("7", "FloatStorage", numbers)
    state = OrderedDict(
        plain=Tensor(first, 0, (2, 3, 4), (12, 4, 1)),
        transposed=Tensor(first, 0, (4, 3, 2), (1, 4, 12)),
        offset=Tensor(first, 20, (4,), (1,)),
        half=Tensor(Storage("9", "HalfStorage", np.array([0.5, -2], "<f2")), 0, (2,), (1,)),
        count=Tensor(Storage("8", "LongStorage", np.array([2**40], "<i8")), 0, (), ()),
    )
    state._metadata = OrderedDict(version=1)  # as in PyTorch's state dicts
    tensors = read_tensors(write(state))
    assert list(tensors) == list(state)
    np.testing.assert_array_equal(tensors["plain"], numbers.reshape(2, 3, 4))
    np.testing.assert_array_equal(tensors["transposed"], numbers.reshape(2, 3, 4).T)
    np.testing.assert_array_equal(tensors["offset"], [20, 21, 22, 23])
    assert tensors["half"].dtype == np.float16 and tensors["half"].tolist() == [0.5, -2]
    assert tensors["count"] == 2**40 and tensors["count"].shape == ()


class Command:
    """A harmful object: unpickling it calls a function."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((25,), (1,), 0), ((2, 2), (23, 1), 1), ((3,), (-1,), 4), ((3,), (1,), -1), ((-3,), (1,), 0)],
)
def test_a_tensor_that_extends_beyond_its_storage_is_refused(write, shape, strides, offset):
    storage = Storage("0", "FloatStorage", np.zeros(24, "<f4"))
    with pytest.raises(ValueError, match="extends beyond"):
        read_tensors(write({"x": Tensor(storage, offset, shape, strides)}))


def test_other_objects_are_refused_and_not_called(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="contains posix.mkdir, not a tensor"):
        read_tensors(write({"x": Command()}))
    assert not (tmp_path / "harm").exists()
    with pytest.raises(ValueError, match="not a valid PyTorch file"):
        read_tensors(write({"x": 3.0}))


def test_the_error_names_a_damaged_file(write):
    tensors = {"x": Tensor(Storage("0", "FloatStorage", np.ones(9, "<f4")), 0, (9,), (1,))}
    size = write(tensors).stat().st_size
    assert read_tensors(write(tensors))["x"].sum() == 9
    for cut in (0, 5, size // 2, size - 40, size - 1):
        with pytest.raises(ValueError, match="weights.pth is not a valid PyTorch file"):
            read_tensors(write(tensors, cut=cut))
    with pytest.raises(ValueError, match="unexpected header"):
        read_tensors(write(tensors, head=(1, 1001, {"little_endian": True})))
