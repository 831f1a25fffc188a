"""Clients of a running service: the same calls and the same errors over HTTP and gRPC.

    with connect("http://127.0.0.1:8866") as service:
        for prediction in service.predict(["a dull film", "a gripping film"]):
            print(prediction.label, prediction.score)

HTTP needs the standard library only, gRPC the package grpcio; neither loads Paddle. Proxies of the environment are not used.
"""

from __future__ import annotations

import abc
import concurrent.futures
import itertools
import random
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from ..errors import UserError

ROWS_PER_REQUEST = 64
BYTES_PER_REQUEST = 512 * 1024  # of text; the service takes 1 MiB unless told otherwise
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

Columns = dict[str, Sequence[Any]]  # of one name each: texts and pairs, or input_ids and token_type_ids
Number = Union[int, float]


@dataclass(frozen=True)
class Prediction:
    """The likeliest label, its probability, and all logits if they were asked for."""

    label: str
    score: float
    logits: list[float] | None = None


class ServiceError(Exception):
    """No answer. `code` is the service's word for why, `request_id` what its log calls the request, if it got there."""

    def __init__(self, code: str, message: str, request_id: str | None = None, retry_after_s: float = 0.0):
        super().__init__(f"{code}: {message}" + (f" (request {request_id})" if request_id else ""))
        self.code, self.message, self.request_id, self.retry_after_s = code, message, request_id, retry_after_s


class Refused(ServiceError):
    """The request is wrong, and so it would be if it were sent again: the message says what to change."""


class Unauthorized(Refused):
    """The token is missing or wrong."""


class TimedOut(ServiceError):
    """No answer in time."""


class Failed(ServiceError):
    """The service could not answer, for a reason that is not in the request."""


class Retryable(ServiceError):
    """Worth another try, and all tries are used up: overload, a lost worker, a lost connection."""


@dataclass
class Client(abc.ABC):
    """What both protocols share: splitting many rows into requests, and trying again.

    A request is repeated at most `retries` times, with pauses that double from 0.1 s (longer where the service says so),
    and only for overload, a lost worker or a lost connection: predictions have no side effects. `timeout_s` is for a
    request with all its repetitions. `connections` requests are under way at once.
    """

    address: str  # host:port
    secure: bool = False  # TLS
    token: str | None = field(default=None, repr=False)
    timeout_s: Number = 30.0
    retries: int = 4
    connections: int = 1

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s: {self.timeout_s} is not above 0")
        if self.retries < 0:
            raise UserError(f"retries: {self.retries} is under 0")
        if self.connections < 1:
            raise UserError(f"connections: {self.connections} is under 1")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise UserError("token: only printable ASCII characters are possible")  # and never the token itself

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connections: the end of this client."""

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, model: str = "default", logits: bool = False
    ) -> list[Prediction]:
        """One Prediction for each text (and its pair), in order. Raises UserError or ServiceError; no partial answer."""
        columns: Columns = {"texts": texts}
        if pairs is not None:
            columns["pairs"] = pairs
        for name, column in columns.items():
            _check_texts(name, column)
        return self._predict(columns, model, logits)

    def predict_ids(
        self,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        model: str = "default",
        logits: bool = False,
    ) -> list[Prediction]:
        """One Prediction for each row of token ids, [CLS] and [SEP] included, in order."""
        columns: Columns = {"input_ids": input_ids}
        if token_type_ids is not None:
            columns["token_type_ids"] = token_type_ids
        return self._predict(columns, model, logits)

    def _predict(self, columns: Columns, model: str, logits: bool) -> list[Prediction]:
        if len({len(column) for column in columns.values()}) > 1:
            raise UserError(" with ".join(f"{len(column)} {name}" for name, column in columns.items()))
        requests = [{**part, "model": model, "logits": logits} for part in _split(columns)]
        if self.connections == 1 or len(requests) == 1:
            answers = [self._answer(request) for request in requests]
        else:
            pool = concurrent.futures.ThreadPoolExecutor(self.connections)
            try:
                answers = list(pool.map(self._answer, requests))
            finally:
                pool.shutdown(cancel_futures=True)
        return list(itertools.chain.from_iterable(answers))

    def _answer(self, request: dict[str, Any]) -> list[Prediction]:
        """The answer to one request, tried again where that may help."""
        deadline = time.monotonic() + self.timeout_s
        for attempt in itertools.count():
            try:
                predictions = self._send(request, max(deadline - time.monotonic(), 0.001))
            except Retryable as error:
                pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1)  # not all at once
                pause_s = max(pause_s, error.retry_after_s)
                if attempt >= self.retries or time.monotonic() + pause_s >= deadline:
                    raise
                time.sleep(pause_s)
            else:
                rows = len(next(iter(request.values())))
                if len(predictions) != rows:
                    raise Failed("bad_answer", f"{len(predictions)} predictions for {rows} rows")
                return predictions
        raise AssertionError("unreachable")

    @abc.abstractmethod
    def _send(self, request: dict[str, Any], timeout_s: float) -> list[Prediction]:
        """One request, tried once; raises ServiceError."""


def connect(url: str, token: str | None = None, **options: Any) -> Client:
    """The client for http://HOST:PORT, https://…, grpc://HOST:PORT or grpcs://…; `options` are fields of Client."""
    parts = urllib.parse.urlsplit(url)
    known = parts.scheme in ("http", "https", "grpc", "grpcs")
    if not known or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise UserError(f"{url!r} is not http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT")
    secure = parts.scheme.endswith("s")
    if parts.scheme.startswith("grpc"):
        from .grpc_client import GrpcClient

        return GrpcClient(parts.netloc, secure, token, **options)
    from .http_client import HttpClient

    return HttpClient(parts.netloc, secure, token, **options)


def _split(columns: Columns) -> Iterator[Columns]:
    """Parts of at most ROWS_PER_REQUEST rows and about BYTES_PER_REQUEST bytes."""
    start = size = 0
    rows = len(next(iter(columns.values())))
    for row in range(rows):
        more = sum(_bytes(column[row]) for column in columns.values())
        if row > start and (row - start == ROWS_PER_REQUEST or size + more > BYTES_PER_REQUEST):
            yield {name: column[start:row] for name, column in columns.items()}
            start, size = row, 0
        size += more
    if rows:
        yield {name: column[start:] for name, column in columns.items()}


def _bytes(value: Any) -> int:
    return len(value.encode("utf-8")) if isinstance(value, str) else 8 * len(value)


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise UserError(f"{name}: {texts[:40]!r} is one text; a list of texts is needed")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name}[{index}]: {repr(text)[:40]} is not text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{name}[{index}]: half of a surrogate pair at character {error.start}") from None


def seconds(retry_after: str | None) -> float:
    """The number of Retry-After; its other form, a date, is left alone."""
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
