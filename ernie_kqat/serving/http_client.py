"""The client over HTTP/1.1, by the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from typing import Any

from .client import Client, Failed, Prediction, Refused, Retryable, ServiceError, TimedOut, Unauthorized, seconds

RETRIED = (429, 502, 503)


class HttpClient(Client):
    """Over HTTP/1.1 with connections that are kept; safe to use from many threads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._idle: list[http.client.HTTPConnection] = []  # append and pop of a list are atomic

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _send(self, request: dict[str, Any], timeout_s: float) -> list[Prediction]:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        body = json.dumps(request, ensure_ascii=False).encode("utf-8")
        status, found_headers, content = self._post("/v1/predict", headers, body, timeout_s)
        try:
            found = json.loads(content)
            if status == 200:
                return [Prediction(one["label"], one["score"], one.get("logits")) for one in found["predictions"]]
            error = found["error"]
            code, message, request_id = error["code"], error["message"], error.get("request_id")
        except (ValueError, TypeError, KeyError, AttributeError):  # a proxy between us answers in its own way
            if status == 200:
                raise Failed("bad_answer", f"{self.address} answers, but not as this service does") from None
            code, message, request_id = f"http_{status}", http.client.responses.get(status, "unknown status"), None
        raise _kind(status)(code, message, request_id, seconds(found_headers.get("Retry-After")))

    def _post(
        self, path: str, headers: dict[str, str], body: bytes, timeout_s: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = self._idle.pop() if self._idle else kind(self.address)
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            with contextlib.suppress(BrokenPipeError):  # a body too large is answered before all of it was sent
                connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.close()  # what else was kept may be as dead
            if isinstance(error, socket.timeout):
                raise TimedOut("timeout", f"no answer of {self.address} in {self.timeout_s} s") from None
            raise Retryable("unreachable", f"{self.address}: {error or type(error).__name__}") from None
        self._idle.append(connection)
        return response.status, response.headers, content


def _kind(status: int) -> type[ServiceError]:
    if status in RETRIED:
        return Retryable
    if status == 401:
        return Unauthorized
    if status == 504:
        return TimedOut
    return Refused if 400 <= status < 500 else Failed
