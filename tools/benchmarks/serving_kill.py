"""kill -9 of a random worker every 3 seconds under load: is every request answered, right or by a clear error?

Five seconds after the last kill the service has to be whole again. Ends with one JSON line."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import sys
import time
from typing import Any

import serving_rig as rig

CLIENTS = 8
RECOVERY_S = 5.0
CLEAR = (429, 502, 503, 504)
TOLERANCE = 1e-3  # a right answer to another text is further away than that; serving_exact measures the equality


def main() -> int:
    arguments = rig.arguments(
        __doc__,
        seconds=(120.0, "of killing"),
        every=(3.0, "seconds between two kills"),
        workers=(2, "worker processes"),
    )
    texts = rig.read_texts(arguments.data)
    labels, logits = rig.expected(arguments.model, texts)
    with rig.serving(arguments.model, "--workers", arguments.workers) as server:
        questions = rig.Questions(server, texts, labels, logits, TOLERANCE)
        found = asyncio.run(kill(server, questions, arguments))
        found["restarts"] = server.metric("ernie_kqat_worker_restarts_total")
    found["held_by_front_after"] = found.pop("after")
    passed = (
        not (found["wrong"] or found["unclear"] or found["lost"]) and found["healthy_after_5_s"] and found["kills"] > 0
    )
    return rig.report("kill", found, arguments.json, passed)


async def kill(server: rig.Server, questions: rig.Questions, arguments: Any) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    times: list[float] = []
    stop = asyncio.Event()

    async def client(connection: rig.Connection) -> None:
        while not stop.is_set():
            index, request = questions.draw()
            start = time.perf_counter()
            try:
                status, body = await connection.send(request)
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                counts["lost"] += 1
                print(f"lost: {type(error).__name__} {error}", file=sys.stderr)
                continue
            times.append(1e3 * (time.perf_counter() - start))
            counts[judge(questions, index, status, body)] += 1
            if status != 200:
                await asyncio.sleep(0.05)  # as a client that backs off a little

    before = server.held()
    async with rig.connections(server.http, CLIENTS) as opened:
        clients = [asyncio.create_task(client(connection)) for connection in opened]
        kills = await kill_workers(server, arguments)
        recovered_s, healthy = await recovery(server, arguments.workers)
        stop.set()
        await asyncio.gather(*clients)
    right = [judge(questions, *one) for one in await ask_again(server, questions)]
    return {
        "seconds": arguments.seconds,
        "every_seconds": arguments.every,
        "clients": CLIENTS,
        "workers": arguments.workers,
        "kills": kills,
        "requests": len(times) + counts["lost"],
        **{name: counts[name] for name in ("right", "clear_errors", "wrong", "unclear", "lost")},
        "slowest_ms": round(max(times), 1),
        "recovered_s": recovered_s,
        "healthy_after_5_s": healthy and right == ["right"] * len(right),
        "before": first(before),
        "after": first(server.held()),
    }


async def kill_workers(server: rig.Server, arguments: Any) -> int:
    """The number of workers killed."""
    kills, end, rng = 0, time.perf_counter() + arguments.seconds, random.Random(0)
    while time.perf_counter() < end:
        await asyncio.sleep(arguments.every)
        workers = await asyncio.to_thread(server.workers)
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                kills += 1
    return kills


async def recovery(server: rig.Server, workers: int) -> tuple[float | None, bool]:
    """Seconds until all workers are ready (None: not in ten times the time allowed), and whether all was well after 5 s."""
    start, healthy, recovered = time.perf_counter(), False, None
    while time.perf_counter() - start < 10 * RECOVERY_S:
        ready = await asyncio.to_thread(server.metric, "ernie_kqat_workers_ready")
        if ready == workers:
            recovered = round(time.perf_counter() - start, 2)
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(max(0.0, RECOVERY_S - (time.perf_counter() - start)))
    if recovered is not None and recovered <= RECOVERY_S:
        status, _ = await asyncio.to_thread(rig.get, f"http://{server.http}/readyz")
        healthy = status == 200
    return recovered, healthy


async def ask_again(server: rig.Server, questions: rig.Questions) -> list[tuple[int, int, bytes]]:
    """100 requests after the recovery."""
    async with rig.connections(server.http, 1) as (connection,):
        drawn = [questions.draw() for _ in range(100)]
        return [(index, *await connection.send(request)) for index, request in drawn]


def judge(questions: rig.Questions, index: int, status: int, body: bytes) -> str:
    if status == 200:
        return "right" if questions.right(index, body) else "wrong"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        if status in CLEAR and error["code"] and error["message"]:
            return "clear_errors"
    print(f"unclear: {status} {body[:200]!r}", file=sys.stderr)
    return "unclear"


def first(held: dict[str, dict[str, float]]) -> dict[str, float]:
    return next(iter(held.values()))


if __name__ == "__main__":
    sys.exit(main())
