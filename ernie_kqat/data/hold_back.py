"""One file of labelled rows -> a train and a dev file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from .. import files
from ..errors import UserError
from .readers import Example, read_examples


def hold_back(
    source: str | Path,
    output: str | Path,
    share: float = 0.1,
    seed: int = 42,
    columns: tuple[str | None, str | None, str | None] = (None, None, None),
) -> list[str]:
    """Write `output`/train.jsonl and dev.jsonl, with a random `share` of the rows of each label in dev; returns lines to print.

    Rows with equal texts stay together, on the train side where they are many, so that dev holds nothing that was trained on.
    columns: names of the text, the second text and the label, where they are not found by their names. Raises UserError for
    rows that cannot be read, a share that is not one, a label of a single row, and files that are already there.
    """
    if not 0 < share < 1:
        raise UserError(f"--dev: {share} is not a share between 0 and 1")
    output = Path(output)
    there = [name for name in ("train.jsonl", "dev.jsonl") if (output / name).exists()]
    if there:
        raise UserError(f"{output / there[0]}: already there; name another folder")
    rows = read_examples(source, *columns)
    dev = _chosen(rows, share, seed, str(source))
    for name, held in (("train", False), ("dev", True)):
        lines = [_line(row) for row, chosen in zip(rows, dev) if chosen == held]
        files.write_text(output / f"{name}.jsonl", "".join(lines))
    said = [f"{name}: {count} rows, {held} of them in dev" for name, count, held in _counts(rows, dev)]
    return [*said, f"{output}: {len(rows) - sum(dev)} train rows, {sum(dev)} dev rows"]


def _chosen(rows: list[Example], share: float, seed: int, source: str) -> list[bool]:
    """Whether each row is held back."""
    same: dict[tuple[str, str | None], list[int]] = {}
    for index, row in enumerate(rows):
        same.setdefault((row.text, row.text_pair), []).append(index)
    alone: dict[str, list[int]] = {}
    for indices in same.values():
        if len(indices) == 1:
            alone.setdefault(rows[indices[0]].label or "", []).append(indices[0])
    counts = Counter(row.label or "" for row in rows)
    dev = np.zeros(len(rows), bool)
    rng = np.random.default_rng(seed)
    for label, count in sorted(counts.items()):
        able = alone.get(label, [])
        if count < 2 or not able:
            raise UserError(
                f"{source}: label {label!r} has {count} rows, {len(able)} of them unique: none can be held back"
            )
        wanted = min(max(1, round(share * count)), len(able), count - 1)
        dev[rng.choice(able, wanted, replace=False)] = True
    return dev.tolist()


def _counts(rows: list[Example], dev: list[bool]) -> list[tuple[str, int, int]]:
    labels = Counter(row.label or "" for row in rows)
    held = Counter(row.label or "" for row, chosen in zip(rows, dev) if chosen)
    return [(f"label {label}", count, held[label]) for label, count in sorted(labels.items())]


def _line(row: Example) -> str:
    fields = {"text": row.text, "text_pair": row.text_pair, "label": row.label}
    return json.dumps({key: value for key, value in fields.items() if value is not None}, ensure_ascii=False) + "\n"
