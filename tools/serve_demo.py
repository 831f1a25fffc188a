"""Serve the quickstart's model, ask it over HTTP and gRPC, print the answers, stop: `make serve-demo`."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from ernie_kqat import cli, config
from ernie_kqat.errors import UserError, run_tool
from ernie_kqat.serving.client import ServiceError, connect

TOOLS = Path(__file__).resolve().parent
SENTENCES = (
    "a gripping, beautifully acted film",
    "two hours that i will never get back",
    "not half as bad as its title",
    "the plot makes no sense , and nobody seems to care",
)
STOP_S = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", metavar="ARTIFACT", help="default: what `make quickstart` made")
    artifact = parser.parse_args().model or quickstart_artifact()
    command = ["tools/serve.py", "--model", artifact, "--port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    print(f"$ python {shlex.join(command)}", flush=True)
    with subprocess.Popen([sys.executable, *command], cwd=TOOLS.parent, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if not line:
                raise UserError(f"tools/serve.py ended with exit code {server.wait(STOP_S)}; its message is above")
            ready = json.loads(line)
            for url in (f"http://{ready['http']}", f"grpc://{ready['grpc']}"):
                ask(url)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(STOP_S)
    print(f"\nstopped with exit code {code}")
    return code


def quickstart_artifact() -> str:
    """The artifact's folder, as an absolute path."""
    output = Path(config.load(TOOLS.parent / "configs/quickstart.yaml").Global.output_dir)
    found = TOOLS.parent / output / cli.ARTIFACT
    if not found.is_dir():
        raise UserError(f"{found}: no such folder; `make quickstart` makes it, or give --model ARTIFACT")
    return str(found)


def ask(url: str) -> None:
    """Print the answers to SENTENCES."""
    print(f"\n$ python tools/client.py --url {url} …")
    try:
        with connect(url) as service:
            for sentence, answer in zip(SENTENCES, service.predict(SENTENCES)):
                print(f"{answer.label:>10}  {answer.score:.4f}  {sentence}")
    except ServiceError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_tool(main)
