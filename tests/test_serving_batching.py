"""Which rows share a batch: the oldest first, like lengths together, no padded rows, nobody starved."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from ernie_kqat.serving import batching
from ernie_kqat.serving.batching import Job, Row, Waiting
from ernie_kqat.serving.protocol import Failure

MODEL, OTHER = SimpleNamespace(name="a"), SimpleNamespace(name="b")


@pytest.fixture
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


def rows_of(loop, lengths, model=MODEL):
    job = Job(model, [np.zeros((2, length), np.int64) for length in lengths], loop.create_future())
    return [Row(job, index, 0.0) for index in range(len(lengths))]


def lengths_of(rows):
    return [row.ids.shape[1] for row in rows]


def test_the_oldest_row_and_what_is_near_it(loop):
    waiting = Waiting()
    waiting.add(rows_of(loop, [20, 60, 22, 5, 40, 20]))
    assert lengths_of(waiting.companions(32)) == [20, 20, 22, 5]
    assert lengths_of(waiting.companions(3)) == [20, 20, 22]
    waiting.take(waiting.companions(3))
    assert lengths_of(waiting) == [60, 5, 40]
    assert lengths_of(waiting.companions(32)) == [60]  # the oldest goes, alone if need be


def test_models_do_not_mix(loop):
    waiting = Waiting()
    waiting.add(rows_of(loop, [8]) + rows_of(loop, [8], OTHER) + rows_of(loop, [8]))
    assert all(row.job.model is MODEL for row in waiting.companions(32))
    assert len(waiting.companions(32)) == 2


def test_a_row_whose_worker_died_goes_alone(loop):
    waiting = Waiting()
    waiting.add(rows_of(loop, [8, 8]))
    (suspect,) = rows_of(loop, [8])
    suspect.alone = True
    waiting.add([suspect], first=True)
    assert waiting.companions(32) == [suspect]
    waiting.take([suspect])
    waiting.add([suspect])
    assert len(waiting.companions(32)) == 2


def test_rows_nobody_waits_for_are_dropped(loop):
    waiting = Waiting()
    gone, here = rows_of(loop, [8, 8]), rows_of(loop, [8])
    waiting.add(gone + here)
    gone[0].job.done.cancel()
    waiting.drop()
    assert list(waiting) == here


@pytest.mark.parametrize(
    ("companions", "idle", "rows"), [(1, 1, 1), (3, 1, 2), (8, 2, 4), (9, 2, 4), (32, 1, 32), (31, 1, 16), (1, 4, 1)]
)
def test_sizes_are_powers_of_two_and_shared_between_idle_workers(companions, idle, rows):
    assert batching.size(companions, idle) == rows


def test_an_answer_is_whole_or_an_error(loop):
    first, second = rows_of(loop, [8, 9])
    second.answer(np.array([2.0], np.float32))
    assert not first.job.done.done()
    first.answer(np.array([1.0], np.float32))
    assert first.job.done.result().tolist() == [[1.0], [2.0]]
    first, second = rows_of(loop, [8, 9])
    first.answer(np.array([1.0], np.float32))
    second.fail(Failure("worker_died", "", 503))
    first.fail(Failure("other", "", 500))
    assert first.job.done.exception().code == "worker_died"
