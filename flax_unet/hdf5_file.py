"""Reads HDF5 files as Keras writes them, without h5py.

The HDF5 library can hang or crash in a damaged file. Here is the small part of the format that
h5py uses by default (superblock 0, object headers 1, symbol tables): groups, attributes of texts,
and contiguous arrays of float32. All else is an error: links, compression, other files. Memory is
bounded by the file's size, and time by a number of steps.

HDF5 File Format Specification, version 3.0: sections II, III.A, III.B, III.D, III.E and IV.A.
"""

import math
import struct
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
#: The datatype message of little-endian float32, as far as it determines the values.
FLOAT32 = bytes.fromhex("11201f00 04000000 00002000 17080017 7f000000")
UNDEFINED = 2**64 - 1
#: Messages of an object header.
DATASPACE, DATATYPE, EXTERNAL, LAYOUT, FILTERS, ATTRIBUTE, CONTINUATION, SYMBOLS = (
    1, 3, 7, 8, 11, 12, 16, 17,
)  # fmt: skip
#: A file of the tutorial's network takes 4,000.
STEPS = 500_000


class _Attribute(NamedTuple):
    datatype: bytes
    entries: int
    start: int  # of its entries


class _File:
    """Bytes, and how many steps may still be taken."""

    def __init__(self, data: bytes):
        self.data, self.steps, self.heaps = data, STEPS, {}

    def spend(self, steps: int) -> None:
        """Take so many steps; ValueError if there are not so many left."""
        self.steps -= steps
        if self.steps < 0:
            raise ValueError("its structure is too large")

    def unpack(self, form: str, start: int) -> tuple:
        self.spend(1)
        return struct.unpack_from("<" + form, self.data, start)

    def take(self, start: int, size: int) -> bytes:
        if start + size > len(self.data):
            raise ValueError("it is cut off")
        return self.data[start : start + size]

    def expect(self, signature: bytes, start: int) -> None:
        if self.take(start, len(signature)) != signature:
            raise ValueError("its structure is damaged")


def read(data: bytes) -> "Node":
    """The root group of a file.

    Everything in it may raise ValueError, struct.error, LookupError or UnicodeDecodeError: the file
    is damaged, or not as Keras writes it.
    """
    file = _File(data)
    file.expect(SIGNATURE, 0)
    version, offsets, lengths, base, end, root = file.unpack("B4xBB9xQ8xQ16xQ", 8)
    if (version, offsets, lengths, base) != (0, 8, 8, 0):
        raise ValueError("it is of a version that Keras does not write")
    if end > len(data):
        raise ValueError("it is cut off")
    return Node(file, root, "the file")


class Node:
    """A group or an array."""

    def __init__(self, file: _File, address: int, name: str):
        self.file, self.address, self.name = file, address, name

    @cached_property
    def _messages(self) -> list[tuple[int, int, int]]:
        """(type, start, size) of each message in the header."""
        version, count, size = self.file.unpack("BxH4xI", self.address)
        if version != 1:
            raise ValueError(f"{self.name} is of a version that Keras does not write")
        blocks, messages = [(self.address + 16, size)], []
        for start, size in blocks:  # grows by the continuations
            end = start + size
            while start + 8 <= end and len(messages) < count:
                kind, size, flags = self.file.unpack("HHB", start)
                if flags & 2:
                    raise ValueError(f"{self.name} has a shared message")
                messages.append((kind, start + 8, size))
                if kind == CONTINUATION:
                    blocks.append(self.file.unpack("QQ", start + 8))
                start += 8 + size
        return messages

    def _one(self, kind: int) -> int:
        """Where the message of this type starts; 0 if there is none."""
        return next((start for k, start, _ in self._messages if k == kind), 0)

    @property
    def is_group(self) -> bool:
        return self._one(SYMBOLS) > 0

    @cached_property
    def _members(self) -> dict[str, int]:
        """The addresses of a group's members, without those of soft links: 0."""
        if not (start := self._one(SYMBOLS)):
            raise ValueError(f"{self.name} is not a group, or has links to other files")
        tree, heap = self.file.unpack("QQ", start)
        self.file.expect(b"HEAP", heap)
        size, _, names = self.file.unpack("QQQ", heap + 8)
        members = {}
        for node in self._symbol_nodes(tree, level=None):
            self.file.expect(b"SNOD", node)
            (count,) = self.file.unpack("H", node + 6)
            for i in range(count):
                offset, header, cache = self.file.unpack("QQI", node + 8 + 40 * i)
                text = self.file.data[names + offset : names + min(offset + 256, size)]
                members[text.split(b"\0")[0].decode()] = 0 if cache == 2 else header
        return members

    def _symbol_nodes(self, address: int, level: int | None) -> Iterator[int]:
        """The leaves of a B-tree. Each level is lower than that above, so there is no circle."""
        self.file.expect(b"TREE\0", address)
        own, count = self.file.unpack("BH", address + 5)
        if level is not None and own != level:
            raise ValueError("its structure is damaged")
        for i in range(count):
            (child,) = self.file.unpack("Q", address + 32 + 16 * i)
            if own:
                yield from self._symbol_nodes(child, own - 1)
            else:
                yield child

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> "Node":
        if name not in self._members:
            raise ValueError(f"{name} is missing in {self.name}")
        if not (address := self._members[name]):
            raise ValueError(f"{name} is a link to another place")
        return Node(self.file, address, name)

    @cached_property
    def _attributes(self) -> dict[str, _Attribute]:
        attributes = {}
        for kind, start, _ in self._messages:
            if kind == ATTRIBUTE:
                version, *sizes = self.file.unpack("BxHHH", start)
                if version not in (1, 3):
                    raise ValueError(f"{self.name} has attributes that Keras does not write")
                start += 8 if version == 1 else 9  # version 3 has the encoding of the name
                places = []
                for size in sizes:
                    places.append(start)
                    start += -(-size // 8) * 8 if version == 1 else size
                name = self.file.take(places[0], sizes[0]).split(b"\0")[0].decode()
                datatype = self.file.take(places[1], sizes[1])
                count = math.prod(self._dimensions(places[2]))
                attributes[name] = _Attribute(datatype, count, start)
        return attributes

    def has_attribute(self, name: str) -> bool:
        return name in self._attributes

    def texts(self, name: str) -> list[str]:
        """An attribute of one or more texts."""
        if name not in self._attributes:
            raise ValueError(f"{self.name} has no {name}")
        datatype, count, start = self._attributes[name]
        if count == 0:  # an empty list has any type
            return []
        kind, bits, size = struct.unpack_from("<BB2xI", datatype)
        if kind & 15 == 3:
            self.file.spend(count)
            texts = (self.file.take(start + i * size, size) for i in range(count))
            return [text.split(b"\0")[0].decode() for text in texts]
        if kind & 15 == 9 and bits & 15 == 1 and size == 16:  # of variable length
            places = (self.file.unpack("IQI", start + 16 * i) for i in range(count))
            return [self._from_heap(*place).decode() for place in places]
        raise ValueError(f"{name} of {self.name} is not a text")

    def _from_heap(self, length: int, address: int, index: int) -> bytes:
        """A text of variable length."""
        if address not in self.file.heaps:
            self.file.heaps[address] = dict(self._heap(address))
        start, size = self.file.heaps[address][index]
        if length > size:
            raise ValueError("its structure is damaged")
        return self.file.take(start, length)

    def _heap(self, address: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """(index, (start, size)) of each object in a global heap."""
        self.file.expect(b"GCOL\1", address)
        (size,) = self.file.unpack("Q", address + 8)
        start, end = address + 16, address + size
        while start + 16 <= end:
            index, size = self.file.unpack("H6xQ", start)
            if index == 0:  # the rest is free
                return
            yield index, (start + 16, size)
            start += 16 + -(-size // 8) * 8

    def _dimensions(self, start: int) -> tuple[int, ...]:
        version, rank, _, kind = self.file.unpack("BBBB", start)
        if version not in (1, 2) or rank > 32 or (version == 2 and kind == 2):
            raise ValueError(f"{self.name} has no shape")
        return self.file.unpack(f"{rank}Q", start + (8 if version == 1 else 4))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an array."""
        if self.is_group or not (start := self._one(DATASPACE)):
            raise ValueError(f"{self.name} is not an array")
        return self._dimensions(start)

    def array(self) -> np.ndarray:
        """The entries of an array, float32: a view of the file's bytes."""
        size = 4 * math.prod(shape := self.shape)
        if self.file.take(self._one(DATATYPE), len(FLOAT32)) != FLOAT32:
            raise ValueError(f"{self.name} is not of the type float32")
        if self._one(FILTERS) or self._one(EXTERNAL):
            raise ValueError(f"{self.name} is compressed, or its entries are in another file")
        layout = self._one(LAYOUT)
        version, kind, start, stored = self.file.unpack("BBQQ", layout)
        if kind == 0:  # in the header
            (stored,), start = self.file.unpack("H", layout + 2), layout + 4
        if version != 3 or kind > 1:
            raise ValueError(f"{self.name} is in parts, or its entries are in another file")
        if start == UNDEFINED or stored != size or start + size > len(self.file.data):
            raise ValueError(f"the entries of {self.name} are not in the file")
        return np.frombuffer(self.file.data, "<f4", size // 4, start).reshape(shape)
