"""Thirty minutes at 70 % of what the service can take: does anything grow?

Saturation is measured first (one sentence a request, 32 clients). Then requests come at random times (Poisson), whether or not
the earlier ones were answered, and a request's time counts from when it came. Each minute: memory and open files of every
process, p50 and p99. Slopes are of lines fitted to the minutes after the first three. Ends with one JSON line."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

import numpy as np
import serving_rig as rig

CLIENTS = 32
CONNECTIONS = 128
SATURATION_S = 20.0
SETTLING = 3  # minutes
TOLERANCE = 1e-3
MB_PER_HOUR = 20.0  # all processes together; the least that thirty minutes tell from noise
P99_GROWTH = 1.5  # of the median of the last third to that of the first: other work on the machine moves it by that


def main() -> int:
    arguments = rig.arguments(
        __doc__,
        minutes=(30, "of load"),
        minute_seconds=(60.0, "of a minute; less only to try this rig"),
        share=(0.7, "of saturation"),
        workers=(2, "worker processes"),
    )
    texts = rig.read_texts(arguments.data)
    labels, logits = rig.expected(arguments.model, texts)
    with rig.serving(arguments.model, "--workers", arguments.workers) as server:
        questions = rig.Questions(server, texts, labels, logits, TOLERANCE)
        found = asyncio.run(soak(server, questions, arguments))
        found["worker_restarts"] = server.metric("ernie_kqat_worker_restarts_total")
    return rig.report("soak", found, arguments.json, found.pop("steady"))


async def soak(server: rig.Server, questions: rig.Questions, arguments: Any) -> dict[str, Any]:
    seconds = min(SATURATION_S, arguments.minute_seconds)
    times = await rig.closed_loop(server.http, CLIENTS, seconds, lambda: questions.draw()[1], rig.must_be_200)
    saturation = len(times) / seconds
    rate = arguments.share * saturation
    minutes, failures = [], []
    await asyncio.sleep(1)  # the connections of the saturation are closed by then
    before = server.held()
    async with rig.connections(server.http, CONNECTIONS) as opened:
        idle: asyncio.LifoQueue[rig.Connection] = asyncio.LifoQueue()  # so that few are used while few are needed
        for connection in opened:
            idle.put_nowait(connection)
        for minute in range(1, arguments.minutes + 1):
            times = await one_minute(questions, idle, rate, arguments.minute_seconds, failures)
            minutes.append({"minute": minute, **rig.percentiles(times), "requests": len(times), "held": server.held()})
            print(minutes[-1], file=sys.stderr, flush=True)
    await asyncio.sleep(1)
    after = server.held()
    slopes = trends(minutes, arguments.minute_seconds)
    return {
        "steady": not failures and steady(minutes, slopes) and more_files(before, after) <= rig.FILES_OF_A_START,
        "more_files_after": more_files(before, after),
        "saturation_per_second": round(saturation, 1),
        "rate_per_second": round(rate, 1),
        "workers": arguments.workers,
        "failures": failures[:10],
        "slopes": slopes,
        "minutes": minutes,
    }


async def one_minute(
    questions: rig.Questions, idle: asyncio.LifoQueue, rate: float, seconds: float, failures: list[str]
) -> list[float]:
    """Milliseconds of each request that came in this minute, all of them answered."""
    rng, times, under_way = random.Random(), [], set()

    async def ask(came_at: float) -> None:
        connection = await idle.get()
        index, request = questions.draw()
        try:
            status, body = await connection.send(request)
            if status != 200 or not questions.right(index, body):
                failures.append(f"{status}: {body[:200]!r}")
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            failures.append(f"{type(error).__name__}: {error}")
        finally:
            idle.put_nowait(connection)
        times.append(1e3 * (time.perf_counter() - came_at))

    start = next_at = time.perf_counter()
    while next_at < start + seconds:
        await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
        task = asyncio.create_task(ask(next_at))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        next_at += rng.expovariate(rate)
    await asyncio.gather(*under_way)
    return times


def trends(minutes: list[dict[str, Any]], minute_seconds: float) -> dict[str, float]:
    """Per hour, over the minutes that count."""
    counted = minutes[SETTLING:] or minutes
    hours = np.array([one["minute"] for one in counted]) * minute_seconds / 3600
    series = {
        "rss_mb_per_hour": [sum(held["rss_mb"] for held in one["held"].values()) for one in counted],
        "files_per_hour": [sum(held["files"] for held in one["held"].values()) for one in counted],
        "p50_ms_per_hour": [one["p50_ms"] for one in counted],
        "p99_ms_per_hour": [one["p99_ms"] for one in counted],
    }
    if len(counted) < 2:
        return dict.fromkeys(series, 0.0)
    return {name: round(float(np.polyfit(hours, values, 1)[0]), 3) for name, values in series.items()}


def steady(minutes: list[dict[str, Any]], slopes: dict[str, float]) -> bool:
    counted = minutes[SETTLING:] or minutes
    third = max(1, len(counted) // 3)
    first, last = (float(np.median([one["p99_ms"] for one in part])) for part in (counted[:third], counted[-third:]))
    return slopes["rss_mb_per_hour"] <= MB_PER_HOUR and last <= P99_GROWTH * first


def more_files(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> int:
    """Open files after the load, less those before it; the clients' connections are closed both times."""
    return int(sum(held["files"] for held in after.values()) - sum(held["files"] for held in before.values()))


if __name__ == "__main__":
    sys.exit(main())
