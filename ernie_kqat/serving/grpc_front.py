"""gRPC: the same core behind `ernie_kqat.Classifier` and the standard health service."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # workers are started, not forked; its handlers only warn

import grpc
from google.protobuf.message import DecodeError

from ..errors import UserError
from . import access, messages, protocol
from .core import Core
from .protocol import Failure, Invalid, Question

log = logging.getLogger(__name__)

MAX_CALLS = 1000  # at once
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class GrpcFront:
    """Listens from `start` to `stop`. Bodies are decoded here, not by gRPC, so that garbage gets a proper status."""

    def __init__(self, core: Core, token: bytes | None):
        self._core = core
        self._token = token
        settings = core.settings
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=MAX_CALLS,
            options=(
                ("grpc.so_reuseport", 0),  # or two services would share the port
                # gRPC's own refusal has no code of ours, so a body a little too large is left to us.
                ("grpc.max_receive_message_length", 2 * settings.max_body_bytes),
                ("grpc.max_metadata_size", 8192),
            ),
        )
        for service, method, handler in (
            (messages.SERVICE, "Predict", self._predict),
            (messages.HEALTH_SERVICE, "Check", self._check),
        ):
            unary = grpc.unary_unary_rpc_method_handler(handler)
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: unary}),))

    async def start(self) -> int:
        """Returns the port."""
        settings = self._core.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            port = self._server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError:
            raise UserError(f"--grpc-port: {host}:{settings.grpc_port}: cannot be listened on") from None
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(grace=1.0)

    async def _predict(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        start = time.perf_counter()
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        identity = protocol.request_id(metadata.get("x-request-id"))
        try:
            access.check(metadata.get("authorization"), self._token)
            if len(body) > self._core.settings.max_body_bytes:
                raise protocol.too_large(self._core.settings.max_body_bytes)
            answer = await self._core.answer("grpc", identity, len(body), lambda: self._parse(body))
        except Failure as failure:
            self._core.failed("grpc", identity, failure, start)
            context.set_trailing_metadata((("x-request-id", identity),))
            await context.abort(STATUS[failure.status], f"{failure.code}: {failure.message}")
        except Exception:  # gRPC would show its class and text to the client
            log.exception("internal error", extra={"request_id": identity})
            self._core.metrics.errors.labels("internal_error").inc()
            await context.abort(grpc.StatusCode.INTERNAL, "internal_error: the service failed; its log says why")
        context.set_trailing_metadata((("x-request-id", identity),))
        return messages.PredictResponse(**answer).SerializeToString()

    def _parse(self, body: bytes) -> Question:
        try:
            request = messages.PredictRequest.FromString(body)
        except (DecodeError, UnicodeDecodeError):
            raise Invalid("invalid_message", "the message is no ernie_kqat.PredictRequest") from None
        model = request.model or self._core.default_model
        if model is None:
            raise Invalid("model_missing", "several models are served: 'model' is needed")
        if bool(request.texts) == bool(request.rows):
            raise Invalid("wrong_fields", "either 'texts' or 'rows' is needed")
        if request.rows and request.pairs:
            raise Invalid("wrong_fields", "field 'pairs' does not go with 'rows'; their token_type_ids do")
        return protocol.check(_question(request, model), self._core.limits, bool(request.pairs or request.rows))

    async def _check(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """grpc.health.v1: of the whole service (""), or of the classifier."""
        try:
            service = messages.HealthCheckRequest.FromString(body).service
        except (DecodeError, UnicodeDecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid_message: no HealthCheckRequest")
        if service not in ("", messages.SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown_service: no such service")
        status = messages.SERVING if await self._core.ready() else messages.NOT_SERVING
        return messages.HealthCheckResponse(status=status).SerializeToString()


def _question(request: Any, model: str) -> Question:
    if request.texts:
        pairs = list(request.pairs) if request.pairs else None
        return Question(model, request.logits, texts=list(request.texts), pairs=pairs)
    ids = [list(row.input_ids) for row in request.rows]
    types = [list(row.token_type_ids) or [0] * len(row.input_ids) for row in request.rows]
    return Question(model, request.logits, input_ids=ids, token_type_ids=types)
