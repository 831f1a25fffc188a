"""The worker processes as the front sees them: where they come from, batches sent to them, their death noticed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import shapes
from . import frames
from .batching import Row
from .models import Model

Shape = tuple[Model, int, int]  # rows and tokens of a model's batch
STOP_S = 3.0  # seconds that an idle process gets to end by itself
BACKOFF_S = 0.5  # before another try, where a process died before it was of use
PR_SET_CHILD_SUBREAPER = 36  # Linux's prctl.h

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Batch:
    """What a worker computes: rows of requests, or none where it is warmed up or probed."""

    model: Model
    rows: list[Row]
    since: float  # seconds of the event loop's clock


class Owner(Protocol):
    """Who is told what a worker does."""

    def worker_ready(self, worker: Worker) -> None: ...

    def worker_answered(self, worker: Worker, batch: Batch, logits: np.ndarray | None, failure: str) -> None: ...

    def worker_died(self, worker: Worker, reason: str) -> None: ...


class Nursery:
    """The front's end of the nursery process, which forks workers; one that dies is started again, and its workers live on."""

    def __init__(self, models: Sequence[Model], threads: int):
        self._models = models
        self._threads = threads
        self._again: asyncio.TimerHandle | None = None
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # workers become our own children: we see them die
        self._start()

    def fork(self, descriptor: int) -> None:
        """Make a worker at this end of a socket pair; if that fails, the worker's socket ends."""
        with contextlib.suppress(OSError):  # it has died: another one is about to start
            socket.send_fds(self._control, [b"w"], [descriptor])

    def kill(self) -> None:
        """End the process at once; another one is started."""
        self._process.kill()

    async def stop(self) -> None:
        """End the process: by the end of its socket, or by force if that takes too long."""
        self._disconnect()
        if self._again:
            self._again.cancel()
        await _end(self._process.poll, self._process.kill)

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "ernie_kqat.serving.nursery", str(theirs.fileno()), str(os.getpid())]
            environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "GLOG_minloglevel": "2"}
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # Paddle Serving prints
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        loaded = [{"folder": str(model.folder), "version": model.version} for model in self._models]
        self._control.sendall(frames.pack({"models": loaded, "threads": self._threads}))
        asyncio.get_running_loop().add_reader(self._control, self._died)

    def _died(self) -> None:
        self._disconnect()
        log.error("nursery died", extra={"nursery": self._process.pid, "code": self._process.wait()})
        self._again = asyncio.get_running_loop().call_later(BACKOFF_S, self._start)

    def _disconnect(self) -> None:
        if self._control.fileno() != -1:  # not closed yet
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()


async def _end(exit_code: Callable[[], int | None], kill: Callable[[], None]) -> None:
    """Wait until a process that was told to end has ended, by force if that takes too long."""
    deadline = time.monotonic() + STOP_S
    while exit_code() is None:
        if time.monotonic() > deadline:
            kill()
        await asyncio.sleep(0.01)


class Worker(asyncio.Protocol):
    """A worker. `in_flight` are the batches that it has not answered, the first one runs."""

    def __init__(self, owner: Owner, nursery: Nursery):
        self._owner = owner
        self._nursery = nursery
        self._decoder = frames.Decoder()
        self._transport: asyncio.Transport | None = None
        self._count = 0
        self._code: int | None = None
        self._refusal = ""
        self.ready = False
        self.computed = False  # anything at all
        self.in_flight: dict[int, Batch] = {}
        self.to_warm_up: deque[Shape] = deque()  # shapes that it has yet to meet
        self.since = asyncio.get_running_loop().time()
        self.pid: int | None = None  # until it has said so

    async def start(self, warm_up: list[Shape]) -> None:
        """Make it; it is ready when `Owner.worker_ready` is told."""
        self.to_warm_up.extend(warm_up)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self._nursery.fork(theirs.fileno())
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        for header, logits in self._decoder.feed(data):
            if "pid" in header:
                self.pid = header["pid"]
            elif "ready" in header:
                self.ready = True
                self._owner.worker_ready(self)
            elif "refused" in header:
                self._refusal = header["refused"]
            else:
                self.computed = True
                batch = self.in_flight.pop(header["id"])
                self._owner.worker_answered(self, batch, logits, header.get("failed", ""))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.ready = False
        self._owner.worker_died(self, self._refusal)

    def send(self, model: Model, rows: list[Row]) -> None:
        """Start a batch of requests' rows."""
        ids = shapes.pad([row.ids for row in rows], model.pad_token_id, model.max_length)
        self._send(model, rows, ids)

    def warm_up(self) -> None:
        """Meet one of the shapes that are left."""
        model, rows, tokens = self.to_warm_up.popleft()
        self._send(model, [], np.full((2, rows, tokens), 0, np.int64))

    def is_warming_up(self) -> bool:
        return any(not batch.rows for batch in self.in_flight.values())

    def probe(self, model: Model) -> None:
        """A real inference of the smallest shape, to see that the worker still answers."""
        self._send(model, [], np.zeros((2, 1, shapes.LENGTH_STEP), np.int64))

    def oldest(self) -> float | None:
        """Since when it computes, in seconds of the event loop's clock; None: it is idle."""
        return next(iter(self.in_flight.values())).since if self.in_flight else None

    def kill(self) -> None:
        """End the process at once; its death is then noticed as any other."""
        if self.pid is None:
            self._nursery.kill()  # it hangs: it was to fork this one
        elif self._code is None:  # not reaped, so the number is still its own
            os.kill(self.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End the process, by the end of its socket, or by force if that takes too long."""
        if self._transport is not None:
            self._transport.close()
        if self.pid is not None:
            await _end(self._poll, self.kill)

    def _poll(self) -> int | None:
        if self._code is None and self.pid is not None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def _send(self, model: Model, rows: list[Row], ids: np.ndarray) -> None:
        self._count += 1
        self.in_flight[self._count] = Batch(model, rows, asyncio.get_running_loop().time())
        count = len(rows) or ids.shape[1]  # the rest is padding
        self._write(frames.pack({"id": self._count, "model": model.index, "rows": count}, ids))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
