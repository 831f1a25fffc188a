"""Latency of predictors, measured so that it can be compared: interleaved passes over real rows, after a warm-up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from .errors import UserError
from .machine import machine, versions

if TYPE_CHECKING:
    from .predictor import Predictor, TokenIds

__all__ = ["latency_ms", "load_ms", "machine", "versions"]

Rows = Sequence["tuple[TokenIds, TokenIds]"]


def latency_ms(
    predictors: Mapping[str, Predictor],
    encoded: Rows | Mapping[str, Rows],
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 5,
    enough_s: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Milliseconds a sentence of each predictor at each batch size, on rows (input_ids, token_type_ids).

    `encoded` are the rows of all, or of each by name. Tokenization is not included, checking and padding of the ids is.
    One pass to warm up, then `repeats` passes over all rows, the predictors taking turns (A B A B), so that a
    machine that slows down slows all of them. A batch size measured for `enough_s` seconds gets no more passes.
    For each name and batch size N:

    batch_N             the median: of all calls for N = 1, else of the passes
    batch_N_spread      (slowest pass - fastest pass) / median pass: what a difference has to exceed to mean anything
    batch_N_per_second  sentences a second, of the median pass
    batch_1_p90, _p99   percentiles of all calls
    """
    rows = encoded if isinstance(encoded, Mapping) else dict.fromkeys(predictors, encoded)
    if repeats < 1:
        raise UserError(f"repeats: {repeats} is under 1")
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch sizes: {list(batch_sizes)}; one or more of 1 and above are needed")
    for name in predictors:
        if len(rows[name]) == 0:
            raise UserError(f"{name}: no rows to measure on")
    found: dict[str, dict[str, float]] = {name: {} for name in predictors}
    total = len(batch_sizes) * (repeats + 1) * len(predictors)
    with tqdm(total=total, desc="measure", unit="pass", disable=None, leave=False) as bar:
        for size in batch_sizes:
            calls: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
            start = time.perf_counter()
            for repeat in range(repeats + 1):
                if repeat > 1 and time.perf_counter() - start > enough_s:
                    bar.update((repeats + 1 - repeat) * len(predictors))
                    break
                for name, predictor in predictors.items():
                    times = _pass(predictor, rows[name], size)
                    if repeat:
                        calls[name].append(times)
                    bar.update()
            for name in predictors:
                found[name].update(_figures(size, np.array(calls[name]), len(rows[name])))
    return found


def load_ms(loads: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """The median of `repeats` milliseconds that each function takes, called in turn after one call of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in loads}
    for repeat in range(repeats + 1):
        for name, load in loads.items():
            start = time.perf_counter()
            load()
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(found)) for name, found in times.items()}


def _pass(predictor: Predictor, rows: Rows, size: int) -> np.ndarray:
    """Milliseconds of each call: one a row at batch size 1, else one for all rows."""
    calls = [[row] for row in rows] if size == 1 else [rows]
    times = []
    for call in calls:
        start = time.perf_counter()
        predictor.logits(call, batch_size=size)
        times.append((time.perf_counter() - start) * 1e3)
    return np.array(times)


def _figures(size: int, calls: np.ndarray, rows: int) -> dict[str, float]:
    """Of milliseconds [passes, calls]."""
    passes = calls.sum(axis=1) / rows
    median = float(np.median(passes))
    figures = {
        f"batch_{size}": float(np.median(calls)) if size == 1 else median,
        f"batch_{size}_spread": float((passes.max() - passes.min()) / median),
        f"batch_{size}_per_second": 1e3 / median,
    }
    if size == 1:
        figures["batch_1_p90"], figures["batch_1_p99"] = (float(value) for value in np.percentile(calls, (90, 99)))
    return figures
