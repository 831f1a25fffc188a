"""Scores kept in one JSON file: each is written as soon as it is measured, and not measured again."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import files, run_folder
from ..data.dataset import find_file
from ..errors import UserError
from ..machine import machine, versions
from ..models.folder import WEIGHTS
from .workbench import Score

log = logging.getLogger(__name__)


class Rows:
    """{tool, inputs: {path: sha256}, runs: [{command, versions, machine}], rows: [{key, score, run}]} in `path`.

    `run` of a row says which of `runs` measured it. Raises UserError for a file that `tool` did not write.
    """

    def __init__(self, path: str | Path, tool: str):
        self.path = Path(path)
        self.tree: dict[str, Any] = {"tool": tool, "inputs": {}, "runs": [], "rows": []}
        if self.path.is_dir():
            raise UserError(f"{path}: a folder; name a JSON file")
        if self.path.exists():
            self.tree = read(self.path, tool)
        self._run = here()

    def inputs(self, digests: Mapping[str, str]) -> None:
        """Declare the files behind the paths that keys name; rows of a path whose content has changed are dropped."""
        changed = {path for path, digest in digests.items() if self.tree["inputs"].get(path, digest) != digest}
        kept = [row for row in self.tree["rows"] if not changed & {v for v in row["key"].values() if type(v) is str}]
        if len(kept) < len(self.tree["rows"]):
            log.info("%s: %s changed since; measured again", self.path, " and ".join(sorted(changed)))
        self.tree["rows"] = kept
        self.tree["inputs"] = {**self.tree["inputs"], **digests}

    def find(self, key: Mapping[str, Any]) -> Score | None:
        """The score of `key`, if it was measured."""
        wanted = _plain(key)
        return next((Score(**row["score"]) for row in self.tree["rows"] if row["key"] == wanted), None)

    def score(self, key: Mapping[str, Any], measure: Callable[[], Score]) -> Score:
        """The score of `key`: what is there, or else what `measure` gives, which is on disk before this returns."""
        found = self.find(key)
        if found is None:
            found = measure()
            if self._run not in self.tree["runs"]:
                self.tree["runs"].append(self._run)
            row = {"key": _plain(key), "score": dataclasses.asdict(found), "run": self.tree["runs"].index(self._run)}
            self.tree["rows"].append(row)
            files.write_json(self.path, self.tree)
        return found

    def note(self, name: str, value: Any) -> None:
        """Keep something beside the rows."""
        self.tree[name] = value
        files.write_json(self.path, self.tree)


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """As the file has it: tuples are lists."""
    return json.loads(json.dumps(key))


def read(path: Path, tool: str) -> dict[str, Any]:
    """The content of a file of `tool`; UserError for any other file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or name another file") from None
    check(tree, tool, str(path))
    return tree


def check(tree: Any, tool: str, source: str) -> None:
    """UserError unless `tree` is what `tool` writes."""
    found = tree.get("tool") if isinstance(tree, dict) else None
    if found != tool:
        raise UserError(f"{source}: not a result of tools/{tool}.py" + (f", but of tools/{found}.py" if found else ""))


def here() -> dict[str, Any]:
    """The command line of this process as one would type it, versions, machine."""
    command = shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "versions": versions(), "machine": machine()}


def digests(model: str | Path, *data: Path | None) -> dict[str, str]:
    """{path: sha256} of the weights, and quantizers if any, of a run or model folder, and of data files."""
    folder = Path(model, run_folder.BEST) if run_folder.is_run(model) else Path(model)
    parts = [files.sha256(folder / name) for name in (WEIGHTS, run_folder.QUANTIZERS) if (folder / name).is_file()]
    return {str(model): " ".join(parts), **{str(path): files.sha256(path) for path in data if path is not None}}


def data_file(option: str, path: str | Path, split: str = "dev") -> Path:
    """The file itself, or the `split` file of a folder; UserError naming `option` if there is none."""
    found = Path(path).expanduser()
    if found.is_dir():
        return find_file(found, split, None)
    if not found.is_file():
        raise UserError(f"{option}: {path}: no such file or folder")
    return found


def calibration_file(calibration: str | Path | None, data: Path) -> Path:
    """The rows that set activation ranges: `calibration` (a file, or a folder with a train file), or train beside `data`."""
    return data_file("--calibration", data.parent if calibration is None else calibration, "train")
