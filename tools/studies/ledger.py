"""The rows of a study: a JSON list that grows by one finished row at a time, so that whatever ends a study costs one row."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import ernie_kqat
from ernie_kqat import benchmark, files


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
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files.write_json(self.path, [*self.rows(), row])
        print(json.dumps(row), flush=True)
