"""The workers and the queue before them: batches go to whoever is free, and a worker that dies or hangs is replaced.

What happens to the rows of a worker that dies: inference has no effect but its answer, so each of them is tried once more,
alone, on any worker. A row whose second worker dies too gets an error (worker_died).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import numpy as np

from .. import shapes
from ..errors import UserError
from . import batching
from .batching import Job, Row, Waiting
from .metrics import Metrics
from .models import Model
from .protocol import Failure, Unavailable
from .settings import Settings
from .workers import BACKOFF_S, Batch, Nursery, Shape, Worker

TICK_S = 0.25  # how often hanging workers are looked for
START_S = 300.0  # a worker that is not ready by then is replaced; the first ones wait for Paddle and the models
PROBE_EVERY_S = 5.0  # an idle worker computes a row so often

log = logging.getLogger(__name__)


class Pool:
    """Computes jobs. Everything runs in the event loop, so there are no locks."""

    def __init__(self, models: Sequence[Model], settings: Settings, metrics: Metrics):
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._waiting = Waiting()
        self._workers: list[Worker] = []
        self._nursery = Nursery(models, settings.threads)
        self._tasks: set[asyncio.Task] = set()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._all_ready = asyncio.Event()
        self._closing = False
        self._later = 0  # shapes that a worker meets when it has nothing else to do
        self._batching = False  # a timer of --max-wait-ms runs
        metrics.queue_rows.set_function(lambda: len(self._waiting))
        metrics.workers_ready.set_function(self.ready_workers)

    def ready_workers(self) -> int:
        return sum(worker.ready for worker in self._workers)

    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def start(self) -> None:
        """Start all workers; returns when all have computed something. Raises UserError if one of them cannot load a model."""
        for _ in range(self._settings.worker_count()):
            await self._start_worker()
        self._spawn(self._watch())
        ready = asyncio.ensure_future(self._all_ready.wait())
        await asyncio.wait((ready, self._ended), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._ended.done():
            self._ended.result()

    async def stop(self) -> None:
        """End all workers and reap them."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.stop() for worker in self._workers), self._nursery.stop())
        for row in self._waiting:
            row.fail(Unavailable("shutting_down", "the service stops; ask again"))

    async def compute(self, model: Model, rows: list[np.ndarray], urgent: bool = False) -> np.ndarray:
        """float32 [rows, classes]. Raises Failure if the queue is full, or its worker and that of its second try died.

        `urgent` rows go before all others. A caller that is cancelled takes its rows out of the queue.
        """
        self._waiting.drop()
        if len(self._waiting) + len(rows) > self._settings.max_queue and not urgent:
            raise Unavailable("overloaded", "too many requests wait; ask again a little later")
        loop = asyncio.get_running_loop()
        job = Job(model, rows, loop.create_future())
        now = loop.time()
        timer = loop.call_later(self._settings.timeout_s, _expire, job)
        self._waiting.add([Row(job, index, now) for index in range(len(rows))], first=urgent)
        self._dispatch()
        try:
            return await job.done
        finally:
            timer.cancel()

    # Workers tell what they do by these three.

    def worker_ready(self, worker: Worker) -> None:
        log.info("worker is ready", extra={"worker": worker.pid, "seconds": round(self._now() - worker.since, 2)})
        self._dispatch()

    def worker_answered(self, worker: Worker, batch: Batch, logits: np.ndarray | None, failure: str) -> None:
        if logits is None:
            log.error("inference failed", extra={"worker": worker.pid, "reason": failure})
            for row in batch.rows:
                row.fail(Failure("inference_failed", "the model could not compute this request", 500))
        else:
            for row, answer in zip(batch.rows, logits):
                row.answer(answer)
        if not self._all_ready.is_set() and all(map(self._warmed_up, self._workers)):
            self._all_ready.set()
        self._dispatch()

    def worker_died(self, worker: Worker, reason: str) -> None:
        self._workers.remove(worker)
        rows = [row for batch in worker.in_flight.values() for row in batch.rows]
        worker.in_flight.clear()
        if not self._closing:
            log.error("worker died", extra={"worker": worker.pid, "rows": len(rows), "reason": reason})
            self._metrics.worker_restarts.inc()
        self._try_again(rows)
        self._spawn(self._replace(worker, reason))

    def _try_again(self, rows: list[Row]) -> None:
        for row in rows:
            if row.alone:
                row.fail(
                    Unavailable("worker_died", "the process that computed this request died, twice; ask again later")
                )
        again = [row for row in rows if not row.alone]
        for row in again:
            row.alone = True
        self._waiting.add(again, first=True)
        self._dispatch()

    async def _replace(self, dead: Worker, reason: str) -> None:
        await dead.stop()
        if self._closing:
            return
        if not self._all_ready.is_set():
            # The service has not started yet: say what is wrong instead of trying for ever.
            if not self._ended.done():
                ended = "the process of the workers" if dead.pid is None else "a worker"
                self._ended.set_exception(UserError(reason or f"{ended} ended at its start; its error is above"))
            return
        if not dead.computed:
            await asyncio.sleep(BACKOFF_S)
        await self._start_worker()

    async def _start_worker(self) -> None:
        first, later = self._shapes()
        self._later = len(later)
        worker = Worker(self, self._nursery)
        self._workers.append(worker)
        await worker.start(first + later)

    def _shapes(self) -> tuple[list[Shape], list[Shape]]:
        """The shapes to meet before the service is ready, and those to meet when a worker has nothing else to do.

        First the largest, whose memory all others then use, and single rows of any length; later ever more rows.
        """
        first: list[Shape] = []
        later: list[Shape] = []
        for model in self._models:
            step, longest, most = shapes.LENGTH_STEP, model.max_length, self._settings.max_batch
            lengths = [shapes.padded_length(tokens, longest) for tokens in range(step, longest + step, step)]
            if not self._settings.warm_up:
                first.append((model, 1, lengths[0]))
                continue
            first += [(model, most, lengths[-1]), *((model, 1, tokens) for tokens in lengths)]
            sizes = [1 << power for power in range(1, most.bit_length())]
            later += [(model, rows, tokens) for rows in sizes for tokens in lengths]
        return first, later

    def _warmed_up(self, worker: Worker) -> bool:
        return worker.ready and len(worker.to_warm_up) <= self._later and not worker.in_flight

    def _dispatch(self) -> None:
        self._waiting.drop()
        while len(self._waiting):
            idle = [worker for worker in self._workers if worker.ready and not worker.in_flight]
            worker = idle[0] if idle else self._with_room()
            if worker is None or self._waits_for_more():
                return
            companions = self._waiting.companions(self._settings.max_batch * max(1, len(idle)))
            rows = companions[: min(batching.size(len(companions), max(1, len(idle))), self._settings.max_batch)]
            self._waiting.take(rows)
            self._metrics.batch_rows.observe(len(rows))
            worker.send(rows[0].job.model, rows)
        self._warm_up()

    def _warm_up(self) -> None:
        """Let idle workers meet new shapes: all of them before the service is ready, one at a time after that."""
        for worker in self._workers:
            if worker.ready and not worker.in_flight and worker.to_warm_up:
                if self._all_ready.is_set() and any(other.is_warming_up() for other in self._workers):
                    return
                worker.warm_up()

    def _with_room(self) -> Worker | None:
        """A worker that computes its last batch, if a full one waits to come next: it need not wait for the event loop."""
        if len(self._waiting) < self._settings.max_batch:
            return None
        busy = [worker for worker in self._workers if worker.ready and len(worker.in_flight) == 1]
        return min(busy, key=lambda worker: worker.oldest() or 0.0, default=None)

    def _waits_for_more(self) -> bool:
        wait_s = self._settings.max_wait_ms / 1e3
        if not wait_s or len(self._waiting) >= self._settings.max_batch:
            return False
        left = self._waiting.oldest.since + wait_s - self._now()
        if left <= 0:
            return False
        if not self._batching:
            self._batching = True
            asyncio.get_running_loop().call_later(left, self._waited)
        return True

    def _waited(self) -> None:
        self._batching = False
        self._dispatch()

    async def _watch(self) -> None:
        """Kill workers that hang; probe those that are idle."""
        probed = self._now()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._now()
            for worker in list(self._workers):
                since, limit = (worker.oldest(), self._settings.timeout_s) if worker.ready else (worker.since, START_S)
                if since is not None and now - since > limit:
                    log.error("worker hangs", extra={"worker": worker.pid, "seconds": round(now - since, 1)})
                    worker.kill()
            if now - probed > PROBE_EVERY_S:
                probed = now
                for worker in self._workers:
                    if worker.ready and not worker.in_flight:
                        worker.probe(self._models[0])

    def _spawn(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _expire(job: Job) -> None:
    if not job.done.done():
        job.done.set_exception(Failure("timeout", "the answer took too long; ask for less, or again later", 504))
