"""PyTorch checkpoints (`torch.save`: zip files and the older kind) read as data: without PyTorch, running none of their code."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError

LEGACY = 0x1950A86A20F9469CFC6C  # what files of before PyTorch 1.6 begin with, as a pickled number
DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),  # the upper half of a float32
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of a checkpoint that holds named tensors; bfloat16 as float32.

    Raises UserError for a file that is damaged, that holds anything else, or that asks for code to run.
    """
    try:
        with open(path, "rb") as file:
            state = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}; named tensors are needed")
        wrong = [name for name, value in state.items() if not isinstance(value, _Tensor)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is a {type(state[wrong[0]]).__name__}; a tensor is needed")
        return {str(name): value.array() for name, value in state.items()}
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise anything
        raise UserError(
            f"{path}: damaged or cut short, or no PyTorch weights: {error or type(error).__name__}"
        ) from None


@dataclass
class _Storage:
    """A flat array that tensors are views of; its bytes may be read later than the tensors."""

    kind: str
    count: int
    content: bytes = b""

    def values(self) -> np.ndarray:
        dtype = DTYPES[self.kind]
        if len(self.content) != self.count * dtype.itemsize:
            raise ValueError(
                f"{len(self.content)} bytes where {self.count} values of {dtype.itemsize} bytes are needed"
            )
        values = np.frombuffer(self.content, dtype)
        return (values.astype("<u4") << 16).view("<f4") if self.kind == "BFloat16Storage" else values


@dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values

    def array(self) -> np.ndarray:
        values = self.storage.values()
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        sound = len(self.shape) == len(self.strides) and min((self.offset, *self.shape, *self.strides), default=0) >= 0
        count: int = math.prod(self.shape)
        if not sound or count > len(values) or (count and last >= len(values)):
            raise ValueError(f"a tensor of shape {list(self.shape)} in a storage of {len(values)} values")
        strides = [stride * values.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Knows tensors, storages and ordered dictionaries, and nothing else."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, tuple(shape), tuple(strides)
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch", storage): storage for storage in DTYPES},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tensor needs")
        return known[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        """(`storage`, its kind, key, device, number of values, in the older format what it is a part of)."""
        what, kind, key, _, count, *part = identity
        if what != "storage" or kind not in DTYPES or any(one is not None for one in part):
            raise pickle.UnpicklingError(f"an unknown kind of storage: {what}, {kind}")
        return self.storages.setdefault(str(key), _Storage(kind, count))


def _read_zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = index[: -len("data.pkl")]
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("big-endian numbers")
        with archive.open(index) as content:
            unpickler = _Unpickler(content)
            state = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.content = archive.read(f"{root}data/{key}")
    return state


def _read_legacy(file: IO[bytes]) -> Any:
    file.seek(0)
    if _Unpickler(file).load() != LEGACY:
        raise ValueError("it does not begin as a file of torch.save does")
    _, system = _Unpickler(file).load(), _Unpickler(file).load()
    if not system.get("little_endian", True):
        raise ValueError("big-endian numbers")
    unpickler = _Unpickler(file)
    state = unpickler.load()
    for key in _Unpickler(file).load():
        storage = unpickler.storages[str(key)]
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise ValueError(f"a storage that is not of its {storage.count} values")
        storage.content = file.read(storage.count * DTYPES[storage.kind].itemsize)
    return state
