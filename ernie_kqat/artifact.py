"""The artifact folder: the only contract between training and serving. This module reads and writes its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import files
from .errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, PARAMS = "inference.pdmodel", "inference.pdiparams"
NATIVE = "native"  # folder of the native program, and the manifest's key for the name of its output; many have none
TENSORRT = "tensorrt_int8"  # the manifest's engine of a program for TensorRT
SHAPES = "shapes.pbtxt"  # the shapes that such a program is made ready for
SERVING_CONF = "serving_server_conf.prototxt"
REQUIRED = (
    "engine",
    "labels",
    "pair",
    "max_length",
    "pad_token_id",
    "vocab_size",
    "type_vocab_size",
    "tokenizer",
    "inputs",
    "output",
    "files",
    "verification",
)


def write_manifest(folder: Path, fields: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Write manifest.json with `fields` and the sha256 and size of each named file of the folder; returns it."""
    listed = {
        name: {"sha256": files.sha256(folder / name), "size_bytes": (folder / name).stat().st_size}
        for name in sorted(names)
    }
    manifest = {"format": FORMAT, **fields, "files": listed}
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path, check_hashes: bool = True) -> dict[str, Any]:
    """The manifest of an artifact folder.

    Raises UserError if the folder or a file is missing, the format is not ours, or a file's hash is not the manifest's.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such artifact folder (tools/export.py makes one)")
    if not path.is_file():
        raise UserError(f"{folder}: not an artifact: it has no {MANIFEST} (tools/export.py makes one)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(f"{path}: format {found!r}; this version reads format {FORMAT}")
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise UserError(f"{path}: missing keys: {', '.join(missing)}")
    for name, listed in manifest["files"].items():
        _check_file(folder / name, listed, check_hashes)
    return manifest


def check_verified(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Raise UserError unless the export's verification was made and passed."""
    verification = manifest["verification"]
    if verification and verification["passed"]:
        return
    why = "its verification failed" if verification else "it was never verified"
    raise UserError(f"{folder}: {why}; tools/export.py verifies, allow_unverified=True loads it all the same")


def _check_file(path: Path, listed: dict[str, Any], check_hashes: bool) -> None:
    if not path.is_file():
        raise UserError(f"{path}: listed in {MANIFEST} but missing")
    size = path.stat().st_size
    if size != listed["size_bytes"]:
        raise UserError(
            f"{path}: {size} bytes, where {MANIFEST} says {listed['size_bytes']}: the file was changed or cut"
        )
    if check_hashes and files.sha256(path) != listed["sha256"]:
        raise UserError(f"{path}: its sha256 is not the one in {MANIFEST}: the file was changed after the export")


def contents(folder: Path) -> list[str]:
    """The names of all files of the folder and its native folder."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def is_native(manifest: dict[str, Any]) -> bool:
    """Whether the artifact holds a native program beside the plain one."""
    return NATIVE in manifest


def has_plain(manifest: dict[str, Any]) -> bool:
    """Whether the artifact holds the plain program: `Export.plain: false` leaves it out."""
    return MODEL in manifest["files"]


def drop_plain(folder: Path, manifest: dict[str, Any]) -> None:
    """Take the plain program out of the folder and of the manifest's list of files; the manifest is not written."""
    for name in (MODEL, PARAMS):
        (folder / name).unlink()
        del manifest["files"][name]


def is_artifact(folder: str | Path) -> bool:
    """Whether the folder has a manifest."""
    return Path(folder, MANIFEST).is_file()
