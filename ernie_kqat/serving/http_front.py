"""HTTP: bytes to the core, answers and errors back; the page; health; metrics on a port of their own."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

from aiohttp import web

from . import access, page, protocol
from .connection import CONTINUE, SERVER, Server, json_response
from .core import Core
from .protocol import Failure, Invalid

IDLE_S = 30.0  # after which a connection without a request is closed
LINGER_S = 2.0  # for which the rest of a refused body is read, so that its sender sees the answer
STOP_S = 2.0


class HttpFront:
    """Listens from `start` to `stop_listening`; connections stay until `stop`."""

    def __init__(self, core: Core, token: bytes | None):
        self._core = core
        self._token = token
        self._page, self._policy = page.load()
        self._routes = {
            "/v1/predict": ("POST", self._predict),
            "/v1/models": ("GET", self._models),
            "/livez": ("GET", self._livez),
            "/readyz": ("GET", self._readyz),
            "/": ("GET", self._show_page),
        }
        self._runners: list[web.ServerRunner] = []
        self._sites: list[web.SockSite] = []

    async def start(self, sockets: dict[str, Any]) -> None:
        """Listen on the bound sockets `http` and `metrics`."""
        settings = self._core.settings
        for name, handler in (("http", self._handle), ("metrics", self._show_metrics)):
            server = Server(
                handler,
                settings.max_connections,
                settings.max_body_bytes,
                settings.body_timeout_s,
                lambda code: self._core.metrics.errors.labels(code).inc(),
                keepalive_timeout=IDLE_S,
                lingering_time=LINGER_S,
                auto_decompress=False,  # a small body must not become a large one
                access_log=None,
            )
            runner = web.ServerRunner(server, shutdown_timeout=STOP_S)
            await runner.setup()
            site = web.SockSite(runner, sockets[name], backlog=1024)
            await site.start()
            self._runners.append(runner)
            self._sites.append(site)

    async def stop_listening(self) -> None:
        """Take no new connections of clients."""
        await self._sites[0].stop()

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        identity = protocol.request_id(request.headers.get("X-Request-Id"))
        start = time.perf_counter()
        try:
            method, route = self._routes.get(request.path, ("", None))
            if route is None:
                raise Invalid("unknown_path", f"no such path; there are {', '.join(self._routes)}", 404)
            if request.method != method and (method, request.method) != ("GET", "HEAD"):
                raise Invalid("wrong_method", f"this path takes {method} only", 405)
            response = await route(request, identity)
        except Failure as failure:
            self._core.failed("http", identity, failure, start)
            response = json_response(failure.status, protocol.error(failure, identity), identity, failure.retry_after_s)
            if failure.status == 405:
                response.headers["Allow"] = self._routes[request.path][0]
            if failure.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
            if not request.content.is_eof():  # the rest of the body is not worth waiting for
                response.force_close()
        if self._core.draining:
            response.force_close()
        return response

    async def _predict(self, request: web.BaseRequest, identity: str) -> web.Response:
        access.check(request.headers.get("Authorization"), self._token)
        body = await self._body(request)
        parse = functools.partial(protocol.parse, body, self._core.limits, self._core.default_model)
        return json_response(200, await self._core.answer("http", identity, len(body), parse), identity)

    async def _body(self, request: web.BaseRequest) -> bytes:
        _check_headers(request)
        settings = self._core.settings
        if (request.content_length or 0) > settings.max_body_bytes:
            raise protocol.too_large(settings.max_body_bytes)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(CONTINUE)
        try:
            if request.content.is_eof():  # it came with the headers
                return await request.read()
            return await asyncio.wait_for(request.read(), settings.body_timeout_s)
        except web.HTTPRequestEntityTooLarge:
            raise protocol.too_large(settings.max_body_bytes) from None
        except asyncio.TimeoutError:
            message = f"the body did not come within {settings.body_timeout_s:g} seconds"
            raise Invalid("slow_request", message, 408) from None
        except (web.RequestPayloadError, ValueError):
            raise Invalid("invalid_http", "the body is not what its headers say") from None
        except ConnectionError:
            raise Invalid("client_gone", "the client closed the connection", 499) from None

    async def _models(self, request: web.BaseRequest, identity: str) -> web.Response:
        access.check(request.headers.get("Authorization"), self._token)
        return json_response(200, self._core.describe(), identity)

    async def _livez(self, request: web.BaseRequest, identity: str) -> web.Response:
        return _health(await self._core.alive(), identity)

    async def _readyz(self, request: web.BaseRequest, identity: str) -> web.Response:
        return _health(await self._core.ready(), identity)

    async def _show_page(self, request: web.BaseRequest, identity: str) -> web.Response:
        headers = {
            "Content-Security-Policy": self._policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
            "Server": SERVER,
        }
        return web.Response(body=self._page, headers=headers, content_type="text/html", charset="utf-8")

    async def _show_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/metrics":
            identity = protocol.request_id(None)
            return json_response(404, protocol.error(Invalid("unknown_path", "see /metrics"), identity), identity)
        body, content_type = self._core.metrics.text()
        return web.Response(body=body, headers={"Content-Type": content_type, "Server": SERVER})


def _check_headers(request: web.BaseRequest) -> None:
    # A browser sends JSON to another site only if that site allows it: no page can ask this service in its user's name.
    if request.content_type != "application/json":
        raise Invalid("wrong_content_type", "the header 'Content-Type: application/json' is needed", 415)
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise Invalid("wrong_content_type", "the charset has to be utf-8", 415)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Invalid("wrong_content_type", "the body must not be compressed", 415)


def _health(good: bool, identity: str) -> web.Response:
    return json_response(200 if good else 503, {"ok": good}, identity, None if good else 1)
