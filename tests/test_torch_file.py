"""Files in PyTorch's format before 1.6, written here without PyTorch."""

import io
import os
import pickle
import sys
import tracemalloc
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


def put(n):
    return pickle.BININT + int(n).to_bytes(4, "little")


def tensor_of(shape, strides):
    """The pickle of {"x": tensor} over a storage of four floats."""
    text = lambda t: pickle.BINUNICODE + len(t).to_bytes(4, "little") + t  # noqa: E731
    tup = lambda *parts: pickle.MARK + b"".join(parts) + pickle.TUPLE  # noqa: E731
    long = lambda n: pickle.LONG1 + b"\x10" + int(n).to_bytes(16, "little")  # noqa: E731
    storage = tup(
        text(b"storage"), b"ctorch\nFloatStorage\n", text(b"0"), text(b"cpu"), put(4), b"N"
    )
    arguments = tup(
        storage + pickle.BINPERSID,
        put(0),
        tup(*map(long, shape)),
        tup(*map(long, strides)),
        pickle.NEWFALSE,
        pickle.EMPTY_DICT,
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE
    return pickle.EMPTY_DICT + pickle.MARK + text(b"x") + tensor + pickle.SETITEMS + pickle.STOP


#: Pickles in place of the tensors; each would take gigabytes or minutes, or change a class.
HOSTILE = {
    "an axis without stride": tensor_of((4_000_000_000,), (0,)),
    "overlapping rows": tensor_of((2, 3), (1, 1)),
    "2**70 entries": tensor_of((2**70,), (0,)),
    "70 axes": tensor_of((1,) * 70, (1,) * 70),
    "a memo of 2**29": b"N" + pickle.LONG_BINPUT + (2**29).to_bytes(4, "little") + b".",
    "2 GB of text": pickle.BINUNICODE + (2**31 - 1).to_bytes(4, "little") + b"x.",
    "8 GB of bytes": pickle.BYTEARRAY8 + (2**33).to_bytes(8, "little") + b"x.",
    "a key of tuples": pickle.EMPTY_DICT + b")" + b"q\0h\0\x86" * 40 + b"Ns.",
    "doubled tuples": pickle.EMPTY_DICT + b")" + pickle.DUP * 3 + b"Ns.",
    "attributes": b"ctorch._utils\n_rebuild_tensor_v2\n(N}(" + b"X\5\0\0\0shapeK\1utb.",
    "a dict that is called": b"ccollections\nOrderedDict\n(K\1tR.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path, case):
    file = tmp_path / "hostile.pth"
    body = b"".join(pickle.dumps(value, protocol=2) for value in HEAD)
    keys = pickle.dumps(["0"], protocol=2) + (4).to_bytes(8, "little") + bytes(16)
    file.write_bytes(body + b"\x80\x02" + HOSTILE[case] + keys)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="hostile.pth is not a valid PyTorch file"):
            read_tensors(file)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_the_hostile_files_differ_from_a_good_one_only_by_their_tensors(tmp_path):
    file = tmp_path / "good.pth"
    body = b"".join(pickle.dumps(value, protocol=2) for value in HEAD)
    keys = pickle.dumps(["0"], protocol=2) + (4).to_bytes(8, "little") + bytes(16)
    file.write_bytes(body + b"\x80\x02" + tensor_of((2, 2), (2, 1)) + keys)
    np.testing.assert_array_equal(read_tensors(file)["x"], np.zeros((2, 2), np.float32))
