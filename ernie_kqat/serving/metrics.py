"""Prometheus metrics of one service, in a registry of their own."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    exposition,
)

LATENCY_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """What a service counts. Labels are of our own making only: no text of a client becomes one."""

    def __init__(self) -> None:
        made = self._registry = CollectorRegistry()
        ProcessCollector(registry=made)
        PlatformCollector(registry=made)
        self.requests = Counter("ernie_kqat_requests", "requests answered", ("model", "protocol"), registry=made)
        self.errors = Counter("ernie_kqat_errors", "requests refused or failed", ("code",), registry=made)
        self.latency = Histogram("ernie_kqat_latency_seconds", "of answered requests", buckets=LATENCY_S, registry=made)
        self.queue_rows = Gauge("ernie_kqat_queue_rows", "rows that wait for a worker", registry=made)
        self.batch_rows = Histogram("ernie_kqat_batch_rows", "rows of one forward", buckets=ROWS, registry=made)
        self.worker_restarts = Counter("ernie_kqat_worker_restarts", "workers that died", registry=made)
        self.workers_ready = Gauge("ernie_kqat_workers_ready", "workers that can compute", registry=made)

    def text(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type."""
        return exposition.generate_latest(self._registry), exposition.CONTENT_TYPE_LATEST
