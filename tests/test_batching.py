"""Batches: every row once, the same for the same seed, little padding, arrays as the model needs them."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_kqat.data.batching import collate, epoch_batches, eval_batches
from ernie_kqat.data.dataset import Split


def _lengths(rows: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, 128, rows).tolist()


def _padded(lengths, batches) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (1000, 7), (4321, 32), (1601, 32)])
def test_every_row_is_in_one_batch(rows, size, bucket):
    batches = epoch_batches(_lengths(rows), size, seed=1, epoch=0, bucket=bucket)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert [len(batch) for batch in batches] == [size] * (rows // size) + [rows % size] * (rows % size > 0)


def test_order_depends_on_seed_and_epoch_alone():
    lengths = _lengths(500)

    def order(seed, epoch):
        return np.concatenate(epoch_batches(lengths, 8, seed, epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 2) != order(2, 1)


def test_buckets_save_padding_and_stay_random():
    lengths = _lengths(20000)
    bucketed = epoch_batches(lengths, 32, 0, 0)
    assert _padded(lengths, bucketed) < 1.05 * sum(lengths)
    assert _padded(lengths, epoch_batches(lengths, 32, 0, 0, bucket=False)) > 1.8 * sum(lengths)
    means = np.array([np.mean([lengths[row] for row in rows]) for rows in bucketed[:-1]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15  # long batches do not follow long batches
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    first = {frozenset(rows.tolist()) for rows in bucketed}
    assert not first & {frozenset(rows.tolist()) for rows in epoch_batches(lengths, 32, 0, 1)}  # other company


def test_eval_batches_are_sorted_with_ties_in_order():
    lengths = [5, 9, 5, 7, 9]
    assert [rows.tolist() for rows in eval_batches(lengths, 2)] == [[1, 4], [3, 0], [2]]


def test_collate_pads_to_the_longest_row_of_the_batch():
    ids = [np.array([1, 5, 2], np.int32), np.array([1, 2], np.int32), np.array([1, 6, 2, 7, 2], np.int32)]
    types = [np.zeros(3, np.int8), np.zeros(2, np.int8), np.array([0, 0, 0, 1, 1], np.int8)]
    split = Split(ids, types, np.array([0, 1, 2]), ["a", "b", "c"], None, 0, "train")
    batch = collate(split, np.array([1, 0]), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [1, 5, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert collate(split, [2], 9)["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert {array.dtype for array in batch.values()} == {np.dtype("int64")}
    unlabelled = Split(ids, types, None, ["a", "b", "c"], None, 0, "dev")
    assert set(collate(unlabelled, [0], 9)) == {"input_ids", "token_type_ids"}
