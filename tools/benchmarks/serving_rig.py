"""What the serving benchmarks share: a server in processes of its own, what these hold, lean HTTP clients, the report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ernie_kqat import files
from ernie_kqat.errors import UserError
from ernie_kqat.machine import installed, machine, versions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/serving.json"
PACKAGES = ("paddle-serving-server", "paddle-serving-app", "aiohttp", "grpcio", "protobuf")
KEPT_S = 15  # a connection idle for longer is not used again: the service closes it after 30
ANSWER_S = 60  # a request without an answer by then hangs
STOP_S = 60
FILES_OF_A_START = 8  # a process that is just starting opens so many for a moment


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """--model, --data, --json, and `options`: name=(default, help); their type is the default's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="ARTIFACT", help="a folder of tools/export.py")
    parser.add_argument("--data", required=True, metavar="TSV", help="rows to ask for, as SST-2's dev.tsv")
    parser.add_argument("--json", default=RESULTS, metavar="FILE", help="where the figures go (default %(default)s)")
    for name, (default, about) in options.items():
        kind = type(default)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{about} (default {default})"
        )
    return parser.parse_args()


def _shown(word: str) -> str:
    """A word of the command line, without the folders of this machine."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def report(name: str, figures: dict[str, Any], path: str | Path, passed: bool) -> int:
    """Merge the figures into the results, print them as one JSON line, and give the exit code."""
    found = {
        "passed": passed,
        **figures,
        "machine": machine(),
        "versions": {**versions(), **{package: installed(package) for package in PACKAGES}},
        "command": shlex.join(["python", *(_shown(word) for word in sys.argv)]),
    }
    path = Path(path)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files.write_json(path, {**results, name: found})
    print(json.dumps({name: found}, ensure_ascii=False))
    return 0 if passed else 1


def read_texts(data: str) -> list[str]:
    """The sentences of a file."""
    from ernie_kqat.data.readers import read_examples

    return [example.text for example in read_examples(Path(data), None, None, require_label=False)]


def expected(model: str, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Label and logits [texts, classes] of each text by the bare Predictor."""
    from ernie_kqat.predictor import Predictor

    predictions = Predictor(model).predict(texts)
    return [one.label for one in predictions], np.array([one.logits for one in predictions])


@dataclass
class Server:
    """A running tools/serve.py. `folder` is its current and its temporary folder, its own."""

    process: subprocess.Popen
    http: str
    grpc: str
    metrics: str
    folder: Path
    log: Path
    pids: list[int] = field(default_factory=list)  # every process ever seen

    def family(self) -> list[int]:
        """The front and all that descends from it, now."""
        found = [self.process.pid, *descendants(self.process.pid)]
        self.pids += [pid for pid in found if pid not in self.pids]
        return found

    def workers(self) -> list[int]:
        """Its workers, by its log; there is also a process that waits to become one."""
        events = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        ready = {event["worker"] for event in events if event["event"] == "worker is ready"}
        return [pid for pid in descendants(self.process.pid) if pid in ready]

    def held(self) -> dict[str, dict[str, float]]:
        """Resident MB and open files of each process, the front first."""
        return {str(pid): {"rss_mb": rss_mb(pid), "files": open_files(pid)} for pid in self.family()}

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = get(f"http://{self.metrics}/metrics")[1].decode()
        values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.partition("{")[0].split(" ")[0] == name]
        if not values:
            raise UserError(f"{self.metrics}/metrics has no {name}")
        return sum(map(float, values))


@contextlib.contextmanager
def serving(model: str, *options: object) -> Iterator[Server]:
    """A server on ports of its own, ready. It is stopped at the end, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="serving-rig-") as scratch:
        folder, log = Path(scratch, "own"), Path(scratch, "log")
        folder.mkdir()
        command = [sys.executable, str(ROOT / "tools/serve.py"), "--model", str(Path(model).resolve())]
        command += ["--port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # in Paddle's place: the server is stopped then too
        with open(log, "wb") as errors:
            process = subprocess.Popen(
                [*command, *map(str, options)],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            ready = json.loads(process.stdout.readline() or "{}")
            if not ready.get("ready"):
                raise UserError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            yield Server(process, ready["http"], ready["grpc"], ready["metrics"], folder, log)
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """SIGTERM, and SIGKILL for what does not heed it."""
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)  # does nothing to one that has ended
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *family]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> list[int]:
    """Children, their children and so on; a zombie is none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, fresh = [], [pid]
    while fresh:
        fresh = [child for parent in fresh for child in children.get(parent, ())]
        found += fresh
    return found


def rss_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that these processes have taken so far."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def open_files(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def get(url: str, timeout_s: float = 10) -> tuple[int, bytes]:
    """Status and body of a GET without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def post(server: Server, request: dict[str, Any]) -> bytes:
    """A whole HTTP request to /v1/predict."""
    body = json.dumps(request, ensure_ascii=False).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: {server.http}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One kept HTTP connection; as little work for each request as can be, for the cores are the server's."""

    def __init__(self, address: str):
        self.host, self.port = address.rsplit(":", 1)
        self.writer: asyncio.StreamWriter | None = None
        self.used_at = 0.0  # of time.monotonic

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError, EOFError or TimeoutError when there is none."""
        idle_s = time.monotonic() - self.used_at
        if self.writer is None or self.reader.at_eof() or idle_s > KEPT_S:
            self.close()
            self.reader, self.writer = await asyncio.open_connection(self.host, int(self.port))
        try:
            self.writer.write(request)
            answer = await asyncio.wait_for(read_answer(self.reader), ANSWER_S)
            self.used_at = time.monotonic()
            return answer
        except (OSError, EOFError, asyncio.TimeoutError):
            self.close()
            raise

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length))


@contextlib.asynccontextmanager
async def connections(address: str, count: int) -> AsyncIterator[list[Connection]]:
    opened = [Connection(address) for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def closed_loop(
    address: str, clients: int, seconds: float, next_request: Callable[[], bytes], check: Callable[[int, bytes], None]
) -> list[float]:
    """Milliseconds of each request of `clients`, each of which sends its next one as soon as it has its answer."""
    end = time.perf_counter() + seconds
    times: list[float] = []

    async def client(connection: Connection) -> None:
        while (start := time.perf_counter()) < end:
            check(*await connection.send(next_request()))
            times.append(1e3 * (time.perf_counter() - start))

    async with connections(address, clients) as opened:
        await asyncio.gather(*map(client, opened))
    return times


def must_be_200(status: int, body: bytes) -> None:
    if status != 200:
        raise UserError(f"status {status}: {body[:300].decode(errors='replace')}")


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """p50_ms and p99_ms."""
    p50, p99 = np.percentile(times_ms, (50, 99))
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


@dataclass
class Questions:
    """Single-text requests in random order, and whether an answer is its own text's."""

    server: Server
    texts: list[str]
    labels: list[str]
    logits: np.ndarray
    tolerance: float
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def draw(self) -> tuple[int, bytes]:
        """A text's index, and the request for it."""
        index = self.rng.randrange(len(self.texts))
        return index, post(self.server, {"text": self.texts[index], "logits": True})

    def right(self, index: int, body: bytes) -> bool:
        (found,) = json.loads(body)["predictions"]
        near = np.abs(np.array(found["logits"]) - self.logits[index]).max() <= self.tolerance
        return found["label"] == self.labels[index] and bool(near)
