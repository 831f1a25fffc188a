"""Paddle's .pdiparams file as a list of tensors, and back: no names, in the order of the program's sorted names. No Paddle.

A tensor is: uint32 0, uint64 0 (no levels of detail), uint32 0, int32 size of a protobuf TensorDesc, that (field 1: type,
field 2, repeated: dimensions), the values; integers little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

FLOAT32, INT8 = 5, 21
MATRICES = {FLOAT32: "<f4", INT8: "i1"}  # what may lie on a grid
ITEM_BYTES = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2, FLOAT32: 4, 6: 8, 20: 1, 21: 1, 22: 2}  # by number in framework.proto
TYPE_FIELD, DIMENSION_FIELD = 0x08, 0x10  # tags of varints
_HEAD, _SIZE = struct.Struct("<IQI"), struct.Struct("<i")


@dataclass(frozen=True)
class Parameter:
    """A dense tensor: Paddle's number of its type, shape, values in C order."""

    type: int
    shape: tuple[int, ...]
    data: bytes


def read(content: bytes) -> list[Parameter]:
    """The tensors of a file. Raises ValueError for what is not such a file, or was cut."""
    found: list[Parameter] = []
    at = 0
    while at < len(content):
        where = f"tensor {len(found)} at byte {at}"
        if at + _HEAD.size + _SIZE.size > len(content) or _HEAD.unpack_from(content, at) != (0, 0, 0):
            raise ValueError(f"{where}: not a dense tensor of version 0")
        (size,) = _SIZE.unpack_from(content, at + _HEAD.size)
        at += _HEAD.size + _SIZE.size
        kind, shape = _description(content[at : at + max(size, 0)], where)
        at += size
        length = math.prod(shape) * ITEM_BYTES[kind]
        if at + length > len(content):
            raise ValueError(f"{where}: {length} bytes of values, of which {len(content) - at} are there")
        found.append(Parameter(kind, shape, content[at : at + length]))
        at += length
    return found


def write(parameters: list[Parameter]) -> bytes:
    """The file that holds them."""
    parts = []
    for one in parameters:
        description = bytes([TYPE_FIELD]) + _varint(one.type)
        description += b"".join(bytes([DIMENSION_FIELD]) + _varint(size) for size in one.shape)
        parts += [_HEAD.pack(0, 0, 0), _SIZE.pack(len(description)), description, one.data]
    return b"".join(parts)


def _description(data: bytes, where: str) -> tuple[int, tuple[int, ...]]:
    kinds: list[int] = []
    shape: list[int] = []
    at = 0
    while at < len(data):
        tag = data[at]
        value, shift = 0, 0
        while True:
            at += 1
            if at == len(data) or shift > 56:
                raise ValueError(f"{where}: its description is cut")
            value |= (data[at] & 0x7F) << shift
            shift += 7
            if data[at] < 0x80:
                break
        at += 1
        if tag not in (TYPE_FIELD, DIMENSION_FIELD):
            raise ValueError(f"{where}: its description has an unknown field, tag {tag}")
        (kinds if tag == TYPE_FIELD else shape).append(value)
    if len(kinds) != 1 or kinds[0] not in ITEM_BYTES:
        raise ValueError(f"{where}: its type {kinds} is not one of {sorted(ITEM_BYTES)}")
    return kinds[0], tuple(shape)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
