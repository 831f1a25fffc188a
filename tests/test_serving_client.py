"""The clients: answers of a real service equal the Predictor's; retries, timeouts and errors against servers that misbehave."""

import contextlib
import http.server
import io
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from running import TOKEN

from ernie_kqat.errors import UserError
from ernie_kqat.serving.client import Failed, Refused, Retryable, TimedOut, Unauthorized, connect

WORDS = ["good", "bad", "film", "the", "a", "is", "movie", "fine", "dull"]


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def predictor(tiny_int8):
    from ernie_kqat import Predictor

    return Predictor(tiny_int8)


@pytest.fixture(params=["http", "grpc"])
def url(request, server):
    return f"{request.param}://{getattr(server, request.param)}"


@pytest.fixture(params=["http", "grpc"])
def guarded_url(request, guarded):
    return f"{request.param}://{getattr(guarded, request.param)}"


def same(answers, predictions):
    assert [one.label for one in answers] == [one.label for one in predictions]
    assert np.allclose([one.score for one in answers], [one.score for one in predictions], atol=1e-5)
    assert np.allclose([one.logits for one in answers], [one.logits for one in predictions], atol=1e-5)


@pytest.mark.parametrize("connections", [1, 4])
def test_many_sentences_are_answered_as_by_the_predictor_and_in_order(url, predictor, connections):
    texts = sentences(150)
    with connect(url, connections=connections) as service:
        same(service.predict(texts, logits=True), predictor.predict(texts))


def test_token_ids(url, predictor):
    texts = sentences(5)
    rows = predictor.encode(texts)
    with connect(url) as service:
        ids, kinds = [row.input_ids for row in rows], [row.token_type_ids for row in rows]
        same(service.predict_ids(ids, logits=True), predictor.predict(texts))
        same(service.predict_ids(ids, kinds, logits=True), predictor.predict(texts))


def test_nothing_asked_nothing_answered_and_logits_only_on_request(url):
    with connect(url) as service:
        assert service.predict([]) == []
        (answer,) = service.predict(["a good film"])
        assert answer.logits is None
        assert 0.5 <= answer.score <= 1


def test_refusals_are_typed_and_say_why(url):
    with connect(url) as service:
        with pytest.raises(Refused, match="text") as empty:
            service.predict(["a good film", "  "])
        assert empty.value.request_id
        with pytest.raises(Refused, match="nobody"):
            service.predict(["a good film"], model="nobody")
        with pytest.raises(Refused):
            service.predict_ids([[1, 10**6, 2]])
        with pytest.raises(Refused):
            service.predict(["a good film"], pairs=["a bad film"])
        assert service.predict(["a good film"]), "the client is as good as before"


def test_the_token(guarded_url):
    for token in (None, "wrong"):
        with connect(guarded_url, token) as service, pytest.raises(Unauthorized):
            service.predict(["a good film"])
    with connect(guarded_url, TOKEN) as service:
        assert service.predict(["a good film"])
        assert TOKEN not in repr(service)


def test_a_text_too_large_for_one_request_is_refused_and_not_tried_again(url):
    start = time.perf_counter()
    with connect(url, timeout_s=20, retries=100) as service, pytest.raises(Refused):
        service.predict(["film " * 400_000])
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        ("one text", None, "a list of texts is needed"),
        (["a", 7], None, r"texts\[1\]: 7 is not text"),
        (["a", "b\ud800"], None, r"texts\[1\]: half of a surrogate pair at character 1"),
        (["a", "b"], ["c"], "2 texts with 1 pairs"),
    ],
)
def test_what_cannot_be_sent_is_a_user_error(texts, pairs, message):
    with connect("http://127.0.0.1:1") as service, pytest.raises(UserError, match=message):
        service.predict(texts, pairs)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8866", "ftp://a:1", "http://", "http://a:1/v1", "http://user:pass@a:1", "grpc://"]
)
def test_a_wrong_url_is_a_user_error(address):
    with pytest.raises(UserError, match="is not http://HOST:PORT"):
        connect(address)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"retries": -1}, {"connections": 0}, {"token": "a\nb"}])
def test_wrong_options_are_user_errors(options):
    with pytest.raises(UserError, match=next(iter(options))):
        connect("http://127.0.0.1:1", **options)


@contextlib.contextmanager
def answering(*script):
    """An HTTP server that goes through the script, a step a request, and stays on the last one; yields (url, requests)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            step = script[min(len(requests), len(script) - 1)]
            requests.append(body)
            if step == "drop":
                self.close_connection = True
                return
            if step == "hang":
                time.sleep(2)
                self.close_connection = True
                return
            status, headers, content = step
            if content is None:
                content = json.dumps({"predictions": [{"label": text, "score": 0.5} for text in body["texts"]]})
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content.encode())}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()


def error(code):
    return json.dumps({"error": {"code": code, "message": "why", "request_id": "r1"}})


OK = (200, {}, None)


@pytest.mark.parametrize("first", [(429, {}, error("busy")), (502, {}, "<html>"), (503, {}, error("busy")), "drop"])
def test_overload_and_lost_connections_are_tried_again(first):
    with answering(first, first, OK) as (address, requests), connect(address) as service:
        assert [one.label for one in service.predict(["a"])] == ["a"]
        assert len(requests) == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Refused), (401, Unauthorized), (404, Refused), (413, Refused), (500, Failed), (504, TimedOut)],
)
def test_other_errors_are_not(status, kind):
    with answering((status, {}, error("some_code"))) as (address, requests), connect(address) as service:
        with pytest.raises(kind) as found:
            service.predict(["a"])
        assert len(requests) == 1
        assert (found.value.code, found.value.message, found.value.request_id) == ("some_code", "why", "r1")


def test_tries_are_counted_and_the_last_error_is_told():
    with answering((503, {}, error("overloaded"))) as (address, requests):
        with connect(address, retries=2) as service, pytest.raises(Retryable, match="overloaded: why"):
            service.predict(["a"])
        assert len(requests) == 3


def test_retry_after_is_waited_for_or_not_tried():
    with answering((503, {"Retry-After": 1}, error("overloaded")), OK) as (address, requests):
        start = time.perf_counter()
        with connect(address) as service:
            service.predict(["a"])
        assert time.perf_counter() - start >= 1
        assert len(requests) == 2
    with answering((503, {"Retry-After": 60}, error("overloaded"))) as (address, requests):
        with connect(address, timeout_s=5) as service, pytest.raises(Retryable):
            service.predict(["a"])
        assert len(requests) == 1, "a minute is more than the caller gives"


def test_a_service_that_hangs_times_out_and_is_not_asked_again():
    with answering("hang") as (address, requests):
        with connect(address, timeout_s=0.3) as service, pytest.raises(TimedOut, match="0.3 s"):
            service.predict(["a"])
        assert len(requests) == 1


def test_no_service_at_all():
    for protocol in ("http", "grpc"):
        with connect(f"{protocol}://127.0.0.1:1", retries=1, timeout_s=5) as service, pytest.raises(Retryable):
            service.predict(["a"])


@pytest.mark.parametrize("content", ["{}", "[]", "null", "not JSON", '{"predictions": []}', '{"predictions": [1]}'])
def test_another_service_is_recognized(content):
    with (
        answering((200, {}, content)) as (address, _),
        connect(address) as service,
        pytest.raises(Failed, match="bad_answer"),
    ):
        service.predict(["a"])


def test_requests_are_split_by_rows_and_by_bytes():
    with answering(OK) as (address, requests), connect(address) as service:
        texts = [f"text {index}" for index in range(130)]
        assert [one.label for one in service.predict(texts)] == texts
        assert [len(request["texts"]) for request in requests] == [64, 64, 2]
        requests.clear()
        service.predict(["é" * 150_000] * 4)
        assert [len(request["texts"]) for request in requests] == [1, 1, 1, 1], "two would be over 512 KiB"


def test_one_failure_among_many_requests_is_an_error():
    script = OK, (400, {}, error("bad")), OK
    with answering(*script) as (address, _), connect(address, connections=2) as service, pytest.raises(Refused):
        service.predict(["a"] * 500)


def test_the_client_loads_no_paddle_and_no_grpc_for_http():
    code = "import sys; from ernie_kqat.serving import http_client, lines; print({'paddle', 'grpc'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# tools/client.py


def test_tool_answers_arguments_as_json_lines(tool, url, predictor):
    code, out, _ = tool("client", "--url", url, "--logits", "a good film", "bad")
    answers = [json.loads(line) for line in out.splitlines()]
    found = predictor.predict(["a good film", "bad"])
    assert code == 0
    assert [answer["text"] for answer in answers] == ["a good film", "bad"]
    assert [answer["label"] for answer in answers] == [one.label for one in found]
    assert np.allclose([answer["logits"] for answer in answers], [one.logits for one in found], atol=1e-5)


def test_tool_says_which_lines_have_no_answer(tool, url, tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfa good film\r\n\nbad\n\xff\na\tb\tc\nfine")
    code, out, _ = tool("client", "--url", url, "--file", tmp_path / "lines.txt")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [answer.get("text") for answer in answers] == ["a good film", None, "bad", None, None, "fine"]
    assert [answer["line"] for answer in answers if "error" in answer] == [2, 4, 5]
    assert "not UTF-8" in answers[3]["error"]
    assert "3 columns" in answers[4]["error"]


def test_tool_writes_tsv_from_standard_input(tool, server, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a good film\n\nbad\n")))
    code, out, err = tool("client", "--url", f"http://{server.http}", "--format", "tsv", "--file", "-")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 1
    assert [row[2] for row in rows] == ["a good film", "", "bad"]
    assert rows[0][0] in ("negative", "positive")
    assert 0.5 <= float(rows[0][1]) <= 1
    assert err.startswith("line 2: ")


def test_tool_takes_the_token_from_a_file(tool, guarded, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    address = f"http://{guarded.http}"
    assert tool("client", "--url", address, "--token-file", tmp_path / "token", "a good film")[0] == 0
    code, out, err = tool("client", "--url", address, "a good film")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give sentences"),
        (["a", "--file", "b"], "not both"),
        (["a", "--url", "nowhere"], "is not http://HOST:PORT"),
        (["a", "--url", "http://127.0.0.1:1", "--retries", "0"], "unreachable"),
        (["--file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_tool_reports_wrong_use(tool, arguments, message):
    code, _, err = tool("client", *arguments)
    assert code == 2
    assert message in err
