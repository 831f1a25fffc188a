"""The native encoder without Paddle: built from the package's sources, called by ctypes.

`python tests/native_core.py LIBRARY CASE.npz` runs a case with every instruction set, batch and number of threads and prints
the largest differences as JSON; that is what runs under the sanitizers, which must be loaded before anything else.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BETWEEN = "amx against avx512"
ARRAYS = ("words", "places", "kinds", "integers", "floats", "shifts")
SETTINGS = ("shape", "exact", "rounding", "epsilon")
API = Path(__file__).with_name("native_api.cc")
TILES, DISPATCH = (Path(__file__).with_name(name) for name in ("tiles_in_memory.h", "native_tiles_dispatch.cc"))


def build(folder: Path, compiler: str, *flags: str, tiles_in_memory: bool = False) -> Path:
    """The library in `folder`, compiled with `flags` on top of the package's own; `tiles_in_memory`: with the kernels for AMX
    on a CPU that has all of it but the tile registers."""
    from ernie_kqat import native

    objects = {**native.CORE, "native_api": (str(API), ())}
    if tiles_in_memory:
        source, own = objects["amx"]
        objects["amx"] = (source, ("-include", str(TILES), *own))
        objects["dispatch"] = (str(DISPATCH), ())
    made = native.compile_objects(compiler, objects, folder, (*native.COMMON, *flags))
    library = folder / "core.so"
    native.run([compiler, "-shared", "-fopenmp", *flags, *map(str, made), "-o", str(library)])
    return library


class Core:
    """`case`: what ernie_kqat.export.native.contents holds, by name."""

    def __init__(self, library: Path, case: dict[str, np.ndarray]):
        self._library = ctypes.CDLL(str(library))
        self._library.encoder_isas.restype = ctypes.c_char_p
        self.isas = self._library.encoder_isas().decode().split()
        self.settings = {
            name: np.ascontiguousarray(case[name], np.int32 if name in ("shape", "exact") else np.float32)
            for name in SETTINGS
        }
        self.arrays = {name: np.ascontiguousarray(case[name]) for name in ARRAYS}

    def logits(self, ids: np.ndarray, types: np.ndarray, isa: str = "", threads: int = 1) -> np.ndarray:
        """float32 [batch, classes] of int64 [batch, tokens]; ValueError for what the encoder refuses."""
        ids, types = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(types, np.int64)
        classes = int(np.clip(self.settings["shape"][4], 1, 1 << 20))  # a broken one is refused
        out = np.full((len(ids), classes), np.nan, np.float32)
        shape, exact, rounding, epsilon = (self.settings[name] for name in SETTINGS)
        arguments: list = [_at(shape), len(shape), _at(exact), len(exact), _at(rounding), _at(epsilon), len(epsilon)]
        for name in ARRAYS:
            array = self.arrays[name]
            integers = [int(array.dtype == np.int8)] if name == "words" else []
            arguments += [_at(array), *integers, ctypes.c_int64(len(array))]
        message = ctypes.create_string_buffer(300)
        arguments += [_at(ids), _at(types), len(ids), ids.shape[1], threads, _at(out), isa.encode(), message, 300]
        if self._library.run_encoder(*arguments):
            raise ValueError(message.value.decode())
        return out


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def batch_of(rows: Sequence[tuple[list[int], list[int]]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and token types, int64 [rows, longest]."""
    ids = np.full((len(rows), max(len(row) for row, _ in rows)), pad, np.int64)
    types = np.zeros_like(ids)
    for index, (row, kinds) in enumerate(rows):
        ids[index, : len(row)], types[index, : len(row)] = row, kinds
    return ids, types


def main(library: str, path: str) -> None:
    with np.load(path) as file:
        case = dict(file)
    core = Core(Path(library), case)
    found = {}
    for threads in (1, 3):
        for size in (1, 5, len(case["ids"])):
            parts = [slice(start, start + size) for start in range(0, len(case["ids"]), size)]
            logits = {}
            for isa in core.isas:
                all_parts = [core.logits(case["ids"][p], case["types"][p], isa, threads) for p in parts]
                logits[isa] = np.concatenate(all_parts)
                found[f"{isa} {threads} {size}"] = float(np.abs(logits[isa] - case["expected"]).max())
            if "amx" in logits:
                found[f"{BETWEEN} {threads} {size}"] = float(np.abs(logits["amx"] - logits["avx512"]).max())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
