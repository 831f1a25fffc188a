"""An artifact folder -> one packed file, after proof that it expands to the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifact, files
from ..errors import UserError
from . import codes, parameters
from .codes import Coded
from .expand import FILES, FORMAT, INDEX, STREAMS, VERSION, expand_content, is_packed
from .parameters import Parameter

DATE = (1980, 1, 1, 0, 0, 0)  # of every part, so that the same artifact gives the same file


def pack(folder: str | Path, output: str | Path) -> dict[str, Any]:
    """Write an artifact folder as one file.

    Returns {file, size_bytes, fp32_size_bytes: 4 for each parameter value, size_ratio: fp32 / packed, matrices: [{group, bits,
    matrices, values, size_bytes} for each kind], values: how many are kept as they are}. Raises UserError for a folder that
    is no artifact or was changed, and for an output that is there and no packed file.
    """
    folder, output = Path(folder), Path(output)
    manifest = artifact.read_manifest(folder)
    if output.exists() and not is_packed(output):
        raise UserError(f"{output}: exists and is no packed artifact; name a new file")
    if not artifact.has_plain(manifest):
        raise UserError(f"{folder}: holds no plain program, which is what is packed; export it with Export.plain: true")
    names = [artifact.MANIFEST, *sorted(set(manifest["files"]) - {artifact.PARAMS})]
    try:
        tensors = parameters.read((folder / artifact.PARAMS).read_bytes())
    except ValueError as error:
        raise UserError(f"{folder / artifact.PARAMS}: {error}") from None
    coded = [_coded(one) for one in tensors]
    parts = {**_streams(tensors, coded), **{FILES + name: (folder / name).read_bytes() for name in names}}
    content = _zip([_described(one, code) for one, code in zip(tensors, coded)], parts)
    _prove(content, folder, [*names, artifact.PARAMS])
    files.write_bytes(output, content)
    fp32 = 4 * sum(math.prod(one.shape) for one in tensors)
    return {
        "file": str(output),
        "size_bytes": len(content),
        "fp32_size_bytes": fp32,
        "size_ratio": fp32 / len(content),
        "matrices": _kinds([code for code in coded if code is not None]),
        "values": sum(math.prod(one.shape) for one, code in zip(tensors, coded) if code is None),
    }


def describe(summary: dict[str, Any]) -> list[str]:
    """What was packed, as a table."""
    lines = ["matrices      values  bits  a step for each  bytes before compression"]
    lines += [
        f"{kind['matrices']:8}  {kind['values']:10,}  {kind['bits']:4}  {kind['group']:15}  {kind['size_bytes']:,}"
        for kind in summary["matrices"]
    ]
    return [
        *lines,
        f"other values, as they are: {summary['values']:,}",
        f"size in MB: fp32 {summary['fp32_size_bytes'] / 1e6:.2f}, packed {summary['size_bytes'] / 1e6:.2f}",
        f"size_ratio: {summary['size_ratio']:.2f}",
        f"packed: {summary['file']} (expanded again: every byte is the same)",
    ]


def _coded(one: Parameter) -> Coded | None:
    if one.type not in parameters.MATRICES or len(one.shape) != 2:
        return None
    return codes.encode(np.frombuffer(one.data, parameters.MATRICES[one.type]).reshape(one.shape))


def _described(one: Parameter, code: Coded | None) -> dict[str, Any]:
    grid = None if code is None else {"group": code.group, "bits": code.bits, "levels": list(code.levels.shape)}
    return {"type": one.type, "shape": list(one.shape), "grid": grid}


def _streams(tensors: list[Parameter], coded: list[Coded | None]) -> dict[str, bytes]:
    low_bit = [code for code in coded if code is not None]
    streams = {
        "indices": b"".join(code.indices for code in low_bit),
        "levels": b"".join(code.levels.tobytes() for code in low_bit),
        "steps": b"".join(code.step.astype("<f4").tobytes() for code in low_bit),
        "values": b"".join(one.data for one, code in zip(tensors, coded) if code is None),
    }
    return {f"parameters/{name}": streams[name] for name in STREAMS}


def _zip(described: list[dict[str, Any]], parts: dict[str, bytes]) -> bytes:
    listed = {
        name: {"size_bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()} for name, part in parts.items()
    }
    index = {"format": FORMAT, "version": VERSION, "parts": listed, "parameters": described}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in {INDEX: json.dumps(index).encode("utf-8"), **parts}.items():
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, part, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def _prove(content: bytes, folder: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch, "again")
        expand_content(content, "the packed artifact", again)
        for name in names:
            if files.sha256(again / name) != files.sha256(folder / name):
                raise RuntimeError(f"{folder / name}: what was packed expands to other bytes")


def _kinds(coded: list[Coded]) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, int], dict[str, Any]] = {}
    for code in coded:
        new = {"group": code.group, "bits": code.bits, "matrices": 0, "values": 0, "size_bytes": 0}
        kind = kinds.setdefault((code.group, code.bits), new)
        kind["matrices"] += 1
        kind["values"] += math.prod(code.shape)
        kind["size_bytes"] += codes.size_bytes(code)
    return list(kinds.values())
