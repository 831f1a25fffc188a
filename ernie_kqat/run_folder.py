"""The run folder: resolved.yaml, plan.txt, train.log, metrics.jsonl, kurtosis.json, summary.json, best_model/, checkpoints/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from . import config, files, parallel, strict
from .errors import UserError

BEST, CHECKPOINTS, RESOLVED, SUMMARY = "best_model", "checkpoints", "resolved.yaml", "summary.json"
QUANTIZERS = "quantizers.npz"  # in best_model/: the quantizers' buffers, beside PaddleNLP's fp32 weights
CONTENTS = (RESOLVED, SUMMARY, "plan.txt", "train.log", "metrics.jsonl", "kurtosis.json", BEST, CHECKPOINTS, "vdl")


class RunFolder:
    """Writes what a run says and leaves behind. Making one only checks; `open` touches the disk."""

    def __init__(self, path: str | Path, settings: config.Config, resume: bool = False, overwrite: bool = False):
        self.path, self.settings = Path(path), settings
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"Global.output_dir: {self.path} is a file; a folder is needed")
        used = (self.path / RESOLVED).exists()
        if resume:
            self._check_same(settings, used)
        elif used and not overwrite:
            raise UserError(
                f"{self.path}: already holds a run; --resume continues it, --overwrite replaces it, or -o Global.output_dir=DIR"
            )
        self._replaces = used and not resume

    def open(self) -> None:
        """Clear what is to be overwritten and what a killed process left half written, and write resolved.yaml.

        Of several processes the first does it, and only the first writes.
        """
        if not parallel.is_first():
            return
        if self._replaces:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        files.sweep(self.path)
        files.sweep(self.checkpoints)
        tree = strict.to_tree(self.settings)
        files.write_text(self.path / RESOLVED, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def line(self, text: str) -> None:
        """Print a log line and keep it in train.log."""
        if not parallel.is_first():
            return
        tqdm.write(text)
        with open(self.path / "train.log", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def metric(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        if not parallel.is_first():
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run writes them again. A last line cut by a crash goes too."""
        path = self.path / "metrics.jsonl"
        if not path.exists() or not parallel.is_first():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        files.write_text(path, "".join(kept))

    def _check_same(self, settings: config.Config, used: bool) -> None:
        if not used:
            raise UserError(f"{self.path}: no run to resume here (no {RESOLVED})")
        before = _flat(strict.to_tree(read_settings(self.path)))
        now = _flat(strict.to_tree(settings))
        free = {"Global.output_dir", "Global.log_every", "Global.visualdl"}
        differing = [k for k in sorted({*before, *now} - free) if before.get(k) != now.get(k)]
        if differing:
            said = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in differing)
            raise UserError(f"{self.path}: cannot resume with another config: {said}")

    def _clear(self) -> None:
        for name in CONTENTS:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, sub in tree.items()
        for key, value in _flat(sub, f"{prefix}.{name}" if prefix else name).items()
    }


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run."""
    return Path(path, RESOLVED).is_file()


def read_settings(path: str | Path) -> config.Config:
    """The config a run was trained with."""
    if not is_run(path):
        raise UserError(f"{path}: not a run folder (no {RESOLVED}; tools/train.py makes one)")
    return config.load(Path(path, RESOLVED))


def write_quantizers(folder: Path, buffers: dict[str, np.ndarray]) -> None:
    """Store quantizer buffers in a model folder under construction."""
    np.savez(folder / QUANTIZERS, **buffers)


def read_quantizers(folder: Path) -> dict[str, np.ndarray]:
    """The quantizer buffers of a run's best_model/."""
    path = folder / QUANTIZERS
    if not path.is_file():
        raise UserError(f"{path}: missing: the run was not quantized, or its best_model was copied without it")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None
