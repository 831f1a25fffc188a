"""Which rows go together in a batch, and the batch itself: pure functions of lengths and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .tokenized import Split

UNLABELLED = -100  # the label of tokens that have none, which Paddle's cross-entropy leaves out
WINDOW_BATCHES = 50  # rows are sorted by length within so many batches; more saves little padding


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, bucket: bool = True
) -> list[np.ndarray]:
    """Row numbers of each batch of one epoch, the same for the same (seed, epoch); every row is in one batch.

    With `bucket`, rows of like length share a batch: the shuffled rows are sorted within windows of `WINDOW_BATCHES`
    batches, and the batches are shuffled again. The incomplete batch, if any, comes last.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not bucket:
        return _cut(order, batch_size)
    length = np.asarray(lengths)
    windows = _cut(order, batch_size * WINDOW_BATCHES)
    batches = [batch for rows in windows for batch in _cut(rows[np.argsort(length[rows], kind="stable")], batch_size)]
    full = len(lengths) // batch_size
    return [batches[index] for index in rng.permutation(full)] + batches[full:]


def eval_batches(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Row numbers of each batch, longest rows first: least padding, and what needs most memory is tried first."""
    return _cut(np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable"), batch_size)


def collate(split: Split, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> dict[str, np.ndarray]:
    """input_ids and token_type_ids, int64 [rows, tokens of the longest row], and the split's labels [rows, …].

    Where each token has a label, they are padded like the ids.
    """
    ids = [split.input_ids[row] for row in rows]
    shape = len(ids), max(len(row) for row in ids)
    batch = {"input_ids": np.full(shape, pad_token_id, np.int64), "token_type_ids": np.zeros(shape, np.int64)}
    for index, row in enumerate(rows):
        length = len(ids[index])
        batch["input_ids"][index, :length] = ids[index]
        batch["token_type_ids"][index, :length] = split.token_type_ids[row]
    if isinstance(split.labels, list):
        batch["labels"] = np.full(shape, UNLABELLED, np.int64)
        for index, row in enumerate(rows):
            batch["labels"][index, : len(split.labels[row])] = split.labels[row]
    elif split.labels is not None:
        batch["labels"] = split.labels[np.asarray(rows)]
    return batch


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
