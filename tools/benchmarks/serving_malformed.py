"""Requests that no client should send, by kind; `kinds()` is what serving_fuzz draws from.

Each kind is a function of a random generator that returns an Attempt: the bytes, how they are sent, and which answers are right.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

REFUSED = frozenset(range(400, 500))
LIMIT_BYTES = 1_048_576  # --max-body-bytes
VERY_LONG = 1_000_000


@dataclass(frozen=True)
class Attempt:
    """`allowed` are the statuses that are right; `may_close`: so is a closed connection without an answer.

    `manner`: whole; half_close (our side of the connection is shut after the bytes); slow (a byte now and then, never all);
    abandon (the connection is closed at once).
    """

    content: bytes
    allowed: frozenset[int] = REFUSED
    manner: str = "whole"
    may_close: bool = False


Kind = Callable[[random.Random], Attempt]


def head(line: str = "POST /v1/predict HTTP/1.1", length: object = None, **headers: str) -> bytes:
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    if length is not None:
        fields["Content-Length"] = str(length)
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in fields.items() if value), "", ""]).encode(
        "latin-1"
    )


def request(body: bytes | str, **headers: str) -> bytes:
    body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return head(length=len(body), **headers) + body


def good_body(rng: random.Random) -> dict[str, Any]:
    return rng.choice([{"text": "a dull film"}, {"texts": ["a dull film", "fine"]}, {"input_ids": [[101, 2000, 102]]}])


def fuzzed_json(rng: random.Random) -> Attempt:
    content = bytearray(json.dumps({**good_body(rng), "model": "default", "logits": True}).encode())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content))
        change = rng.randrange(3)
        if change == 0:
            content[at] = rng.randrange(256)
        elif change == 1:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        else:
            del content[at : at + rng.randint(1, 8)]
        content = content or bytearray(b"{")
    return Attempt(request(bytes(content)), REFUSED | {200} if is_json(content) else REFUSED)


def is_json(content: bytes | bytearray) -> bool:
    """Then what was changed may have been a letter of the text, and it is a good request still."""
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def wrong_types(rng: random.Random) -> Attempt:
    others = [
        None,
        0,
        1.5,
        True,
        "",
        [],
        {},
        [[]],
        [None],
        [1],
        ["a", 1],
        [["a"]],
        {"a": 1},
        "\u0000",
        [[1.5]],
        [[True]],
    ]
    field = rng.choice(["text", "texts", "input_ids", "model", "logits", "pair", "pairs", "token_type_ids"])
    right = {"text": str, "model": str, "logits": bool, "pair": str}.get(field)
    value = rng.choice([one for one in others if not (right and isinstance(one, right)) or one == ""])
    base = {} if field in ("text", "texts", "input_ids") else good_body(rng)
    return Attempt(request(json.dumps({**base, field: value})))


def wrong_fields(rng: random.Random) -> Attempt:
    body = rng.choice(
        [
            {},
            {"text": "a", "texts": ["b"]},
            {"texts": ["a"], "input_ids": [[1]]},
            {**good_body(rng), rng.choice(["feed", "x", "Text", "path", "__class__", "elem_type"]): 1},
            {"texts": ["a"], "pairs": ["b", "c"]},
            {"text": "a", "token_type_ids": [[0]]},
            {"texts": ["a"] * 100_000},
            {"text": "  \t "},
            {"texts": []},
            {"text": "a", "model": rng.choice(["../../etc/passwd", "nobody", "", "a" * 10_000])},
            {"key": ["feed"], "value": ["gASVHgAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU"]},
            {"tensors": [{"name": "x", "elem_type": 13, "byte_data": "gASVHgAAAAAAAACM"}]},
        ]
    )
    return Attempt(request(json.dumps(body)))


def odd_json(rng: random.Random) -> Attempt:
    body = rng.choice(
        [
            '{"text": "a", "text": "b"}',
            '{"text": NaN}',
            '{"input_ids": [[NaN]]}',
            '{"input_ids": [[1e999]]}',
            '{"input_ids": [[-Infinity]]}',
            '{"input_ids": [[%s]]}' % ("9" * rng.choice([20, 400, 5000])),
            '{"text": "\\ud800"}',
            '{"text": "\udcff"}',
            "",
            " ",
            "null",
            "[]",
            '"a"',
            "{",
            '{"text": "a"}}',
            '{"text": "a"} {"text": "b"}',
            "\ufeff{",
            '{"text": "a',
            "{'text': 'a'}",
        ]
    )
    return Attempt(request(body))


def deep(rng: random.Random) -> Attempt:
    depth = rng.choice([200, 2_000, 100_000])
    body = rng.choice(["[" * depth, '{"texts": ' + "[" * depth + "]" * depth + "}", '{"text":' * depth])
    return Attempt(request(body))


def huge(rng: random.Random) -> Attempt:
    kind = rng.randrange(4)
    if kind == 0:
        return Attempt(head(length=rng.choice([LIMIT_BYTES + 1, 10**9, 10**18])), may_close=True)
    if kind == 1:
        return Attempt(request('{"text": "' + "a" * (LIMIT_BYTES + 1) + '"}'), may_close=True)
    if kind == 2:
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        return Attempt(head(Transfer_Encoding="chunked") + chunk * 20 + b"0\r\n\r\n", may_close=True)
    return Attempt(request(b" " * rng.randint(1000, LIMIT_BYTES)))


def wrong_ids(rng: random.Random) -> Attempt:
    bad = rng.choice([-1, 2**31, 2**63, -(2**63) - 1, 10**30, 40_000_000, 0.5, True, "7", None, [1]])
    row = [101, *rng.choices(range(2000), k=rng.randint(0, 20)), 102]
    row[rng.randrange(len(row))] = bad
    body = rng.choice(
        [
            {"input_ids": [row]},
            {"input_ids": [[101, 102], row]},
            {"input_ids": [[]]},
            {"input_ids": [[1] * 100_000]},
            {"input_ids": [101, 102]},
            {"input_ids": [[101, 102]], "token_type_ids": [[0]]},
            {"input_ids": [[101, 102]], "token_type_ids": [[0, rng.choice([-1, 7, 2**40])]]},
            {"input_ids": [[101, 102]], "token_type_ids": []},
        ]
    )
    return Attempt(request(json.dumps(body)))


class _Bomb:
    """What would make a reader of pickles print a word; nothing of ours reads one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle was executed",)


def serialized(rng: random.Random) -> Attempt:
    array = io.BytesIO()
    np.save(array, np.array([_Bomb()], dtype=object), allow_pickle=True)
    content = rng.choice(
        [pickle.dumps(_Bomb()), array.getvalue(), pickle.dumps(list(range(100))), b"PK\x03\x04" + rng.randbytes(60)]
    )
    return Attempt(request(content, Content_Type=rng.choice(["application/json", "application/octet-stream", ""])))


def encoded(rng: random.Random) -> Attempt:
    inner = rng.choice([b'{"text": "a"}', b"a" * VERY_LONG, b"\x00" * 20 * VERY_LONG])
    content = rng.choice([gzip.compress(inner, 1), rng.randbytes(100)])
    return Attempt(
        request(content, Content_Encoding=rng.choice(["gzip", "deflate", "br", "zstd", "x"])), may_close=True
    )


def wrong_http(rng: random.Random) -> Attempt:
    good = request(json.dumps(good_body(rng)))
    content = rng.choice(
        [
            rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200) + b"\r\n\r\n",
            good.replace(b"HTTP/1.1", b"HTTP/9.9"),
            good.replace(b"POST", rng.choice([b"BREW", b"PO ST", b"\x00", b"GET /x HTTP/1.1\r\nPOST"])),
            good.replace(b"Content-Length: ", b"Content-Length: -"),
            good.replace(b"Content-Length", b"Content-Length: 5\r\nContent-Length"),
            good.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length"),
            good.replace(b"Content-Length", b"X: " + b"y" * 100_000 + b"\r\nContent-Length"),
            good.replace(b"Content-Length", b"".join(b"X-%d: y\r\n" % n for n in range(20_000)) + b"Content-Length"),
            head(Transfer_Encoding="chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
            head(Transfer_Encoding="chunked") + b"-5\r\n{}\r\n0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        ]
    )
    return Attempt(content, may_close=True)


def wrong_place(rng: random.Random) -> Attempt:
    path = rng.choice(
        [
            "/../../../etc/passwd",
            "/v1/predict/",
            "/v1",
            "/metrics",
            "/%2e%2e/%00",
            "/v1/predict;x",
            "/static/.git/config",
        ]
    )
    lines = [f"GET {path} HTTP/1.1", "GET /v1/predict HTTP/1.1", "DELETE / HTTP/1.1", "PUT /v1/models HTTP/1.1"]
    return Attempt(
        rng.choice(
            [head(rng.choice(lines)), request("{}", Content_Type=rng.choice(["text/plain", "image/png", "a/b/c"]))]
        )
    )


def half_closed(rng: random.Random) -> Attempt:
    good, bad = request(json.dumps(good_body(rng))), request("{}")
    if rng.random() < 0.3:
        return Attempt(good, frozenset({200}), "half_close")
    if rng.random() < 0.4:
        return Attempt(bad, REFUSED, "half_close")
    return Attempt(good[: rng.randrange(1, len(good))], REFUSED, "half_close", may_close=True)


def abandoned(rng: random.Random) -> Attempt:
    good = request(json.dumps(good_body(rng)))
    return Attempt(good[: rng.randrange(1, len(good) + 1)], frozenset(), "abandon", may_close=True)


def slow(rng: random.Random) -> Attempt:
    good = request(json.dumps(good_body(rng)))
    return Attempt(good[: rng.randrange(1, len(good))], REFUSED, "slow", may_close=True)


def kinds() -> dict[str, Kind]:
    """All but the slow ones, of which there have to be fewer."""
    found = (
        fuzzed_json,
        wrong_types,
        wrong_fields,
        odd_json,
        deep,
        huge,
        wrong_ids,
        serialized,
        encoded,
        wrong_http,
        wrong_place,
        half_closed,
        abandoned,
    )
    return {kind.__name__: kind for kind in found}
