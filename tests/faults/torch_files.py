"""Damaged files of PyTorch: their tensors, or a ValueError; no code in them is run."""

import pickle
import random
import struct
import tempfile
from pathlib import Path

import numpy as np

from flax_unet.torch_file import MAGIC, read_tensors

from .damage import damaged
from .models import Bomb
from .outcome import Outcome

VALUES = {"weight": np.arange(24, dtype="<f4").reshape(2, 3, 4), "steps": np.arange(5)}


def run(n: int, seed: int) -> Outcome:
    """Read n damaged files."""
    outcome, rng = Outcome(), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        file, trace = Path(place, "weights.pth"), Path(place, "trace")
        sound = [content(), content(head=pickle.dumps(Bomb(trace), protocol=2)), content(huge=True)]
        file.write_bytes(sound[0])
        check(read_tensors(file), sound[0])
        for _ in range(n):
            data = damaged(sound, rng)
            file.write_bytes(data)
            with outcome.attempt(data, ValueError):
                try:
                    check(read_tensors(file), data)
                finally:
                    assert not trace.exists(), "the file ran code"
    return outcome


def check(tensors: dict[str, np.ndarray], data: bytes) -> None:
    """The format has no checksum: entries may be others, but they are in the file."""
    for name, array in tensors.items():
        assert type(name) is str and array.dtype.str in ("<f4", "<f2", "<f8", "<i8"), name
        assert array.nbytes <= len(data), "more entries than the file has"
        for entry in np.unique(array.ravel().view(f"V{array.itemsize}")) if array.size else ():
            assert entry.tobytes() in data, "an entry that is not in the file"
    if (pickles := content()[:-PAYLOAD]) == data[: len(pickles)] and len(data) >= len(content()):
        start = len(pickles) + 8
        for name, value in VALUES.items():
            expected = np.frombuffer(data, value.dtype, value.size, start).reshape(value.shape)
            assert tensors[name].tobytes() == expected.tobytes(), "other entries"
            start += value.nbytes + 8


def content(head: bytes = b"", huge: bool = False) -> bytes:
    """What torch.save wrote before version 1.6, by hand: five pickles and the storages."""
    parts = [head or pickle.dumps(MAGIC, protocol=2), pickle.dumps(1001, protocol=2)]
    parts += [pickle.dumps({"little_endian": True}, protocol=2), state(huge)]
    parts += [pickle.dumps(list(VALUES), protocol=2)]
    parts += [struct.pack("<q", value.size) + value.tobytes() for value in VALUES.values()]
    return b"".join(parts)


PAYLOAD = sum(8 + value.nbytes for value in VALUES.values())


def state(huge: bool) -> bytes:
    """The pickle of an OrderedDict of tensors; huge ones repeat an entry 2**30 times."""
    out = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, value in VALUES.items():
        kind = {"<f4": "Float", "<i8": "Long"}[value.dtype.str]
        strides = tuple(0 if huge else step // value.itemsize for step in value.strides)
        out += text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        out += b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key)
        out += text("cpu") + number(value.size) + b"NtQ" + number(0)
        out += (
            numbers((2**30, *value.shape[1:]) if huge else value.shape)
            + numbers(strides)
            + b"\x89ccollections\nOrderedDict\n)RtR"
        )
    return out + b"u."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"
