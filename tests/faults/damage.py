"""Damages files: what disks, transfers and editors do, and what an attacker may."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\1", b"\0\0\0\x7f", b"\x7f\xff\xff\xff", b"9")
RUNS = b'[{("\0\xff 9'  # bytes that nest, or that lengthen a number
VALUES = (None, True, 0, -1, 7, 0.5, 1e308, float("nan"), 10**30, "", "x", "../x", [], {})
VALUES = (*VALUES, [[]], [None], [1, 2, 3], {"a": 1}, ["x"], [1e308, -1])


def damaged(sound: Sequence[bytes], rng: random.Random) -> bytes:
    """One of some sound files, damaged in one place or in several."""
    content = bytearray(rng.choice(sound))
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4, 16))):
        rng.choice(WAYS)(content, rng.choice(sound), rng)
    return bytes(content)


def _flip(content: bytearray, other: bytes, rng: random.Random) -> None:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _overwrite(content: bytearray, other: bytes, rng: random.Random) -> None:
    extreme, at = rng.choice(EXTREMES), rng.randrange(len(content) + 1)
    content[at : at + len(extreme)] = extreme


def _change_digit(content: bytearray, other: bytes, rng: random.Random) -> None:
    """Shapes and numbers in text: a change that is still in the format."""
    if digits := [i for i, byte in enumerate(content) if byte in b"0123456789"]:
        content[rng.choice(digits)] = rng.choice(b"0123456789")


def _cut(content: bytearray, other: bytes, rng: random.Random) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _remove(content: bytearray, other: bytes, rng: random.Random) -> None:
    start, stop = _part(content, rng)
    del content[start:stop]


def _insert(content: bytearray, other: bytes, rng: random.Random) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))


def _insert_run(content: bytearray, other: bytes, rng: random.Random) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = bytes([rng.choice(RUNS)]) * rng.choice((2, 8, 300, 20_000))


def _splice(content: bytearray, other: bytes, rng: random.Random) -> None:
    here, there = _part(content, rng), _part(other, rng)
    content[slice(*here)] = other[slice(*there)]


def _part(content: bytes | bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 4, 16, 256, 4096)))


#: Bits flip most often.
WAYS = (_flip, _flip, _flip, _overwrite, _overwrite, _change_digit)
WAYS = (*WAYS, _cut, _remove, _insert, _insert_run, _splice)


def damaged_json(content: Any, rng: random.Random) -> bytes:
    """JSON in which one value, at any depth, is removed or replaced by one of another type."""
    content = copy.deepcopy(content)
    node, places = content, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        places.append((node, key))
        node = node[key]
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)
    return json.dumps(content).encode()
