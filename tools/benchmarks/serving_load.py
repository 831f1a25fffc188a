"""How much of the bare Predictor's speed is left behind HTTP, and how long a sentence waits at 1, 8 and 32 clients.

Throughput: the server with N workers and N processes with a bare Predictor take turns (bare, served, bare, …) on the same
requests, each turn as long as the others; the ratio is that of the medians. Twice: with 32 sentences a request and batches of
up to 32 on both sides, and with one sentence a request, where the server may batch what waits and the bare Predictor has
nothing to batch. The clients run on the same cores, and their time is the server's loss. On a machine that others use too, the
sentences a second of processor time (of the front and its workers; of the bare processes) say more. Ends with one JSON line."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import serving_rig as rig

from ernie_kqat.errors import UserError

BAR = 0.85
BATCH = 32
REQUESTS = {1: 512, BATCH: 64}  # different ones, by sentences a request; all are met before the first turn
SATURATING = {1: 64, BATCH: 6}  # clients, by sentences a request
LATENCY_CLIENTS = (1, 8, 32)
BARE = "--bare"


def main() -> int:
    arguments = rig.arguments(
        __doc__,
        workers=(2, "worker processes, and bare processes"),
        seconds=(8.0, "of each turn"),
        repeats=(5, "turns of each side"),
        bare=("", "internal: a bare process's batch size"),
    )
    if arguments.bare:
        bare(arguments.model, int(arguments.bare))
        return 0
    texts = rig.read_texts(arguments.data)
    found: dict[str, Any] = {
        "workers": arguments.workers,
        "threads": 1,
        "max_batch": BATCH,
        "turn_seconds": arguments.seconds,
        "repeats": arguments.repeats,
    }
    with rig.serving(arguments.model, "--workers", arguments.workers, "--threads", 1, "--max-batch", BATCH) as server:
        for size in (BATCH, 1):
            requests = draw(texts, size)
            found[f"texts_per_request_{size}"] = throughput(server, requests, size, arguments)
        found["latency"] = {
            f"clients_{clients}": latency(server, draw(texts, 1), clients, arguments.seconds)
            for clients in LATENCY_CLIENTS
        }
    ratio = found[f"texts_per_request_{BATCH}"]["ratio"]
    return rig.report("load", {"bar": BAR, "ratio": ratio, **found}, arguments.json, ratio >= BAR)


def draw(texts: list[str], size: int) -> list[list[str]]:
    """Requests of `size` sentences each, the same ones in every run."""
    rng = random.Random(size)
    return [rng.choices(texts, k=size) for _ in range(REQUESTS[size])]


def throughput(server: rig.Server, requests: list[list[str]], size: int, arguments: Any) -> dict[str, Any]:
    """Sentences a second of both sides, and the ratio of their medians."""
    bodies = itertools.cycle([rig.post(server, {"texts": texts}) for texts in requests])
    turns: dict[str, list[float]] = {"bare": [], "served": []}
    per_cpu: dict[str, list[float]] = {"bare": [], "served": []}
    client_share = []
    processes = [start_bare(arguments.model, size, requests[n :: arguments.workers]) for n in range(arguments.workers)]
    try:
        for repeat in range(arguments.repeats + 1):
            bare_pids, served_pids = [process.pid for process in processes], server.family()
            bare_cpu = rig.cpu_seconds(bare_pids)
            bare_rate = turn_bare(processes, arguments.seconds)
            bare_cpu, served_cpu = rig.cpu_seconds(bare_pids) - bare_cpu, rig.cpu_seconds(served_pids)
            cpu, start = time.process_time(), time.perf_counter()
            times = asyncio.run(
                rig.closed_loop(server.http, SATURATING[size], arguments.seconds, lambda: next(bodies), rig.must_be_200)
            )
            seconds = time.perf_counter() - start
            if repeat:  # the first turns warm up
                turns["bare"].append(bare_rate)
                turns["served"].append(len(times) * size / seconds)
                per_cpu["bare"].append(bare_rate * arguments.seconds / bare_cpu)
                per_cpu["served"].append(len(times) * size / (rig.cpu_seconds(served_pids) - served_cpu))
                client_share.append((time.process_time() - cpu) / seconds)
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(rig.STOP_S)
    medians = {name: statistics.median(rates) for name, rates in turns.items()}
    return {
        "clients": SATURATING[size],
        "bare_per_second": round(medians["bare"], 1),
        "served_per_second": round(medians["served"], 1),
        "ratio": round(medians["served"] / medians["bare"], 4),
        **{f"{name}_per_cpu_second": round(statistics.median(rates), 1) for name, rates in per_cpu.items()},
        "turns": {name: [round(rate, 1) for rate in rates] for name, rates in turns.items()},
        "clients_share_of_a_core": round(statistics.median(client_share), 3),
    }


def latency(server: rig.Server, requests: list[list[str]], clients: int, seconds: float) -> dict[str, Any]:
    """Of one sentence a request, each client sending its next when it has its answer."""
    bodies = itertools.cycle([rig.post(server, {"texts": texts}) for texts in requests])
    times = asyncio.run(rig.closed_loop(server.http, clients, seconds, lambda: next(bodies), rig.must_be_200))
    return {**rig.percentiles(times), "requests": len(times), "per_second": round(len(times) / seconds, 1)}


def start_bare(model: str, size: int, requests: list[list[str]]) -> subprocess.Popen:
    command = [sys.executable, __file__, "--model", model, "--data", "-", BARE, str(size)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(requests) + "\n")
    process.stdin.flush()
    if process.stdout.readline() != "ready\n":
        raise UserError(f"a process with a bare Predictor did not start: {command}")
    return process


def turn_bare(processes: list[subprocess.Popen], seconds: float) -> float:
    for process in processes:
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return sum(float(process.stdout.readline()) for process in processes)


def bare(model: str, batch_size: int) -> None:
    """A process of its own: requests from the first line, then for each line of seconds the sentences a second."""
    from ernie_kqat.predictor import Predictor

    predictor = Predictor(model, threads=1)
    given = json.loads(sys.stdin.readline())
    for texts in given:  # every shape once: the server, too, has met them all
        predictor.predict(texts, batch_size=batch_size)
    requests = itertools.cycle(given)
    print("ready", flush=True)
    for line in sys.stdin:
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < float(line):
            done += len(predictor.predict(next(requests), batch_size=batch_size))
        print(done / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    sys.exit(main())
