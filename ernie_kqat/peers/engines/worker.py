"""The loop of an engine's process: JSON lines in, JSON lines out. Needs the standard library and NumPy only.

  {"rows": "natural", "batch": 8}      one pass: {"ms": [of each call]}
  {"rows": "natural", "logits": FILE}  logits of all rows, in their order, to FILE (.npy): {}

Rows are int64 [2, tokens]: input_ids and token_type_ids. A pass at batch 1 takes them as they come, at larger batches
longest first, so that a batch has little padding; every engine gets the same batches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

Answer = Callable[[list], np.ndarray]  # rows of one batch -> logits [rows, classes]


def serve(load: Callable[[str, str, int], tuple[Answer, dict[str, str]]]) -> None:
    """Be the engine that the command line names: ENGINE FOLDER ROWS THREADS. `load` gives its Answer and its versions."""
    engine, folder, rows, threads = sys.argv[1], sys.argv[2], read_rows(sys.argv[3]), int(sys.argv[4])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what libraries print must not come between the answers
    os.dup2(2, 1)
    start = time.perf_counter()
    answer, versions = load(engine, folder, threads)
    answer(next(iter(rows.values()))[:1])
    _say(out, {"load_ms": (time.perf_counter() - start) * 1e3, "versions": versions})
    for line in sys.stdin:
        asked = json.loads(line)
        if "logits" in asked:
            np.save(asked["logits"], all_logits(answer, rows[asked["rows"]]))
            _say(out, {})
        else:
            _say(out, {"ms": one_pass(answer, rows[asked["rows"]], asked["batch"])})


def _say(out, value: dict) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


def read_rows(path: str) -> dict[str, list]:
    """{name: rows} of a file of `write_rows`."""
    with np.load(path) as stored:
        names = sorted({key.rpartition("/")[0] for key in stored})
        return {name: np.split(stored[f"{name}/ids"], stored[f"{name}/ends"][:-1], axis=1) for name in names}


def write_rows(path: str, rows: dict[str, list]) -> None:
    """Write {name: rows int64 [2, tokens]}."""
    arrays = {}
    for name, of in rows.items():
        arrays[f"{name}/ids"] = np.concatenate(of, axis=1)
        arrays[f"{name}/ends"] = np.cumsum([row.shape[1] for row in of])
    np.savez(path, **arrays)


def batches(rows: list, size: int) -> list[list[int]]:
    """Indices of each batch."""
    order = range(len(rows)) if size == 1 else sorted(range(len(rows)), key=lambda index: -rows[index].shape[1])
    return [list(order[start : start + size]) for start in range(0, len(rows), size)]


def one_pass(answer: Answer, rows: list, size: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for indices in batches(rows, size):
        batch = [rows[index] for index in indices]
        start = time.perf_counter()
        answer(batch)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def all_logits(answer: Answer, rows: list, size: int = 32) -> np.ndarray:
    """float32 [rows, classes]."""
    found: list = [None] * len(rows)
    for indices in batches(rows, size):
        for index, logits in zip(indices, answer([rows[index] for index in indices])):
            found[index] = logits
    return np.array(found, np.float32)


def padded(rows: list) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and token_type_ids, int64 [rows, longest]; the models' padding id is 0."""
    batch = np.zeros((2, len(rows), max(row.shape[1] for row in rows)), np.int64)
    for index, row in enumerate(rows):
        batch[:, index, : row.shape[1]] = row
    return batch[0], batch[1]
