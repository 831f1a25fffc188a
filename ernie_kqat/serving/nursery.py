"""The process that workers are forked from: it has imported Paddle and loaded the models, so a worker is there at once.

It computes nothing. For each message of the front, which brings a socket's descriptor, it forks a worker; the process in
between ends, so that the worker becomes a child of the front (its subreaper) and does not depend on this one. Where a model is
for TensorRT, or workers have several threads, it loads nothing: workers do, each for itself.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifact
from ..errors import UserError
from . import frames, models, worker

if TYPE_CHECKING:
    from .pipeline import Pipeline


def main(descriptor: int, front: int) -> None:
    """Fork workers for the front, process `front`, until it closes the socket `descriptor`."""
    worker.end_with_parent(front)
    # A terminal's Ctrl-C and a service manager's SIGTERM go to all processes; the front drains, then closes the sockets.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    first = frames.read(control)
    if first is None:
        return
    asked = first[0]
    loaded = _load_shared(asked)
    gc.freeze()  # what is there stays in memory that all workers share
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        between = os.fork()
        if between == 0:
            control.close()
            between = os.getpid()
            if os.fork():
                os._exit(0)
            worker.main(descriptors[0], front, between, lambda: loaded or _load_all(asked))
            return
        os.close(descriptors[0])
        os.waitpid(between, 0)


def _load_shared(asked: dict[str, Any]) -> tuple[list[Pipeline], str] | None:
    """`_load_all`; None where each worker has to load for itself: a process's hold on a GPU does not survive a fork, nor does a
    team of OpenMP threads, which Paddle starts when it unfolds int8 weights.
    """
    if asked["threads"] > 1:
        return None
    try:
        engines = {artifact.read_manifest(model["folder"], check_hashes=False)["engine"] for model in asked["models"]}
    except UserError as error:
        return [], str(error)
    return None if artifact.TENSORRT in engines else _load_all(asked)


def _load_all(asked: dict[str, Any]) -> tuple[list[Pipeline], str]:
    """The pipelines of what the front asked for, or why there are none."""
    try:
        return [_load(model, asked["threads"]) for model in asked["models"]], ""
    except UserError as error:
        return [], str(error)


def _load(model: dict[str, Any], threads: int) -> Pipeline:
    from .. import native, tensorrt
    from ..predictor import check_engine, choose_engine  # Paddle takes seconds to import
    from .pipeline import Pipeline

    folder = Path(model["folder"])
    if models.version(folder) != model["version"]:
        raise UserError(f"{folder}: was changed after the service was started; start it again")
    manifest = artifact.read_manifest(folder)
    check_engine(folder, manifest["engine"])
    engine = choose_engine(folder, manifest, "auto")
    if engine == "tensorrt":
        return Pipeline(
            folder, threads, configure=lambda made: tensorrt.configure(made, folder), most_rows=tensorrt.ROWS
        )
    if engine == "native":
        native.load()
        return Pipeline(folder / artifact.NATIVE, threads, skips_padding=True)
    return Pipeline(folder, threads)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
