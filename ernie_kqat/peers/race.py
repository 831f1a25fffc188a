"""Engines measured side by side: rows, turns, figures."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import config
from ..benchmark import machine, versions
from ..data.dataset import Split, find_file, load_eval_split
from ..errors import UserError
from ..evaluate import accuracy, comparison
from ..models.folder import labels_of, task_of
from ..tasks import find, only_classification
from ..tokenizer import load_tokenizer
from . import environment, roofline
from .candidates import CALIBRATION_ROWS, FP32, NATIVE, OURS, PLAIN, Candidate, pairs_of, prepare
from .engines import worker

BATCHES = (1, 8, 32)
LENGTHS = ("natural", "32", "64", "128")  # tokens
ACCURACY_LOSS = 0.003  # of fp32's: more than that is another model, however fast


def run(
    model: str, data: str, peers: list[str], slim: config.Slim, rows: int = 256, repeats: int = 5, threads: int = 1
) -> dict[str, Any]:
    """Race every engine over BATCHES x LENGTHS on `threads` cores. Returns what results.json holds.

    model: an fp32 folder with a classifier. data: a folder with train and dev files; INT8 is calibrated on the one,
    accuracy and time are measured on the other. Raises UserError for what cannot be read, converted or run.
    """
    dev, calibration = _splits(model, Path(data))
    pairs = pairs_of(dev)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        candidates = prepare(model, calibration, dev, slim, peers, work)
        measured = lengths_of(pairs, rows)
        worker.write_rows(str(work / "rows.npz"), {"all": pairs, **measured})
        with contextlib.ExitStack() as stack:
            engines = {one.name: stack.enter_context(_started(one, work, threads)) for one in candidates}
            about = _answers(engines, dev, work)
            cells = _cells(engines, {length: len(of) for length, of in measured.items()}, repeats)
        limits = roofline.measure(threads)
        found = {
            "model": Path(model).name,
            "data": f"{Path(data).name}/{dev.name}",
            "rows": min(rows, len(pairs)),
            "threads": threads,
            "repeats": repeats,
            "machine": machine(),
            "versions": versions(),
            "engines": about,
            "cells": cells,
            "roofline": roofline.shares(model, limits, cells, (NATIVE, PLAIN)),
        }
    return {**found, "summary": summary(about, cells)}


def _splits(model: str, data: Path) -> tuple[Split, Split]:
    only_classification(find(task_of(Path(model)))(), "the comparison with other engines")
    tokenizer, labels, max_length = load_tokenizer(model), labels_of(Path(model)), 128

    def split(name: str, rows: int | None) -> Split:
        return load_eval_split(find_file(data, name, None), tokenizer, labels, max_length, rows=rows)

    return split("dev", None), split("train", CALIBRATION_ROWS)


def lengths_of(pairs: list[np.ndarray], rows: int) -> dict[str, list[np.ndarray]]:
    """The rows of each of LENGTHS: the first `rows` as they come, and about as many tokens in rows of one length.

    A row of a fixed length is the text of one row after another, cut, between the first row's first and last tokens.
    """
    natural = pairs[:rows]
    text = np.concatenate([row[:, 1:-1] for row in pairs], axis=1)
    tokens = sum(row.shape[1] for row in natural)
    found = {"natural": natural}
    for length in map(int, LENGTHS[1:]):
        count = max(max(BATCHES), tokens // length // max(BATCHES) * max(BATCHES))
        body = np.resize(text[0], count * (length - 2)).reshape(count, length - 2)
        start, end = natural[0][0, 0], natural[0][0, -1]
        ids = np.concatenate([np.full((count, 1), start), body, np.full((count, 1), end)], axis=1)
        found[str(length)] = [np.stack([row, np.zeros_like(row)]) for row in ids]
    return found


class _Engine:
    """A worker process, asked a line at a time."""

    def __init__(self, name: str, process: subprocess.Popen, errors: Path):
        self.name, self._process, self._errors = name, process, errors
        self.ready = self._answer()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code, said = self._process.wait(), self._errors.read_text(encoding="utf-8", errors="replace").strip()
            raise UserError(f"{self.name}: its process ended with code {code}: {said[-800:]}")
        return json.loads(line)


@contextlib.contextmanager
def _started(candidate: Candidate, work: Path, threads: int) -> Iterator[_Engine]:
    errors = work / f"{candidate.name}.log"
    command = [candidate.python, str(candidate.script), candidate.name, str(candidate.folder), str(work / "rows.npz")]
    ours = {} if candidate.script.stem == "run_paddle" else environment.plain()
    variables = {**(ours or os.environ), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    with open(errors, "wb") as log:
        process = subprocess.Popen(
            [*command, str(threads)], stdin=pipe, stdout=pipe, stderr=log, text=True, env=variables
        )
    with process:
        try:
            yield _Engine(candidate.name, process, errors)
        finally:
            process.kill()


def _answers(engines: dict[str, _Engine], dev: Split, work: Path) -> dict[str, dict[str, Any]]:
    """Accuracy, and agreement with fp32, of each engine on all of dev."""
    logits = {}
    for number, (name, engine) in enumerate(engines.items()):
        path = work / f"logits{number}.npy"
        engine.ask({"rows": "all", "logits": str(path)})
        logits[name] = np.load(path)
    return {
        name: {
            "accuracy": None if dev.labels is None else accuracy(found, dev.labels),
            "commonest_label": None if dev.labels is None else float(np.bincount(dev.labels).max() / len(dev)),
            "agreement_with_fp32": comparison(found, logits[FP32])["agreement"],
            **engines[name].ready,
        }
        for name, found in logits.items()
    }


def _cells(engines: dict[str, _Engine], rows: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """Figures of each batch size and length: one pass to warm up, then `repeats`, the engines taking turns."""
    cells = []
    grid = [(length, batch) for length in LENGTHS for batch in BATCHES]
    with tqdm(total=len(grid) * (repeats + 1) * len(engines), desc="race", unit="pass", disable=None) as bar:
        for length, batch in grid:
            calls: dict[str, list] = {name: [] for name in engines}
            for repeat in range(repeats + 1):
                for name, engine in engines.items():
                    times = engine.ask({"rows": length, "batch": batch})["ms"]
                    if repeat:
                        calls[name].append(times)
                    bar.update()
            figures = {name: figures_of(np.array(times), rows[length]) for name, times in calls.items()}
            cells.append({"length": length, "batch": batch, "engines": figures})
    return cells


def figures_of(calls: np.ndarray, rows: int) -> dict[str, float]:
    """Of milliseconds [passes, calls] over `rows` sentences: `ms` a sentence in the median pass, its spread, percentiles
    of calls."""
    passes = calls.sum(axis=1) / rows
    p50, p90, p99 = np.percentile(calls, (50, 90, 99))
    median = float(np.median(passes))
    spread = float((passes.max() - passes.min()) / median)
    return {"ms": median, "spread": spread, "p50_call": float(p50), "p90_call": float(p90), "p99_call": float(p99)}


def summary(about: dict[str, dict[str, Any]], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of the best peer's time to ours: above 1, ours is faster."""
    ours = recommended(about, cells)
    found: dict[str, Any] = {"recommended": ours}
    families = sorted({name.split()[0] for name in about if name not in OURS})
    for family in families:
        names = [name for name in about if name.split()[0] == family]
        for engine, prefix in ((ours, ""), (PLAIN, "plain_")):
            ratios = {(cell["length"], cell["batch"]): _best(cell, names) / _best(cell, [engine]) for cell in cells}
            found[f"{prefix}geomean_vs_{family}"] = geomean(ratios.values())
            found[f"{prefix}worst_vs_{family}"] = min(ratios.values())
            found[f"{prefix}batch_1_natural_vs_{family}"] = ratios["natural", 1]
            batched = [ratio for (_, batch), ratio in ratios.items() if batch > 1]
            found[f"{prefix}batched_worst_vs_{family}"] = min(batched)
            found[f"{prefix}batched_geomean_vs_{family}"] = geomean(batched)
    fp32 = {(cell["length"], cell["batch"]): _best(cell, [FP32]) / _best(cell, [ours]) for cell in cells}
    found["geomean_vs_paddle_fp32"] = geomean(fp32.values())
    found["batch_32_vs_paddle_fp32"] = geomean([ratio for (_, batch), ratio in fp32.items() if batch == 32])
    (natural,) = [cell for cell in cells if (cell["length"], cell["batch"]) == ("natural", 1)]
    times = natural["engines"][ours]
    found["batch_1_natural_p99_over_p50"] = times["p99_call"] / times["p50_call"]
    return found


def recommended(about: dict[str, dict[str, Any]], cells: list[dict[str, Any]]) -> str:
    """The faster of our INT8 engines, of those as accurate as fp32 but for ACCURACY_LOSS; of both, if none is, or if the fp32
    model is no better than one that always says the commonest label: its accuracy says nothing."""
    accuracy, commonest = about[FP32]["accuracy"] or 0.0, about[FP32].get("commonest_label") or 0.0
    floor = accuracy - ACCURACY_LOSS if accuracy > commonest else 0.0
    good = [name for name in (NATIVE, PLAIN) if (about[name]["accuracy"] or 0.0) >= floor] or [NATIVE, PLAIN]
    return min(good, key=lambda name: geomean([_best(cell, [name]) for cell in cells]))


def _best(cell: dict[str, Any], names: list[str]) -> float:
    return min(cell["engines"][name]["ms"] for name in names)


def geomean(values) -> float:
    """The geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(list(values)))))
