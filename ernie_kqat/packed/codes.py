"""A matrix on a grid at its true bit width: bit-packed indices into few levels, times a step a group. NumPy only.

    matrix[group, i] = float32(levels[group or 0, index[group, i]]) * step[group]

A group, which shares a step, is the whole matrix, one of its columns, or one of its rows. Binary weights have two levels and
so 1 bit, ternary ones three and 2 bits, 8-bit ones up to 255. Two binary halves of a split weight have four levels, of each
group's own: 2 bits.

Indices are written one after the other, each from its lowest bit up, into bytes from their lowest bit up; the last byte ends
in zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .grid import recover

GROUPS = ("matrix", "column", "row")
FEW = 16  # levels at most, where each group has its own


@dataclass(frozen=True)
class Coded:
    """`shape` of the matrix; bytes of `indices`, group by group; `levels` int8 [1 or groups, n]; `step` float32 [groups]."""

    shape: tuple[int, int]
    group: str
    bits: int
    indices: bytes
    levels: np.ndarray
    step: np.ndarray


def encode(matrix: np.ndarray) -> Coded | None:
    """The shortest code of a float32 [rows, columns] that lies on a grid, or of an int8 one.

    None for floats that lie on none, or would not be smaller.
    """
    integers = matrix.dtype == np.int8
    found: list[Coded] = []
    for group in GROUPS if matrix.size else ():
        recovered = recover(_in_groups(matrix.astype(np.float32), group))
        if recovered is not None:
            found += [_coded(matrix.shape, group, *recovered, own) for own in (False, True)]
            if (
                not integers
            ):  # the others are finer; integers lie on all, and each column may have few levels of its own
                break
    coded = min(found, key=size_bytes, default=None)
    return coded if coded is not None and (integers or size_bytes(coded) < matrix.nbytes) else None


def decode(coded: Coded) -> np.ndarray:
    """The matrix, float32 [rows, columns]. Raises ValueError where an index has no level."""
    count = coded.shape[0] * coded.shape[1]
    index = unpack_bits(coded.indices, coded.bits, count).reshape(len(coded.step), -1)
    if index.size and index.max() >= coded.levels.shape[1]:
        raise ValueError(f"index {index.max()} where there are {coded.levels.shape[1]} levels")
    q = coded.levels[0][index] if len(coded.levels) == 1 else np.take_along_axis(coded.levels, index, axis=1)
    values = q.astype(np.float32) * coded.step[:, None]
    return np.ascontiguousarray(values.T if coded.group == "column" else values).reshape(coded.shape)


def size_bytes(coded: Coded) -> int:
    """Of indices, levels and steps."""
    return len(coded.indices) + coded.levels.nbytes + coded.step.nbytes


def pack_bits(index: np.ndarray, bits: int) -> bytes:
    """`bits` (1 to 8) of each uint8."""
    if bits == 8:
        return index.tobytes()
    planes = (index.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes, bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """What `pack_bits` packed, uint8 [count]. Raises ValueError if there are not as many bytes as it takes."""
    if len(data) != packed_bytes(bits, count):
        raise ValueError(f"{len(data)} bytes where {count} values of {bits} bits take {packed_bytes(bits, count)}")
    packed = np.frombuffer(data, np.uint8)
    if bits == 8:
        return packed
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    index = np.zeros(count, np.uint8)
    for bit in range(bits):
        index |= planes[:, bit] << np.uint8(bit)
    return index


def packed_bytes(bits: int, count: int) -> int:
    """How many bytes `count` values of `bits` bits take."""
    return (bits * count + 7) // 8


def group_count(shape: tuple[int, int], group: str) -> int:
    """How many steps a matrix of that shape has."""
    return {"matrix": 1, "column": shape[1], "row": shape[0]}[group]


def _in_groups(matrix: np.ndarray, group: str) -> np.ndarray:
    if group == "matrix":
        return matrix.reshape(1, -1)
    return np.ascontiguousarray(matrix.T) if group == "column" else matrix


def _coded(shape, group: str, q: np.ndarray, step: np.ndarray, own: bool) -> Coded:
    levels = _own_levels(q) if own else np.unique(q)[None]
    index = np.zeros(q.shape, np.uint8)
    if levels.shape[1] <= FEW:
        for place in range(levels.shape[1] - 1):
            index += q > levels[:, [place]]
    else:  # they are shared
        place_of = np.zeros(256, np.uint8)
        place_of[levels[0].view(np.uint8)] = np.arange(levels.shape[1])
        index = place_of[q.view(np.uint8)]
    bits = max(1, int(levels.shape[1] - 1).bit_length())
    return Coded(tuple(shape), group, bits, pack_bits(index, bits), levels, step)


def _own_levels(q: np.ndarray) -> np.ndarray:
    """The values in each group, ascending, the last one repeated where a group has fewer than others; shared if they are many."""
    ordered = np.sort(q, axis=1)
    place = np.zeros(q.shape, np.int16)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=place[:, 1:])
    count = int(place[:, -1].max()) + 1
    if count > FEW:
        return np.unique(q)[None]
    levels = np.repeat(ordered[:, -1:], count, axis=1)
    np.put_along_axis(levels, place.astype(np.int64), ordered, axis=1)
    return levels
