"""What both fronts call: a request in, an answer or a Failure out, counted and logged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .. import shapes
from . import models, protocol
from .metrics import Metrics
from .models import Model
from .pool import Pool
from .protocol import Failure, Limits, Question, Unavailable
from .settings import Settings

INLINE_BYTES = (
    8192  # a request up to so large is checked and tokenized at once: a thread would take longer to start on it
)
PROBE_KEPT_S = 1.0  # for which a probe's result is given again, so that probing is no way to load the service
PROBE_TIMEOUT_S = 10.0
PROTOCOLS = ("http", "grpc")

log = logging.getLogger(__name__)


class Core:
    """The service behind its protocols."""

    def __init__(self, served: Sequence[Model], settings: Settings, metrics: Metrics, pool: Pool):
        self.models = served
        self.settings = settings
        self.metrics = metrics
        self.limits = Limits(settings.max_texts, settings.max_text_chars)
        self.default_model = served[0].name if len(served) == 1 else None
        self.draining = False
        self.active = 0  # requests that were accepted and have no answer yet
        self._pool = pool
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._probe: asyncio.Task[bool] | None = None
        self._probed = 0.0
        self._counters = {
            (model.name, name): metrics.requests.labels(model.name, name) for model in served for name in PROTOCOLS
        }

    async def answer(
        self, through: str, identity: str, size_bytes: int, parse: Callable[[], Question]
    ) -> dict[str, Any]:
        """The answer to what `parse` returns, a request of `size_bytes` that came `through` http or grpc.

        Raises Failure, which the front counts (`failed`): it has failures of its own.
        """
        start = time.perf_counter()
        self.active += 1
        question = None
        try:
            if self.draining:
                raise Unavailable("shutting_down", "the service stops; ask again")
            question, model, rows = await self._prepare(size_bytes, parse)
            logits = await self._pool.compute(model, rows)
            latency_s = time.perf_counter() - start
            values = logits.tolist() if question.logits else None
            answer = protocol.answer(model.name, model.version, identity, latency_s * 1e3, model.label(logits), values)
        except asyncio.CancelledError:
            self.failed(through, identity, Failure("client_gone", "the client closed the connection", 499), start)
            raise
        finally:
            self.active -= 1
        self._counters[model.name, through].inc()
        self.metrics.latency.observe(latency_s)
        self._log(through, identity, "ok", start, model=model.name, rows=len(rows), **self._texts(question))
        return answer

    def failed(self, through: str, identity: str, failure: Failure, start: float) -> None:
        """Count and log a request without an answer."""
        self.metrics.errors.labels(failure.code).inc()
        self._log(through, identity, failure.code, start, status=failure.status)

    async def alive(self) -> bool:
        """Whether a real inference gives an answer; what was found is kept for a second."""
        if self._probe is None or (self._probe.done() and time.monotonic() - self._probed > PROBE_KEPT_S):
            self._probe = asyncio.ensure_future(self._infer())
        return await asyncio.shield(self._probe)

    async def ready(self) -> bool:
        """Whether new requests are welcome and would be answered."""
        return not self.draining and self._pool.ready_workers() > 0 and await self.alive()

    def describe(self) -> dict[str, Any]:
        """The answer of GET /v1/models."""
        return {"models": [model.describe() for model in self.models]}

    def close(self) -> None:
        self._threads.shutdown()

    async def _prepare(
        self, size_bytes: int, parse: Callable[[], Question]
    ) -> tuple[Question, Model, list[np.ndarray]]:
        if size_bytes <= INLINE_BYTES:
            return self._rows(parse)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._rows, parse)

    def _rows(self, parse: Callable[[], Question]) -> tuple[Question, Model, list[np.ndarray]]:
        question = parse()
        model = models.named(self.models, question.model)
        if question.texts is not None:
            return question, model, model.encode(question)
        return question, model, model.check_ids(question.input_ids or [], question.token_type_ids)

    async def _infer(self) -> bool:
        try:
            for model in self.models:
                row = np.zeros((2, min(shapes.LENGTH_STEP, model.max_length)), np.int64)
                logits = await asyncio.wait_for(self._pool.compute(model, [row], urgent=True), PROBE_TIMEOUT_S)
                if not np.isfinite(logits).all():
                    return False
        except (Failure, asyncio.TimeoutError):
            return False
        finally:
            self._probed = time.monotonic()
        return True

    def _texts(self, question: Question) -> dict[str, Any]:
        if not self.settings.log_texts:
            return {}
        return {"texts": question.texts, "pairs": question.pairs, "input_ids": question.input_ids}

    def _log(self, through: str, identity: str, outcome: str, start: float, **more: Any) -> None:
        latency_ms = round((time.perf_counter() - start) * 1e3, 3)
        found = {"request_id": identity, "protocol": through, "outcome": outcome, "latency_ms": latency_ms, **more}
        log.info("request", extra=found)
