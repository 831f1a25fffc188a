"""A whole service: start, say that it is ready, serve until a signal, drain, leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from typing import Any

from ..errors import UserError
from . import logs, models
from .core import Core
from .grpc_front import GrpcFront
from .http_front import HttpFront
from .metrics import Metrics
from .models import Model
from .pool import Pool
from .settings import Settings

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DRAIN_LOOK_S = 0.02
LOCAL = ("127.0.0.1", "::1", "localhost")

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises UserError for what keeps the service from starting."""
    logs.configure(settings.log_file)
    token = settings.token()
    served = models.load(
        settings.models
    )  # before any worker: a missing model makes Paddle Serving kill its process group
    if settings.host not in LOCAL and token is None:
        log.warning("listening beyond this machine without a token", extra={"host": settings.host})
    asyncio.run(_serve(settings, served, token))


async def _serve(settings: Settings, served: list[Model], token: bytes | None) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    sockets = _bind(settings)
    metrics = Metrics()
    pool = Pool(served, settings, metrics)
    try:
        if not await _until(pool.start(), stopping):
            return
        core = Core(served, settings, metrics, pool)
        http, grpc = HttpFront(core, token), GrpcFront(core, token)
        await http.start(sockets)
        grpc_port = await grpc.start()
        _say_ready(settings, sockets, grpc_port, served, pool)
        await stopping.wait()
        await _drain(core, http, grpc)
        await http.stop()
        core.close()
    finally:
        await pool.stop()
        for one in sockets.values():
            one.close()
    log.info("stopped")


async def _until(work: Any, stopping: asyncio.Event) -> bool:
    """Whether the work was done before the service had to stop."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not task.done():
        task.cancel()
        return False
    await task
    return True


async def _drain(core: Core, http: HttpFront, grpc: GrpcFront) -> None:
    """Finish what was accepted, for `drain_s` at most; refuse what comes now; a second signal ends the waiting."""
    log.info("draining", extra={"active": core.active})
    core.draining = True
    loop = asyncio.get_running_loop()
    hurry = asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, hurry.set)
    await http.stop_listening()
    end = loop.time() + core.settings.drain_s
    while core.active and loop.time() < end and not hurry.is_set():
        await asyncio.sleep(DRAIN_LOOK_S)
    if core.active:
        log.warning("requests are given up", extra={"active": core.active})
    await grpc.stop()


def _bind(settings: Settings) -> dict[str, socket.socket]:
    """Sockets of HTTP and metrics, bound before the workers start: a port that is taken is found at once."""
    sockets: dict[str, socket.socket] = {}
    for name, option, port in (
        ("http", "--port", settings.port),
        ("metrics", "--metrics-port", settings.metrics_port),
        ("grpc", "--grpc-port", settings.grpc_port),
    ):
        try:
            family, kind, number, _, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sockets[name] = socket.socket(family, kind, number)
            sockets[name].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sockets[name].bind(address)
        except OSError as error:
            for one in sockets.values():
                one.close()
            raise UserError(f"{option}: {settings.host}:{port}: {error.strerror or error}") from None
    sockets.pop("grpc").close()  # gRPC binds its own
    return sockets


def _say_ready(
    settings: Settings, sockets: dict[str, socket.socket], grpc_port: int, served: list[Model], pool: Pool
) -> None:
    def address(port: int) -> str:
        return f"[{settings.host}]:{port}" if ":" in settings.host else f"{settings.host}:{port}"

    line = {
        "ready": True,
        "http": address(sockets["http"].getsockname()[1]),
        "grpc": address(grpc_port),
        "metrics": address(sockets["metrics"].getsockname()[1]),
        "models": [model.name for model in served],
        "pid": os.getpid(),
        "workers": pool.pids(),
    }
    log.info("ready", extra={name: value for name, value in line.items() if name != "ready"})
    print(json.dumps(line), flush=True)
    sys.stdout.flush()
