"""The client over gRPC."""

from __future__ import annotations

import itertools
from typing import Any

import grpc

from ..errors import UserError
from . import messages
from .client import Client, Failed, Prediction, Refused, Retryable, ServiceError, TimedOut, Unauthorized, seconds

TOO_MANY_CALLS = "Concurrent RPC limit exceeded!"  # gRPC's own words; its status is that of a request too large


class GrpcClient(Client):
    """Over one gRPC channel; safe to use from many threads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        self._channel = (
            grpc.secure_channel(self.address, grpc.ssl_channel_credentials(), options)
            if self.secure
            else grpc.insecure_channel(self.address, options)
        )
        self._call = self._channel.unary_unary(
            messages.METHOD,
            request_serializer=messages.PredictRequest.SerializeToString,
            response_deserializer=messages.PredictResponse.FromString,
        )

    def close(self) -> None:
        self._channel.close()

    def _send(self, request: dict[str, Any], timeout_s: float) -> list[Prediction]:
        metadata = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        try:
            found = self._call(self._message(request), timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None
        return [Prediction(one.label, one.score, list(one.logits) or None) for one in found.predictions]

    def _message(self, request: dict[str, Any]) -> Any:
        fields: dict[str, Any] = {
            name: request[name] for name in ("texts", "pairs", "model", "logits") if name in request
        }
        if "input_ids" in request:
            types = request.get("token_type_ids") or itertools.repeat(())
            pairs = zip(request["input_ids"], types)
            fields["rows"] = [messages.Row(input_ids=ids, token_type_ids=kinds) for ids, kinds in pairs]
        try:
            return messages.PredictRequest(**fields)
        except (TypeError, ValueError) as error:  # protobuf's own check of types and of the range of int64
            raise UserError(f"the request cannot be sent: {error}") from None

    def _error(self, error: Any) -> ServiceError:
        codes, status = grpc.StatusCode, error.code()
        code, _, message = (error.details() or "").partition(": ")
        if not code.isidentifier():  # not of our service: gRPC's own words
            code, message = status.name.lower(), error.details() or ""
        overloaded = status == codes.UNAVAILABLE or message == TOO_MANY_CALLS
        kinds = {
            codes.UNAUTHENTICATED: Unauthorized,
            codes.DEADLINE_EXCEEDED: TimedOut,
            codes.INVALID_ARGUMENT: Refused,
            codes.NOT_FOUND: Refused,
            codes.UNIMPLEMENTED: Refused,
            codes.RESOURCE_EXHAUSTED: Refused,
        }
        metadata = dict(error.trailing_metadata() or ())
        kind = Retryable if overloaded else kinds.get(status, Failed)
        return kind(code, message, metadata.get("x-request-id"), seconds(metadata.get("retry-after")))
