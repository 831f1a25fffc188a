"""Services of tools/serve.py that the tests start, each in a process of its own on ports of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVE = Path(__file__).parents[1] / "tools" / "serve.py"
STOP_S = 30
TOKEN = "secret-of-the-tests"


@dataclass
class Running:
    http: str
    grpc: str
    metrics: str
    workers: list[int]
    process: subprocess.Popen


@contextlib.contextmanager
def serve(artifact: Path, *options: object) -> Iterator[Running]:
    """A service of the artifact, ready; stopped by SIGTERM at the end unless it has stopped by then."""
    ports = [word for name in ("--port", "--grpc-port", "--metrics-port") for word in (name, "0")]
    folder = tempfile.TemporaryDirectory()
    log = str(Path(folder.name, "log"))
    quick = ["--no-warm-up", "--workers", "1", "--log-file", log]
    command = [sys.executable, str(SERVE), "--model", str(artifact), *ports, *quick]
    process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline() or "{}")
        assert ready.get("ready"), f"no ready line from {command}"
        yield Running(ready["http"], ready["grpc"], ready["metrics"], ready["workers"], process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        finally:
            process.kill()
            process.stdout.close()
            folder.cleanup()


@pytest.fixture(scope="session")
def server(tiny_int8) -> Iterator[Running]:
    """One worker on the tiny INT8 model, for tests that leave it as it was."""
    with serve(tiny_int8) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(tiny_int8, tmp_path_factory) -> Iterator[Running]:
    """The same behind a token."""
    token = tmp_path_factory.mktemp("guarded") / "token"
    token.write_text(f"{TOKEN}\n", encoding="utf-8")
    with serve(tiny_int8, "--token-file", token) as running:
        yield running
