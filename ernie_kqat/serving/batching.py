"""Rows that wait for a worker, and which of them make the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .models import Model

SPREAD = 16  # tokens by which the rows of a batch may differ: a forward of its own costs as much as padding by more
WINDOW = 1024  # oldest rows that are looked through for a batch


@dataclass(eq=False)
class Job:
    """The rows of one request. `done` gets float32 logits [rows, classes], whole, or an error."""

    model: Model
    rows: list[np.ndarray]
    done: asyncio.Future
    logits: list[np.ndarray] = field(init=False)
    left: int = field(init=False)

    def __post_init__(self):
        self.left = len(self.rows)
        self.logits = [np.empty(0)] * self.left


@dataclass(eq=False)
class Row:
    """One row of a job. `alone`: its worker died, perhaps because of it; it may not take other rows with it again."""

    job: Job
    index: int
    since: float  # seconds of the event loop's clock
    alone: bool = False

    @property
    def ids(self) -> np.ndarray:
        return self.job.rows[self.index]

    def answer(self, logits: np.ndarray) -> None:
        """Keep the row's logits; the last row of a job finishes it."""
        job = self.job
        job.logits[self.index] = logits
        job.left -= 1
        if not job.left and not job.done.done():
            job.done.set_result(np.stack(job.logits))

    def fail(self, error: Exception) -> None:
        if not self.job.done.done():
            self.job.done.set_exception(error)


class Waiting:
    """Rows in the order of their arrival."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def oldest(self) -> Row:
        return self._rows[0]

    def add(self, rows: list[Row], first: bool = False) -> None:
        """At the end, or before all others."""
        if first:
            self._rows[:0] = rows
        else:
            self._rows += rows

    def drop(self) -> None:
        """Forget rows whose job is over: answered by an error, out of time, or nobody waits for it."""
        self._rows = [row for row in self._rows if not row.job.done.done()]

    def companions(self, most: int) -> list[Row]:
        """The oldest row, and of those that can share a batch with it the ones nearest in length: `most` rows at most."""
        oldest = self._rows[0]
        if oldest.alone or most == 1:
            return [oldest]
        tokens, model = oldest.ids.shape[1], oldest.job.model
        near = [
            (abs(row.ids.shape[1] - tokens), place, row)
            for place, row in enumerate(self._rows[:WINDOW])
            if row.job.model is model and not row.alone and abs(row.ids.shape[1] - tokens) <= SPREAD
        ]
        near.sort()
        return [row for _, _, row in near[:most]]

    def take(self, rows: list[Row]) -> None:
        """Remove these rows, all of them from the oldest WINDOW."""
        taken = set(map(id, rows))
        self._rows[:WINDOW] = [row for row in self._rows[:WINDOW] if id(row) not in taken]


def size(companions: int, idle_workers: int) -> int:
    """Rows of the next batch: an idle worker's share, and a power of two, so that no row is computed for nothing."""
    share = -(-companions // idle_workers)
    return 1 << (share.bit_length() - 1)
