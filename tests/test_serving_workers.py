"""Workers die, hang and are replaced; signals drain; nothing outlives the service."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import ask
from running import SERVE, serve

WAIT_S = 180  # on a machine that does other things too


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def metric(running, name):
    text = ask(running.metrics, path="/metrics")[2].decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_workers_that_die_are_replaced_and_their_requests_answered(tiny_int8):
    with serve(tiny_int8, "--no-warm-up", "--timeout-s", "120") as running:
        expected = ask(running.http, {"text": "a good film", "logits": True})[2]["predictions"]
        until(lambda: len(children(running.process.pid)) == 2)  # the worker and the nursery
        files = open_files(running.process.pid)
        stop = threading.Event()
        answers = []

        def load():
            while not stop.is_set():
                answers.append(ask(running.http, {"text": "a good film", "logits": True}))

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(load) for _ in range(4)]
            time.sleep(0.3)
            start = time.monotonic()
            os.kill(running.workers[0], signal.SIGKILL)
            until(lambda: metric(running, "ernie_kqat_worker_restarts_total") == 1)
            until(lambda: metric(running, "ernie_kqat_workers_ready") == 1)
            print(f"replaced after {time.monotonic() - start:.2f} s")
            time.sleep(0.3)
            stop.set()
            for one in asking:
                one.result()
        assert len(answers) > 4
        assert {answer[0] for answer in answers} == {200}  # each row of a dead worker is tried once more
        assert all(answer[2]["predictions"] == expected for answer in answers)
        until(lambda: len(children(running.process.pid)) == 2)
        assert open_files(running.process.pid) <= files + 4  # perhaps connections that are being closed
        assert ask(running.http, path="/readyz")[0] == 200


def test_forks_compute_with_several_threads(tiny_int8, server):
    question = {"texts": ["a good film"] * 8, "logits": True}
    expected = [prediction["logits"] for prediction in ask(server.http, question)[2]["predictions"]]
    with serve(tiny_int8, "--threads", "2", "--timeout-s", "120") as running:
        for worker in (running.workers[0], None):
            found = [prediction["logits"] for prediction in ask(running.http, question)[2]["predictions"]]
            assert found == [pytest.approx(row, abs=1e-5) for row in expected]
            if worker:
                os.kill(worker, signal.SIGKILL)


def test_a_nursery_that_dies_is_replaced_and_its_workers_live_on(tiny_int8):
    with serve(tiny_int8, "--no-warm-up", "--timeout-s", "120") as running:
        (worker,) = running.workers
        (nursery,) = set(children(running.process.pid)) - {worker}
        os.kill(nursery, signal.SIGKILL)
        until(lambda: nursery not in children(running.process.pid) and len(children(running.process.pid)) == 2)
        assert ask(running.http, {"text": "a good film"})[0] == 200
        assert metric(running, "ernie_kqat_worker_restarts_total") == 0
        os.kill(worker, signal.SIGKILL)  # perhaps before the new nursery can fork another
        assert ask(running.http, {"text": "a good film"})[0] == 200
        assert metric(running, "ernie_kqat_workers_ready") == 1


def test_a_hanging_worker_is_replaced_and_its_requests_get_an_error(tiny_int8):
    with serve(tiny_int8, "--no-warm-up", "--timeout-s", "2") as running:
        os.kill(running.workers[0], signal.SIGSTOP)
        status, _, value = ask(running.http, {"text": "a good film"})
        assert (status, value["error"]["code"]) == (504, "timeout")
        until(lambda: gone(running.workers[0]))
        until(lambda: ask(running.http, {"text": "a good film"})[0] == 200)


def test_overload_is_refused_at_once(tiny_int8):
    with serve(tiny_int8, "--no-warm-up", "--max-queue", "8", "--max-texts", "8") as running:
        os.kill(running.workers[0], signal.SIGSTOP)
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, running.http, {"texts": ["a good film"] * 8}) for _ in range(4)]
            until(lambda: sum(one.done() for one in waiting) >= 1)
            refused = next(one for one in waiting if one.done()).result()
            os.kill(running.workers[0], signal.SIGCONT)
            statuses = sorted(one.result()[0] for one in waiting)
        assert refused[0] == 503
        assert refused[2]["error"]["code"] == "overloaded"
        assert int(refused[1]["Retry-After"]) >= 1
        assert 200 in statuses
        assert set(statuses) == {200, 503}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_leaves_nothing(tiny_int8, number):
    with serve(tiny_int8, "--no-warm-up", "--timeout-s", "120") as running:
        family = [running.process.pid, *children(running.process.pid)]
        os.kill(running.workers[0], signal.SIGSTOP)  # so that requests are under way when the signal comes
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask, running.http, {"text": "a good film"}) for _ in range(3)]
            until(lambda: metric(running, "ernie_kqat_queue_rows") == 2)
            running.process.send_signal(number)
            time.sleep(0.2)
            os.kill(running.workers[0], signal.SIGCONT)
            assert [one.result()[0] for one in asked] == [200, 200, 200]
        assert running.process.wait(WAIT_S) == 0
        until(lambda: all(gone(pid) for pid in family[1:]))
        for address in (running.http, running.grpc, running.metrics):
            host, port = address.split(":")
            with contextlib.closing(socket.socket()) as connection:
                assert connection.connect_ex((host, int(port))) != 0


def test_no_worker_outlives_a_killed_front(tiny_int8):
    with serve(tiny_int8, "--no-warm-up", "--timeout-s", "120") as running:
        until(lambda: len(children(running.process.pid)) == 2)
        family = children(running.process.pid)
        running.process.kill()
        until(lambda: all(gone(pid) for pid in family))


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_bad_folder_ends_the_start_with_one_message_and_kills_nothing_else(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, str(SERVE), "--model", str(tmp_path / folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)  # in our process group
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"model 'default': {tmp_path / folder}: no" in done.stderr


def test_a_port_that_is_taken_ends_the_start(tiny_int8):
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(SERVE), "--model", str(tiny_int8), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert f"--port: 127.0.0.1:{port}: " in done.stderr


def test_a_program_that_paddle_cannot_load_ends_the_start(tmp_path, tiny_int8):
    import shutil

    from ernie_kqat import artifact

    folder = Path(shutil.copytree(tiny_int8, tmp_path / "copy"))
    manifest = artifact.read_manifest(folder)
    (folder / artifact.MODEL).write_bytes(b"no program")
    artifact.write_manifest(
        folder, {key: value for key, value in manifest.items() if key not in ("files", "format")}, manifest["files"]
    )
    command = [
        sys.executable,
        str(SERVE),
        "--model",
        str(folder),
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--metrics-port",
        "0",
    ]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
