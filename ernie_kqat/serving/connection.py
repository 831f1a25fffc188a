"""One HTTP connection: aiohttp's, with what it lacks for clients that misbehave or close one half of the connection."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from . import protocol
from .protocol import Invalid

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LOOK_S = 0.05
TCP_CLOSE = 7  # Linux's tcp_states.h: the peer has reset the connection
SERVER = "ernie_kqat"

log = logging.getLogger(__name__)


def json_response(status: int, value: dict[str, Any], identity: str, retry_after_s: int | None = None) -> web.Response:
    headers = {
        "X-Request-Id": identity,
        "Server": SERVER,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return web.Response(status=status, body=protocol.encode(value), headers=headers, content_type="application/json")


class Connection(RequestHandler):
    """A client that has closed its sending half still gets its answer; one that is gone has its request dropped.

    Both look the same at first: nothing more comes. So after a moment an interim response (100, which clients have to
    ignore) is sent; whoever is gone answers it by a reset. And the headers of a request have to come within a time, not only
    its first byte.
    """

    def __init__(self, manager: Server, **options: Any):
        super().__init__(manager, **options)
        self._server = manager
        self._deadline: asyncio.TimerHandle | None = None  # of headers that have begun to come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._server.connections) > self._server.max_connections:
            transport.abort()  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is None and self._waits_for_headers():
            self._deadline = self._loop.call_later(self._server.header_timeout_s, self._give_up)

    def headers_came(self) -> None:
        """A request has begun."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.headers_came()
        super().connection_lost(exc)

    def _waits_for_headers(self) -> bool:
        return self._waiter is not None and not self._waiter.done() and not self._messages

    def _give_up(self) -> None:
        self._server.count_error("slow_request")
        self.force_close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._waits_for_headers() or self.transport is None:
            return None
        self.close()  # after the answer
        self._loop.call_later(LOOK_S, self._ask)
        return True

    def _ask(self) -> None:
        request = self._current_request
        if self.transport is not None and request is not None and request.version >= (1, 1):
            self.transport.write(CONTINUE)
            self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        if self.transport is None:
            return
        state = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if state[0] == TCP_CLOSE:
            self.transport.abort()

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, or to a fault of ours; aiohttp's own would show parts of either."""
        identity = protocol.request_id(None)
        if status >= 500:
            log.error("internal error", extra={"request_id": identity}, exc_info=exc)
            failure = protocol.Failure("internal_error", "the service failed; its log says why", status)
        else:
            log.info("request", extra={"request_id": identity, "protocol": "http", "outcome": "invalid_http"})
            failure = Invalid("invalid_http", "the request is not valid HTTP", status)
        self._server.count_error(failure.code)
        response = json_response(failure.status, protocol.error(failure, identity), identity)
        response.force_close()
        return response


class Server(web.Server):
    """aiohttp's low-level server, which makes our connections."""

    def __init__(
        self,
        handler: Any,
        max_connections: int,
        max_body_bytes: int,
        header_timeout_s: float,
        count_error: Any,
        **options: Any,
    ):
        super().__init__(handler, request_factory=self._request, handler_cancellation=True)
        self.max_connections = max_connections
        self.header_timeout_s = header_timeout_s
        self.count_error = count_error
        self._max_body_bytes = max_body_bytes
        self._options = options

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._options)

    def _request(self, message: Any, payload: Any, connection: Any, writer: Any, task: Any) -> web.BaseRequest:
        connection.headers_came()
        size = self._max_body_bytes
        return web.BaseRequest(message, payload, connection, writer, task, self._loop, client_max_size=size)
