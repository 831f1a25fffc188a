"""The faults of Paddle Serving's stock server, each reproduced once (docs/decisions/0010), cannot happen here.

Those of its processes (a dead op is never replaced, orphans after SIGTERM, a missing model kills the process group) are in
test_serving_workers.py; wrong ids and wrong errors also in test_serving_http.py.
"""

import ast
import contextlib
import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from artifacts import random_rows
from asking import ask, raw
from running import serve

import ernie_kqat.serving
from ernie_kqat import Predictor

SOURCES = sorted(Path(ernie_kqat.serving.__file__).parent.glob("*.py"))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def threads(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_serialized_objects_are_never_loaded(server, tmp_path):
    """Stock: a tensor with elem_type 13 is np.load(allow_pickle=True), which runs what the client sent."""
    grpc = pytest.importorskip("grpc")
    mark = tmp_path / "ran"
    array = io.BytesIO()
    np.save(array, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    for payload in (pickle.dumps(Bomb(mark)), array.getvalue()):
        status, _, value = ask(server.http, payload)
        assert (status, value["error"]["code"]) == (400, "invalid_json")
        with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as failure:
            channel.unary_unary("/ernie_kqat.Classifier/Predict")(payload, timeout=30)
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb is one


def test_no_file_of_ours_can_load_objects():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "marshal", "shelve", "multiprocessing"} & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute):
                assert (ast.unparse(node.value), node.attr) != ("np", "load"), path
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec"), path


def test_mixed_lengths_at_once_get_their_own_answers(server, tiny_int8):
    """Stock: one predictor shared by two threads mixes answers up; auto-batching of mixed lengths kills the op."""
    rows = random_rows(64, 150, seed=5)
    expected = Predictor(tiny_int8).logits(rows)

    def one(row):
        body = {"input_ids": [row[0]], "token_type_ids": [row[1]], "logits": True}
        return ask(server.http, body)[2]["predictions"][0]["logits"]

    with ThreadPoolExecutor(16) as pool:
        np.testing.assert_allclose(list(pool.map(one, rows)), expected, atol=1e-5)


def test_a_request_starts_no_thread(server):
    """Stock: an op with a timeout starts a thread for each request."""
    ask(server.http, {"text": "a good film"})
    before = [threads(pid) for pid in (server.process.pid, server.workers[0])]
    for _ in range(30):
        ask(server.http, {"text": "a good film"})
    assert [threads(pid) for pid in (server.process.pid, server.workers[0])] == before


def test_only_this_machine_is_listened_to(server):
    """Stock: both ports bind all interfaces."""
    inodes = set()
    for pid in (server.process.pid, *server.workers):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(file)
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) == 3
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, which gRPC writes as IPv6


def test_errors_show_nothing_of_the_server(server):
    """Stock: errors are HTTP 200, with Python class names and C++ paths in err_msg."""
    bodies = [b"", b"{", b"[]", b'{"text": 1}', b'{"input_ids": [[999999]]}', b'{"x": "/etc"}', os.urandom(50)]
    for body in bodies:
        status, _, value = ask(server.http, body)
        assert 400 <= status < 500
        text = str(value)
        for part in ("Traceback", "Error(", ".py", ".cc", "paddle", str(Path(__file__).parents[1]), "/tmp"):
            assert part not in text


def test_a_huge_body_takes_no_memory(server):
    """Stock: a body of 300 MB takes the gateway to 2.8 GB."""
    before = resident_mb(server.process.pid)
    length = 300_000_000
    head = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    assert raw(server.http, head + b"Content-Length: %d\r\n\r\n" % length + b"x" * 10_000).startswith(b"HTTP/1.1 413")
    blocks = (b"x" * 1_000_000 for _ in range(300))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may be cut off before it has sent everything
        assert ask(server.http, blocks)[0] == 413
    assert resident_mb(server.process.pid) < before + 30


def test_nothing_is_written_to_the_working_folder(tiny_int8, tmp_path, monkeypatch):
    """Stock: PipelineServingLogs, with requests in them, and process ids in ProcessInfo.json."""
    monkeypatch.chdir(tmp_path)
    with serve(tiny_int8, "--no-warm-up") as running:
        assert ask(running.http, {"text": "a good film"})[0] == 200
    assert list(tmp_path.iterdir()) == []


def test_the_front_loads_neither_paddle_nor_the_training_side():
    code = """
import sys
import ernie_kqat.serving.service
training = ("methods", "quantizers", "trainer", "config", "qat", "data", "models", "export", "predictor")
loaded = [name for name in sys.modules if name.split(".")[0] in ("paddle", "paddleslim", "paddlenlp", "paddle_serving_server")
          or name.startswith("ernie_kqat.") and name.split(".")[1] in training]
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_serving_imports_nothing_of_the_training_side():
    allowed = {
        "artifact",
        "benchmark",
        "errors",
        "files",
        "machine",
        "native",
        "tensorrt",
        "packed",
        "predictor",
        "shapes",
        "tasks",  # which load nothing of the training side when imported: the test above
        "strict",
        "tokenizer",
        "serving",
    }
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                assert set(names) <= allowed, f"{path}: {names}"


def test_only_the_adapter_knows_paddle_serving():
    for path in SOURCES:
        imported = [
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        ]
        assert path.name == "pipeline.py" or not any(name.startswith("paddle") for name in imported), path
