"""The HTTP front with a real worker: answers are the Predictor's, errors are JSON with a proper status."""

import contextlib
import gzip
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from artifacts import make_artifact, random_rows
from asking import ask, code, post, raw
from running import serve

from ernie_kqat import Predictor

TEXTS = [
    "a good film",
    "a very dull plot",
    "the music is lovely , but the script is weak",
    "[SEP]",
    "good [SEP] bad",
    "电影很好",
]
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def model(tiny_int8):
    return Predictor(tiny_int8)


@pytest.fixture(scope="module")
def strict(tiny_int8, tiny_ernie, tmp_path_factory):
    """Two models, one of pairs; a token; small limits."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "token").write_text(TOKEN)
    pairs = make_artifact(folder / "pairs", tiny_ernie, pair=True)
    options = ("--model", f"pairs={pairs}", "--token-file", folder / "token", "--body-timeout-s", "1", "--no-warm-up")
    limits = ("--max-texts", "8", "--max-queue", "8", "--max-body-bytes", "4096", "--log-file", folder / "log")
    with serve(tiny_int8, *options, *limits) as running:
        running.log = folder / "log"
        yield running


def test_texts_are_answered_as_by_the_predictor(server, model):
    status, headers, value = ask(server.http, {"texts": TEXTS, "logits": True}, X_Request_Id="mine-1")
    assert status == 200
    assert value["request_id"] == headers["X-Request-Id"] == "mine-1"
    assert len(value["version"]) == 12
    assert value["latency_ms"] > 0
    for found, expected in zip(value["predictions"], model.predict(TEXTS)):
        assert found["label"] == expected.label
        assert found["score"] == pytest.approx(expected.score, abs=1e-6)
        np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5)
    assert ask(server.http, {"text": TEXTS[0]})[2]["predictions"] == [
        {name: value["predictions"][0][name] for name in ("label", "score")}
    ]


def test_no_answer_is_mixed_up(server, model):
    rows = random_rows(160, 150)
    expected = model.logits(rows)
    parts = [rows[start : start + 1 + start % 7] for start in range(0, 150, 3)]

    def one(part):
        body = {"input_ids": [ids for ids, _ in part], "token_type_ids": [types for _, types in part], "logits": True}
        return [row["logits"] for row in ask(server.http, body)[2]["predictions"]]

    with ThreadPoolExecutor(8) as pool:
        for start, found in zip(range(0, 150, 3), pool.map(one, parts)):
            np.testing.assert_allclose(found, expected[start : start + len(found)], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"text": " "}, (400, "empty_text")),
        ({"text": "a", "pair": "b"}, (400, "pairs_superfluous")),
        ({"text": "a", "model": "other"}, (404, "unknown_model")),
        ({"input_ids": [[]]}, (400, "wrong_length")),
        ({"input_ids": [[1] * 65]}, (400, "wrong_length")),
        ({"input_ids": [[1, 2]], "token_type_ids": [[0]]}, (400, "wrong_length")),
        ({"input_ids": [[-1]]}, (400, "id_out_of_range")),
        ({"input_ids": [[2**62]]}, (400, "id_out_of_range")),
        ({"input_ids": [[1]], "token_type_ids": [[2]]}, (400, "id_out_of_range")),
    ],
)
def test_what_no_model_can_answer(server, body, found):
    assert code(ask(server.http, body)) == found


def test_paths_methods_and_types(server):
    assert code(ask(server.http, path="/v1/nothing")) == (404, "unknown_path")
    status, headers, _ = ask(server.http, path="/v1/predict")
    assert (status, headers["Allow"]) == (405, "POST")
    assert code(ask(server.http, b"text=a", Content_Type="application/x-www-form-urlencoded")) == (
        415,
        "wrong_content_type",
    )
    packed = gzip.compress(b'{"text": "a"}')
    assert code(ask(server.http, packed, Content_Encoding="gzip")) == (415, "wrong_content_type")
    assert code(ask(server.http, iter([b"x" * 65536] * 20))) == (413, "body_too_large")
    assert ask(server.http, path="/livez")[2] == ask(server.http, path="/readyz")[2] == {"ok": True}
    status, headers, page = ask(server.http, path="/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"<script>" in page


def test_a_connection_is_used_again_also_after_an_error(server):
    connection = http.client.HTTPConnection(server.http, timeout=30)
    for body, status in ((b'{"text": "good"}', 200), (b"{", 400), (b'{"text": "good"}', 200)):
        connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    connection.close()


def test_what_is_no_http(server):
    for data in (b"\x16\x03\x01\x02\x00", b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000 + b"\r\n\r\n"):
        answer = raw(server.http, data, half_close=True)
        assert answer[:13] in (b"", b"HTTP/1.0 400 ", b"HTTP/1.1 400 "), answer[:200]
        assert b"aiohttp" not in answer
        assert b"Traceback" not in answer
    assert ask(server.http, {"text": "good"})[0] == 200


def test_a_half_closed_client_gets_its_answer(server):
    answer = raw(server.http, post(b'{"text": "a good film"}'), half_close=True)
    assert b" 200 OK" in answer
    assert b'"label"' in answer


def test_expect_100_continue(server):
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(post(b"", b"Expect: 100-continue", length=16))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(b'{"text": "good"}')
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_slow_senders_are_told(strict):
    start = time.monotonic()
    answer = raw(strict.http, post(b'{"te', b"Authorization: Bearer " + TOKEN.encode(), length=100))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"slow_request" in answer
    assert time.monotonic() - start < 20


def test_slow_headers_are_given_up(strict):
    host, port = strict.http.split(":")
    start = time.monotonic()
    with socket.create_connection((host, int(port)), 30) as connection, contextlib.suppress(ConnectionError):
        for byte in b"POST /v1/pre":
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        assert connection.recv(1000) == b""
    assert time.monotonic() - start < 20  # and not when an idle connection is


def test_limits(strict):
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    assert code(ask(strict.http, {"texts": ["a"] * 9, "model": "default"}, **allowed)) == (413, "too_many_rows")
    assert code(ask(strict.http, b"x" * 5000, **allowed)) == (413, "body_too_large")
    assert code(ask(strict.http, {"text": "a"}, **allowed)) == (400, "model_missing")


def test_pairs_and_single_texts_behind_one_service(strict, tiny_int8):
    def ask_model(body):
        return ask(strict.http, body, Authorization=f"Bearer {TOKEN}")

    first = ask_model({"model": "pairs", "text": "good film", "pair": "bad film", "logits": True})[2]["predictions"][0]
    second = ask_model({"model": "pairs", "text": "good film", "pair": "very dull", "logits": True})[2]["predictions"][
        0
    ]
    assert first["logits"] != second["logits"]
    assert code(ask_model({"model": "pairs", "text": "a"})) == (400, "pairs_missing")
    assert code(ask_model({"model": "pairs", "texts": ["a"], "pairs": [""]})) == (400, "empty_text")
    alone = ask_model({"model": "default", "text": "good film", "logits": True})[2]["predictions"][0]
    np.testing.assert_allclose(alone["logits"], Predictor(tiny_int8).predict(["good film"])[0].logits, atol=1e-5)
    names = [
        model["name"]
        for model in ask_model(None)
        and ask(strict.http, path="/v1/models", Authorization=f"Bearer {TOKEN}")[2]["models"]
    ]
    assert names == ["default", "pairs"]


def test_a_token_is_asked_for_and_never_logged(strict):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        answer = ask(strict.http, {"text": "the secret of the film", "model": "default"}, **headers)
        assert code(answer) == (401, "unauthorized")
        assert answer[1]["WWW-Authenticate"] == "Bearer"
    assert code(ask(strict.http, path="/v1/models")) == (401, "unauthorized")
    body = {"text": "the secret of the film", "model": "default"}
    assert ask(strict.http, body, Authorization=f"Bearer {TOKEN}", X_Request_Id="logged-1")[0] == 200
    assert ask(strict.http, path="/readyz")[0] == 200
    log = strict.log.read_text()
    assert TOKEN not in log
    assert "secret" not in log
    lines = [json.loads(line) for line in log.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "logged-1"]
    assert (line["event"], line["outcome"], line["model"], line["rows"]) == ("request", "ok", "default", 1)


def test_metrics(server):
    def read():
        text = ask(server.metrics, path="/metrics")[2].decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}

    before = read()
    ask(server.http, {"texts": ["a", "b", "c"]})
    ask(server.http, b"{")
    after = read()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('ernie_kqat_requests_total{model="default",protocol="http"}') == 1
    assert grown('ernie_kqat_errors_total{code="invalid_json"}') == 1
    assert grown("ernie_kqat_latency_seconds_count") == 1
    assert grown("ernie_kqat_batch_rows_sum") >= 3
    assert after["ernie_kqat_workers_ready"] == 1
    assert after["ernie_kqat_queue_rows"] == 0
    assert "ernie_kqat_worker_restarts_total" in after
