"""A packed file -> its artifact folder. Whatever is in the file, reading it runs nothing and writes no other file."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifact, files
from ..errors import UserError
from ..home import home
from . import codes, parameters
from .codes import Coded
from .parameters import Parameter

FORMAT, VERSION = "ernie_kqat packed artifact", 1
INDEX, FILES, STREAMS = "packed.json", "files/", ("indices", "levels", "steps", "values")
LIMIT_BYTES = 1 << 32  # of the file, of all parts together, and of all parameters; ERNIE base has a tenth of it
INDEX_LIMIT_BYTES, DIMENSIONS = 1 << 24, 8
INT8_MOST = 128
SAFE_NAME = re.compile(rf"(?:{artifact.NATIVE}/)?[A-Za-z0-9_][A-Za-z0-9._-]*")
EXPANDED, KEY_DIGITS = "expanded", 32  # folder of the user's cache; of the packed file's sha256, its name there
# What zipfile raises for a damaged file: its own errors, and those of what it calls without checking.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    IndexError,
    OverflowError,
)


def folder_of(path: str | Path) -> Path:
    """`path` where it is not a file; a packed file's artifact folder in the user's cache, expanded there at first use."""
    path = Path(path)
    if not path.is_file():
        return path
    content = _content(path)
    target = home() / EXPANDED / hashlib.sha256(content).hexdigest()[:KEY_DIGITS]
    if artifact.is_artifact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".expand.") as scratch:
        new = Path(scratch, "new")
        expand_content(content, str(path), new)
        try:
            os.rename(new, target)
        except OSError:
            if not artifact.is_artifact(target):  # else another process was first
                raise
    return target


def is_packed(path: str | Path) -> bool:
    """Whether a file looks like a packed artifact."""
    try:
        with zipfile.ZipFile(path) as archive:
            return INDEX in archive.namelist()
    except (OSError, *DAMAGE):
        return False


def expand(path: str | Path, folder: Path) -> None:
    """Make the artifact `folder` of a packed file, whole or not at all.

    Raises UserError for a file that is damaged, newer, or something else.
    """
    expand_content(_content(Path(path)), str(path), folder)


def expand_content(content: bytes, name: str, folder: Path) -> None:
    """`expand` of a file's content; `name` is for messages."""
    described, parts = read(content, name)
    try:
        tensors = _tensors(described, {stream: parts.pop(f"parameters/{stream}") for stream in STREAMS})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: its parameters cannot be read: {error}") from None
    with files.replacing_folder(folder) as new:
        for part, content in parts.items():
            if not (part.startswith(FILES) and SAFE_NAME.fullmatch(part[len(FILES) :])):
                raise UserError(f"{name}: unknown part {part!r}")
            target = new / part[len(FILES) :]
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        (new / artifact.PARAMS).write_bytes(parameters.write(tensors))
        try:
            manifest = artifact.read_manifest(new)
        except UserError as error:
            raise UserError(f"{name}: it expands to no whole artifact: {error}") from None
        extra = set(artifact.contents(new)) - {artifact.MANIFEST, *manifest["files"]}
        if extra:
            raise UserError(f"{name}: holds {', '.join(sorted(extra))}, which its {artifact.MANIFEST} does not list")


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        raise UserError(f"{path}: {size} bytes; a packed artifact has at most {LIMIT_BYTES}")
    return path.read_bytes()


def read(content: bytes, name: str) -> tuple[list, dict[str, bytes]]:
    """The list of parameters in packed.json, and every part, as large as is said there and with that sha256."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if INDEX not in entries:
                raise UserError(f"{name}: a zip without {INDEX}: not a packed artifact (tools/pack.py makes one)")
            if entries[INDEX].file_size > INDEX_LIMIT_BYTES:
                raise UserError(
                    f"{name}: {INDEX}: {entries[INDEX].file_size} bytes; at most {INDEX_LIMIT_BYTES} are read"
                )
            index = _index(archive.read(INDEX), name)
            listed = index["parts"]
            differing = sorted(set(entries) ^ {INDEX, *listed})
            if differing or len(archive.infolist()) != len(entries):
                raise UserError(
                    f"{name}: its parts are not those that {INDEX} lists: {', '.join(differing) or 'twice'}"
                )
            total = sum(entry.file_size for entry in entries.values())
            if total > LIMIT_BYTES:
                raise UserError(f"{name}: {total} bytes of parts; at most {LIMIT_BYTES} are read")
            parts = {part: _part(archive, entries[part], listed[part], name) for part in listed}
    except DAMAGE as error:
        raise UserError(
            f"{name}: no packed artifact, or damaged or cut: {str(error) or type(error).__name__}"
        ) from None
    return index["parameters"], parts


def _part(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, listed: dict[str, Any], name: str) -> bytes:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{name}: {entry.filename}: compression {entry.compress_type}; 0 and 8 are known")
    if entry.file_size != listed["size_bytes"]:
        raise UserError(f"{name}: {entry.filename}: {entry.file_size} bytes; {INDEX} says {listed['size_bytes']}")
    content = archive.read(entry)
    if hashlib.sha256(content).hexdigest() != listed["sha256"]:
        raise UserError(f"{name}: {entry.filename}: its sha256 is not the one in {INDEX}: the file was changed")
    return content


def _index(content: bytes, name: str) -> dict[str, Any]:
    try:
        index = json.loads(content)
        found = index["format"], index["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name}: {INDEX}: not the index of a packed artifact: {error}") from None
    if found != (FORMAT, VERSION):
        raise UserError(f"{name}: {found[0]!r}, version {found[1]!r}; this version reads {FORMAT!r}, version {VERSION}")
    parts, described = index.get("parts"), index.get("parameters")
    if not (isinstance(parts, dict) and all({"size_bytes", "sha256"} <= set(part) for part in parts.values())):
        raise UserError(f"{name}: {INDEX}: it does not list the size and sha256 of each part")
    if not isinstance(described, list):
        raise UserError(f"{name}: {INDEX}: it lists no parameters")
    return index


def _tensors(described: list, streams: dict[str, bytes]) -> list[Parameter]:
    """The parameters. Raises KeyError, TypeError or ValueError for a description that does not fit the streams."""
    left = {name: memoryview(stream) for name, stream in streams.items()}

    def take(name: str, size: int) -> memoryview:
        if size > len(left[name]):
            raise ValueError(f"parameter {len(found)}: {size} bytes of {name}, of which {len(left[name])} are there")
        taken, left[name] = left[name][:size], left[name][size:]
        return taken

    found: list[Parameter] = []
    total = 0
    for one in described:
        _whole(len(one["shape"]), 0, DIMENSIONS)
        kind, shape = one["type"], tuple(_whole(size, 0, LIMIT_BYTES) for size in one["shape"])
        size = math.prod(shape) * parameters.ITEM_BYTES[kind]
        total += size
        if total > LIMIT_BYTES:
            raise ValueError(f"over {LIMIT_BYTES} bytes of parameters")
        data = take("values", size) if one["grid"] is None else _matrix(kind, shape, one["grid"], take)
        found.append(Parameter(kind, shape, bytes(data)))
    unread = [name for name, rest in left.items() if len(rest)]
    if unread:
        raise ValueError(f"{', '.join(unread)}: more than the parameters take")
    return found


def _matrix(kind: int, shape: tuple[int, ...], grid: dict, take) -> bytes:
    rows, columns = shape
    if kind not in parameters.MATRICES or grid["group"] not in codes.GROUPS:
        raise ValueError(
            f"type {kind} with a step for each {grid['group']}; {', '.join(codes.GROUPS)} of float32 and int8 are known"
        )
    groups = codes.group_count((rows, columns), grid["group"])
    bits, (owners, count) = _whole(grid["bits"], 1, 8), grid["levels"]
    if _whole(owners, 0, groups) not in (1, groups):
        raise ValueError(f"levels of {owners} groups, where there are {groups}")
    indices = bytes(take("indices", codes.packed_bytes(bits, rows * columns)))
    levels = np.frombuffer(take("levels", owners * _whole(count, 1, 256)), np.int8).reshape(owners, count)
    step = np.frombuffer(take("steps", 4 * groups), "<f4")
    matrix = codes.decode(Coded((rows, columns), grid["group"], bits, indices, levels, step))
    if kind == parameters.INT8 and not (np.abs(matrix) <= INT8_MOST).all():
        raise ValueError("an int8 matrix with values beyond int8")
    return matrix.astype(parameters.MATRICES[kind]).tobytes()


def _whole(value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a whole number in {low}..{high}")
    return value
