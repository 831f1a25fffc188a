"""What clients may send and what they get: checks of a JSON request, answers, error codes. Pure: no sockets, no model.

Both fronts use it. Every message says what to change and holds nothing of the server: no path, no class name.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIELDS = ("text", "texts", "pair", "pairs", "input_ids", "token_type_ids", "model", "logits")
SOURCES = ("text", "texts", "input_ids")
DIGITS = 19  # of an integer; int64's
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Failure(Exception):
    """A request that gets no answer: its code, its HTTP status, and what the client is told."""

    def __init__(self, code: str, message: str, status: int, retry_after_s: int | None = None):
        super().__init__(message)
        self.code, self.message, self.status, self.retry_after_s = code, message, status, retry_after_s


class Invalid(Failure):
    """The client has to change the request."""

    def __init__(self, code: str, message: str, status: int = 400):
        super().__init__(code, message, status)


class Unavailable(Failure):
    """The same request may succeed a little later."""

    def __init__(self, code: str, message: str):
        super().__init__(code, message, 503, retry_after_s=1)


def too_large(max_body_bytes: int) -> Invalid:
    return Invalid("body_too_large", f"the body is too large; at most {max_body_bytes} bytes are taken", 413)


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    max_texts: int
    max_text_chars: int


@dataclass(frozen=True)
class Question:
    """A checked request: `texts` and perhaps `pairs`, or else `input_ids` and perhaps `token_type_ids`."""

    model: str
    logits: bool
    texts: list[str] | None = None
    pairs: list[str] | None = None
    input_ids: list[list[int]] | None = None
    token_type_ids: list[list[int]] | None = None
    single: bool = False  # one text by `text`, not a list of them

    def place(self, name: str, index: int) -> str:
        """What the client calls this value."""
        return name.rstrip("s") if self.single else f"{name}[{index}]"


def request_id(offered: str | None) -> str:
    """The client's own id if it is harmless in a log and a header, or else a new one."""
    return offered if offered and REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)


def parse(body: bytes, limits: Limits, default_model: str | None) -> Question:
    """A JSON body -> Question; `default_model` is asked where the body names none. Raises Invalid."""
    fields = _object(body)
    for name in fields:
        if name not in FIELDS:
            shown = json.dumps(name)[1:-1][:60]
            raise Invalid("unknown_field", f"field '{shown}' is not known; allowed: {', '.join(FIELDS)}")
    given = [name for name in SOURCES if name in fields]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise Invalid("wrong_fields", f"exactly one of {', '.join(SOURCES)} is needed; found: {found}")
    source = given[0]
    second, other = {
        "text": ("pair", ("pairs", "token_type_ids")),
        "texts": ("pairs", ("pair", "token_type_ids")),
        "input_ids": ("token_type_ids", ("pair", "pairs")),
    }[source]
    for name in other:
        if name in fields:
            raise Invalid("wrong_fields", f"field '{name}' does not go with '{source}'; '{second}' does")
    model, logits = fields.get("model", default_model), fields.get("logits", False)
    if model is None:
        raise Invalid("model_missing", "several models are served: 'model' is needed")
    if not isinstance(model, str):
        raise Invalid("wrong_type", f"model: {_kind(model)} found where a string is needed")
    if not isinstance(logits, bool):
        raise Invalid("wrong_type", f"logits: {_kind(logits)} found where true or false is needed")
    if source == "input_ids":
        types = fields.get("token_type_ids")
        return check(
            Question(model, logits, input_ids=fields[source], token_type_ids=types), limits, "token_type_ids" in fields
        )
    texts, pairs = fields[source], fields.get(second)
    if source == "text":
        texts, pairs = [texts], [pairs] if second in fields else None
    question = Question(model, logits, texts=texts, pairs=pairs, single=source == "text")
    return check(question, limits, second in fields)


def check(question: Question, limits: Limits, with_second: bool) -> Question:
    """The question, if its lists are what they should be. Raises Invalid. `with_second`: pairs or segments were given."""
    if question.texts is not None:
        _check_list("texts", question.texts, limits)
        _check_texts(question, "texts", question.texts, limits)
        if with_second:
            _check_second("pairs", question.pairs, "texts", question.texts)
            _check_texts(question, "pairs", question.pairs, limits)
        return question
    _check_list("input_ids", question.input_ids, limits)
    _check_ids("input_ids", question.input_ids)  # type: ignore[arg-type]
    if with_second:
        _check_second("token_type_ids", question.token_type_ids, "input_ids", question.input_ids)
        _check_ids("token_type_ids", question.token_type_ids)  # type: ignore[arg-type]
    return question


def answer(
    model: str, version: str, identity: str, latency_ms: float, labels: Sequence[tuple[str, float]], logits: Any
) -> dict[str, Any]:
    """The answer's JSON; `logits`: a list for each row, or None where the client did not ask for them."""
    predictions: list[dict[str, Any]] = [{"label": label, "score": score} for label, score in labels]
    if logits is not None:
        for prediction, row in zip(predictions, logits):
            prediction["logits"] = row
    return {
        "model": model,
        "version": version,
        "request_id": identity,
        "latency_ms": round(latency_ms, 3),
        "predictions": predictions,
    }


def error(failure: Failure, identity: str) -> dict[str, Any]:
    """The error's JSON."""
    return {"error": {"code": failure.code, "message": failure.message, "request_id": identity}}


def encode(value: dict[str, Any]) -> bytes:
    """UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _object(body: bytes) -> dict[str, Any]:
    if not body:
        raise Invalid("empty_body", 'the body is empty; a JSON object is needed, as {"text": "a dull film"}')
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as failure:
        raise Invalid("invalid_json", f"the body is not UTF-8 text (at byte {failure.start})") from None
    except RecursionError:
        raise Invalid("invalid_json", "the body is nested too deeply") from None
    except json.JSONDecodeError as failure:
        raise Invalid("invalid_json", f"the body is not valid JSON: {failure}") from None
    except ValueError as failure:  # of the three hooks below
        raise Invalid("invalid_json", f"the body is not valid JSON: {failure}") from None
    if not isinstance(value, dict):
        raise Invalid("invalid_json", f"the body is {_kind(value)}; an object is needed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _integer(text: str) -> int:
    if len(text) > DIGITS + 1:  # Python's own limit is thousands of digits, and their conversion takes quadratic time
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return kinds.get(type(value), "null")


def _check_list(name: str, rows: Any, limits: Limits) -> None:
    if not isinstance(rows, list):
        raise Invalid("wrong_type", f"{name}: {_kind(rows)} found where a list is needed")
    if not rows:
        raise Invalid("no_rows", f"{name}: the list is empty")
    if len(rows) > limits.max_texts:
        raise Invalid("too_many_rows", f"{name}: {len(rows)} rows; at most {limits.max_texts} in one request", 413)


def _check_second(name: str, rows: Any, first: str, others: Any) -> None:
    if not isinstance(rows, list):
        raise Invalid("wrong_type", f"{name}: {_kind(rows)} found where a list is needed")
    if len(rows) != len(others):
        raise Invalid("wrong_length", f"{name}: {len(rows)} for {len(others)} {first}; each needs one")


def _check_texts(question: Question, name: str, texts: list[Any] | None, limits: Limits) -> None:
    for index, text in enumerate(texts or ()):
        if not isinstance(text, str):
            raise Invalid("wrong_type", f"{question.place(name, index)}: {_kind(text)} found where a string is needed")
        if len(text) > limits.max_text_chars:
            message = f"{question.place(name, index)}: {len(text)} characters; at most {limits.max_text_chars}"
            raise Invalid("text_too_long", message, 413)
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise Invalid(
                "invalid_text", f"{question.place(name, index)}: half of a surrogate pair, which is no text"
            ) from None


def _check_ids(name: str, rows: list[Any]) -> None:
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            raise Invalid("wrong_type", f"{name}[{index}]: {_kind(row)} found where a list of integers is needed")
        if not all(type(value) is int for value in row):
            value = next(value for value in row if type(value) is not int)
            raise Invalid("wrong_type", f"{name}[{index}]: {_kind(value)} found where an integer is needed")
