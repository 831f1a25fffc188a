"""Requests of the serving tests, by the standard library only."""

from __future__ import annotations

import http.client
import json
import socket

TIMEOUT_S = 180  # on a machine that does other things too; nothing waits for it unless something is wrong


def ask(address: str, body: object = None, method: str = "", path: str = "/v1/predict", **headers: str):
    """(status, headers, JSON) of one request on a connection of its own; `body`: bytes, an iterable of them, or JSON."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    if body is not None and not isinstance(body, bytes) and not hasattr(body, "__next__"):
        body = json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        answer = connection.getresponse()
        content = answer.read()
        kind = answer.headers["Content-Type"]
        return answer.status, answer.headers, json.loads(content) if kind == "application/json" else content
    finally:
        connection.close()


def code(answer) -> tuple[int, str]:
    """Status and error code."""
    status, _, value = answer
    return status, value["error"]["code"]


def raw(address: str, data: bytes, half_close: bool = False, timeout_s: float = 30) -> bytes:
    """Everything that comes back for these bytes until the server closes."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout_s) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        while block := connection.recv(65536):
            found += block
        return found


def post(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    """The bytes of a POST to /v1/predict."""
    size = len(body) if length is None else length
    lines = (b"POST /v1/predict HTTP/1.1", b"Host: test", b"Content-Type: application/json", *headers)
    return b"\r\n".join((*lines, b"Content-Length: %d" % size, b"", body))
