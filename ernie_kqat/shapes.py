"""The few shapes in which batches meet the engine, and what a batch of padded rows is.

Speed on this engine is a matter of shapes: oneDNN builds its primitives anew for every shape it has not kept, which makes a
sentence take three times as long. So few shapes are let happen, and all of them are kept: lengths are rounded up
to a multiple of LENGTH_STEP tokens, rows to a power of two. Padding changes no answer: a padded token gets a weight of
exp(-1e4) = 0 in the attention, and a padded row is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTH_STEP = 4  # tokens: more pads more in batches, fewer never stops meeting new shapes, each of which is kept


def padded_length(tokens: int, max_length: int) -> int:
    """`tokens` rounded up, but not beyond what the model takes."""
    return min(-(-tokens // LENGTH_STEP) * LENGTH_STEP, max_length)


def padded_rows(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def pad(rows: Sequence[np.ndarray], pad_token_id: int, max_length: int) -> np.ndarray:
    """int64 [2, padded rows, padded tokens] of rows int64 [2, tokens]: input_ids and token_type_ids."""
    length = padded_length(max(row.shape[1] for row in rows), max_length)
    return _filled(rows, padded_rows(len(rows)), length, pad_token_id)


def join(rows: Sequence[np.ndarray], pad_token_id: int, max_length: int) -> np.ndarray:
    """int64 [2, rows, longest] of rows int64 [2, tokens]: for an engine that knows no shapes."""
    return _filled(rows, len(rows), max(row.shape[1] for row in rows), pad_token_id)


def starts(lengths: Sequence[int], per_token: bool) -> np.ndarray:
    """Where the logits of each row begin, and where the last end, int64 [rows + 1]: one position a row, or one a token."""
    return np.concatenate([[0], np.cumsum(lengths)]) if per_token else np.arange(len(lengths) + 1)


def put(outputs: np.ndarray, rows: Sequence[int] | np.ndarray, places: np.ndarray, logits: np.ndarray) -> None:
    """Write a batch's outputs, [≥ rows, outputs] or [≥ rows, ≥ tokens, outputs], to `logits` [positions, outputs].

    rows: their numbers; places: `starts` of all rows.
    """
    if outputs.ndim == 2:
        logits[rows] = outputs[: len(rows)]
        return
    for output, row in zip(outputs, rows):
        begin, end = places[row], places[row + 1]
        logits[begin:end] = output[: end - begin]


def _filled(rows: Sequence[np.ndarray], count: int, length: int, pad_token_id: int) -> np.ndarray:
    batch = np.zeros((2, count, length), np.int64)
    batch[0] = pad_token_id
    for index, row in enumerate(rows):
        batch[:, index, : row.shape[1]] = row
    return batch
