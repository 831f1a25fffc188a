"""What a service is started with. Each field is an option of tools/serve.py; its default and its range are stated here only."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..strict import number

DEFAULT_MODEL = "default"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
TOKEN = re.compile(r"[!-~]{16,512}")  # printable ASCII without blanks


def _text(default: Any, text: str, metavar: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True)
class Settings:
    """Raises UserError for a value that is not allowed; the message names the option."""

    models: dict[str, Path]
    host: str = _text("127.0.0.1", "address to listen on; anything else than this machine's own needs care", "ADDRESS")
    port: int = number(8866, 0, 65535, "HTTP; 0: any free port")
    grpc_port: int = number(8867, 0, 65535, "gRPC")
    metrics_port: int = number(8868, 0, 65535, "Prometheus metrics")
    workers: int = number(0, 0, 64, "processes that compute; 0: this machine's cores / threads")
    threads: int = number(1, 1, 64, "cores that one worker uses for one batch")
    max_batch: int = number(32, 1, 1024, "rows of one forward, a power of two")
    max_wait_ms: float = number(0.0, 0.0, 1000.0, "wait so long for a batch to fill; 0: never wait")
    max_texts: int = number(256, 1, 65536, "rows of one request")
    max_text_chars: int = number(20_000, 1, 10**7, "characters of one text")
    max_body_bytes: int = number(1 << 20, 1024, 1 << 28, "bytes of one request")
    max_queue: int = number(256, 1, 10**6, "rows that may wait; more are refused with 503")
    max_connections: int = number(1000, 1, 10**5, "HTTP connections at once; more are closed")
    timeout_s: float = number(30.0, 0.1, 3600.0, "seconds that a request may take")
    body_timeout_s: float = number(
        10.0, 0.1, 3600.0, "seconds in which a client must have sent its headers, and again its body"
    )
    drain_s: float = number(20.0, 0.0, 3600.0, "seconds to finish accepted requests after SIGTERM or SIGINT")
    token_file: str | None = _text(None, "file with the token that clients must send", "FILE")
    log_file: str | None = _text(None, "log to FILE, rotated at 10 MB, five kept; default: standard error", "FILE")
    log_texts: bool = field(default=False, metadata={"help": "also log what clients ask; off for their privacy"})
    warm_up: bool = field(default=True, metadata={"help": "run every shape once before the service is ready"})

    def __post_init__(self):
        for item in dataclasses.fields(self):
            _check_range(item, getattr(self, item.name))
        if self.max_batch & (self.max_batch - 1):
            raise UserError(f"--max-batch: {self.max_batch} is not a power of two")
        if self.max_texts > self.max_queue:
            raise UserError(
                f"--max-texts: {self.max_texts} is over --max-queue, {self.max_queue}; so large a request never fits"
            )
        ports = [port for port in (self.port, self.grpc_port, self.metrics_port) if port]
        if len(set(ports)) < len(ports):
            raise UserError(f"--port, --grpc-port, --metrics-port: {ports}; each needs one of its own")

    def worker_count(self) -> int:
        """`workers`, or as many as keep this machine's cores busy."""
        return self.workers or max(1, len(os.sched_getaffinity(0)) // self.threads)

    def token(self) -> bytes | None:
        """The token of `token_file`; None: clients need none."""
        if self.token_file is None:
            return None
        try:
            text = Path(self.token_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--token-file: {self.token_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--token-file: {self.token_file}: not text") from None
        if not TOKEN.fullmatch(text):
            raise UserError(
                f"--token-file: {self.token_file}: one line of 16 to 512 letters, digits and marks is needed"
            )
        return text.encode()


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]ARTIFACT",
        help=f"a folder of tools/export.py, or packed, repeated for several; without a name it is {DEFAULT_MODEL!r}",
    )
    for item in dataclasses.fields(Settings):
        if item.name == "models":
            continue
        option, text = "--" + item.name.replace("_", "-"), item.metadata["help"]
        if isinstance(item.default, bool):
            if item.default:
                option, text = "--no-" + item.name.replace("_", "-"), f"do not {text}"
            action = "store_false" if item.default else "store_true"
            parser.add_argument(option, action=action, dest=item.name, help=text)
            continue
        kind = type(item.default) if "low" in item.metadata else str
        metavar = item.metadata.get("metavar") or ("N" if kind is int else "X")
        shown = "" if item.default is None else " (default %(default)s)"
        parser.add_argument(option, type=kind, default=item.default, metavar=metavar, help=text + shown)


def from_options(arguments: argparse.Namespace) -> Settings:
    """The settings that the options say."""
    values = {
        item.name: getattr(arguments, item.name) for item in dataclasses.fields(Settings) if item.name != "models"
    }
    return Settings(models=_models(arguments.model), **values)


def _models(options: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or "/" in name:
            name, folder = DEFAULT_MODEL, option
        if not NAME.fullmatch(name):
            raise UserError(f"--model {option}: {name!r} is no name; letters, digits, '.', '_' and '-' are allowed")
        if name in models:
            raise UserError(f"--model {option}: {name!r} is named twice; write --model NAME={folder}")
        models[name] = Path(folder)
    return models


def _check_range(item: dataclasses.Field, value: Any) -> None:
    if "low" not in item.metadata:
        return
    low, high = item.metadata["low"], item.metadata["high"]
    if not low <= value <= high:
        raise UserError(f"--{item.name.replace('_', '-')}: {value} is not in {low:g}..{high:g}")
