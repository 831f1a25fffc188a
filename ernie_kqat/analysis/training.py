"""What a run left of itself: losses, kurtosis against target, gradient norms over training, and the trade-off it ended at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import run_folder
from ..errors import UserError

Curve = list[tuple[int, float]]  # (optimizer step, value)
NORMS = ("kurtosis_grad_norm", "task_grad_norm")


@dataclass(frozen=True)
class Training:
    """Curves of a run. `kurtosis`: {layer: K}; `targets`: {layer: T}; `norms`: of the two gradients, where logged."""

    loss: Curve
    accuracy: Curve
    kurtosis: dict[str, Curve]
    targets: dict[str, float]
    norms: dict[str, Curve]


def read(run: str | Path) -> Training:
    """The curves of a run's metrics.jsonl; UserError for a line that is not JSON."""
    loss: Curve = []
    accuracy: Curve = []
    kurtosis: dict[str, Curve] = {}
    targets: dict[str, float] = {}
    norms: dict[str, Curve] = {}
    for row in _rows(Path(run, "metrics.jsonl")):
        step = row["step"]
        if "loss" in row:
            loss.append((step, row["loss"]))
        if "eval_accuracy" in row:
            accuracy.append((step, row["eval_accuracy"]))
        for name, values in row.get("layers", {}).items():
            kurtosis.setdefault(name, []).append((step, values["kurtosis"]))
            targets[name] = values["target"]
        for name in NORMS:
            if name in row:
                norms.setdefault(name, []).append((step, row[name]))
    return Training(loss, accuracy, kurtosis, targets, norms)


def trade_off(run: str | Path) -> dict[str, dict[str, float]]:
    """{fp32 | simulated | deployed: {accuracy, agreement_with_fp32, batch_1, batch_32 (ms a sentence), size_bytes}} of
    summary.json, as far as the run was exported; empty before that."""
    path = Path(run, run_folder.SUMMARY)
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    found = {}
    for name in ("fp32", "simulated", "deployed"):
        if isinstance(summary.get(name), dict):
            values = {**summary[name], **(summary[name].get("latency_ms") or {})}
            keys = ("accuracy", "agreement_with_fp32", "batch_1", "batch_32", "size_bytes")
            found[name] = {key: values[key] for key in keys if values.get(key) is not None}
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a row of metrics (a JSON object with `step`)") from None
        yield row
