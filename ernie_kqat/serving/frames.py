"""Messages between the front and a worker, over a socket pair: a small JSON header and one array's raw bytes. No pickle."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

SIZES = struct.Struct("<II")  # bytes of the header, bytes of the array
MAX_BYTES = 1 << 28
TYPES = {"int64": np.int64, "float32": np.float32}


def pack(header: dict[str, Any], array: np.ndarray | None = None) -> bytes:
    """The bytes of one message; `array` is int64 or float32."""
    payload = b""
    if array is not None:
        header = {**header, "type": array.dtype.name, "shape": array.shape}
        payload = array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    return SIZES.pack(len(text), len(payload)) + text + payload


def unpack(text: bytes, payload: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
    """Header and array of one message. Raises ValueError if they do not fit each other."""
    header = json.loads(text)
    if "type" not in header:
        return header, None
    return header, np.frombuffer(payload, TYPES[header["type"]]).reshape(header["shape"])


class Decoder:
    """Bytes as they come -> messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
        """The messages that are complete now."""
        self._buffer += data
        while len(self._buffer) >= SIZES.size:
            text, payload = _sizes(self._buffer[: SIZES.size])
            middle, end = SIZES.size + text, SIZES.size + text + payload
            if len(self._buffer) < end:
                return
            frame = unpack(bytes(self._buffer[SIZES.size : middle]), bytes(self._buffer[middle:end]))
            del self._buffer[:end]
            yield frame


def read(connection: socket.socket) -> tuple[dict[str, Any], np.ndarray | None] | None:
    """The next message; None when the other side is gone."""
    head = _exactly(connection, SIZES.size)
    if head is None:
        return None
    text, payload = _sizes(head)
    body = _exactly(connection, text + payload)
    return None if body is None else unpack(body[:text], body[text:])


def _sizes(head: bytes | bytearray) -> tuple[int, int]:
    text, payload = SIZES.unpack(head)
    if text + payload > MAX_BYTES:
        raise ValueError(f"a message of {text + payload} bytes; at most {MAX_BYTES}")
    return text, payload


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        block = connection.recv(min(count - len(data), 1 << 20))
        if not block:
            return None
        data += block
    return bytes(data)
