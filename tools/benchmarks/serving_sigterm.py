"""SIGTERM, SIGINT and kill -9 under saturating load: are accepted requests finished, and is anything left behind?

A request that was under way when SIGTERM or SIGINT came has to be answered 200; one that came later may be refused or find the
door closed. The exit code is 0. After kill -9 of the front there are no answers, but nothing may be left of it either.
Ends with one JSON line."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import serving_rig as rig

CLIENTS = 32
LOAD_S = 4.0  # before the signal
ORPHANS_END_S = 10.0
ACCEPTED_MS = 50  # a request sent that long before the signal has been read


@dataclass
class Seen:
    """What the clients saw."""

    answered: int = 0
    finished_after_signal: int = 0
    refused_after_signal: int = 0
    door_closed: int = 0
    lost: list[str] = field(default_factory=list)


def main() -> int:
    arguments = rig.arguments(__doc__, rounds=(3, "rounds of each signal"))
    texts = rig.read_texts(arguments.data)
    found: dict[str, Any] = {}
    passed = True
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        rounds = [one_round(arguments.model, texts, number) for _ in range(arguments.rounds)]
        found[number.name] = rounds
        passed &= all(clean(one, number) for one in rounds)
    return rig.report("sigterm", {"clients": CLIENTS, "workers": 2, **found}, arguments.json, passed)


def clean(found: dict[str, Any], number: signal.Signals) -> bool:
    nothing_left = not any(found[name] for name in ("processes", "ports", "shared_memory", "files"))
    if number == signal.SIGKILL:
        return not (found["processes"] or found["ports"] or found["shared_memory"])
    return nothing_left and found["exit_code"] == 0 and not found["lost"] and found["finished_after_signal"] > 0


def one_round(model: str, texts: list[str], number: signal.Signals) -> dict[str, Any]:
    shared = set(os.listdir("/dev/shm"))
    with rig.serving(model, "--workers", 2) as server:
        seen, drain_s = asyncio.run(load_and_signal(server, texts, number))
        end = time.perf_counter() + ORPHANS_END_S
        while (processes := alive(server)) and time.perf_counter() < end:
            time.sleep(0.1)
        return {
            **vars(seen),
            "exit_code": server.process.returncode,
            "drain_s": drain_s,
            "processes": processes,
            "ports": [address for address in (server.http, server.grpc, server.metrics) if listening(address)],
            "shared_memory": sorted(set(os.listdir("/dev/shm")) - shared),
            "files": sorted(str(path.relative_to(server.folder)) for path in server.folder.rglob("*")),
        }


async def load_and_signal(server: rig.Server, texts: list[str], number: signal.Signals) -> tuple[Seen, float]:
    seen, signalled_at = Seen(), float("inf")

    async def client(connection: rig.Connection, offset: int) -> None:
        index = offset
        while True:
            index += CLIENTS
            sent_at = time.perf_counter()
            try:
                status, body = await connection.send(rig.post(server, {"text": texts[index % len(texts)]}))
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                accepted = sent_at < signalled_at - ACCEPTED_MS / 1e3
                if accepted and number != signal.SIGKILL:
                    seen.lost.append(f"{type(error).__name__}: {error}")
                seen.door_closed += not accepted
                return
            seen.answered += status == 200
            if status != 200 and sent_at < signalled_at - ACCEPTED_MS / 1e3:
                seen.lost.append(f"{status}: {body[:200]!r}")
            elif signalled_at < float("inf"):
                seen.finished_after_signal += status == 200
                seen.refused_after_signal += status != 200
                if status != 200:
                    return

    async with rig.connections(server.http, CLIENTS) as opened:
        clients = [asyncio.create_task(client(connection, offset)) for offset, connection in enumerate(opened)]
        await asyncio.sleep(LOAD_S)
        server.family()
        signalled_at = time.perf_counter()
        server.process.send_signal(number)
        await asyncio.to_thread(server.process.wait, rig.STOP_S)
        drain_s = round(time.perf_counter() - signalled_at, 2)
        await asyncio.gather(*clients)
    return seen, drain_s


def alive(server: rig.Server) -> list[str]:
    """The processes of the server that still run, and what they are."""
    found = []
    for pid in server.pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:80])
        except OSError:
            continue
    return found


def listening(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


if __name__ == "__main__":
    sys.exit(main())
