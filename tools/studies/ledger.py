"""The rows of a study: a JSON list that grows by one finished row at a time, so that whatever ends a study costs one row."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ernie_kqat
from ernie_kqat import benchmark, config, files
from ernie_kqat.trainer import train

ROOT = Path(__file__).parents[2]


class Ledger:
    """Rows in `path`; several processes may append, one waiting for the other."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = Path("output/studies") / f"{path.stem}.lock"

    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows())

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, and what made it; print it."""
        row = {**row, "ernie_kqat": ernie_kqat.__version__, "machine": benchmark.machine()["cpu"]}
        with alone(self._lock):
            files.write_json(self.path, [*self.rows(), row])
        print(json.dumps(row), flush=True)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def trained(folder: Path, settings: str, override: list[str], names: dict[str, str]) -> dict[str, Any]:
    """Train by a config of the repository unless `folder` holds the finished run; what a row says of it.

    names: what places are called in the row's command, which is to be typed elsewhere. A process that wants the run that another
    one is training waits for it.
    """
    with alone(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "summary.json").is_file():
            train(config.load(ROOT / settings, override), overwrite=True)
            shutil.rmtree(folder / "checkpoints")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    command = shlex.join(["tools/train.py", "-c", settings, "-o", *override])
    for place, name in names.items():
        command = command.replace(place, name)
    return {"train_steps": summary["steps"], "seconds": summary["seconds"], "command": f"python {command}"}


def percent(values: list[float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"
