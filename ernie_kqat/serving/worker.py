"""What a worker does: answer batches from the front, one at a time, until the front is gone.

It owns no port and no file, and it cannot outlive the front: the end of the socket ends its loop, and the kernel kills it
when the front dies while a batch is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import frames

if TYPE_CHECKING:
    from .pipeline import Pipeline

PR_SET_PDEATHSIG = 1  # Linux's prctl.h


def main(descriptor: int, front: int, parent: int, load: Callable[[], tuple[Sequence[Pipeline], str]]) -> None:
    """Serve the front, process `front`, at the other end of the socket `descriptor`; `parent` is about to end.

    `load` gives the pipelines, or why there are none.
    """
    while os.getppid() == parent:
        time.sleep(1e-3)
    end_with_parent(front)
    os.setsid()  # Paddle Serving's way to fail is to kill its whole process group
    connection = socket.socket(fileno=descriptor)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the front is gone
        connection.sendall(frames.pack({"pid": os.getpid()}))
        pipelines, refusal = load()
        connection.sendall(frames.pack({"refused": refusal} if refusal else {"ready": True}))
        if not refusal:
            _answer(connection, pipelines)


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when process `parent` ends, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit()


def _answer(connection: socket.socket, pipelines: Sequence[Pipeline]) -> None:
    while (frame := frames.read(connection)) is not None:
        header, batch = frame
        try:
            reply = frames.pack({"id": header["id"]}, pipelines[header["model"]].logits(batch, header["rows"]))
        except Exception as error:  # noqa: BLE001  whatever Paddle raises: the front decides, and this worker goes on
            reply = frames.pack({"id": header["id"], "failed": f"{type(error).__name__}: {error}"})
        connection.sendall(reply)
