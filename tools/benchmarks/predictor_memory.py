"""The memory of a Predictor over many requests of random lengths and batch sizes. Prints a line a tenth, then JSON."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from ernie_kqat.errors import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="ARTIFACT")
    parser.add_argument("--engine", choices=["native", "paddle"], default="native")
    parser.add_argument("--requests", type=int, default=100_000, metavar="N")
    parser.add_argument("--largest-batch", type=int, default=4, metavar="N", help="sentences of a request: 1 to N")
    arguments = parser.parse_args()
    if arguments.requests < 10 or arguments.largest_batch < 1:
        parser.error("--requests: 10 or more; --largest-batch: 1 or more")
    from ernie_kqat.machine import machine
    from ernie_kqat.predictor import Predictor

    predictor = Predictor(arguments.model, engine=arguments.engine)
    rng = np.random.default_rng(0)
    vocabulary, longest = predictor.manifest["vocab_size"], predictor.max_length
    tenths, start = [], time.perf_counter()
    for request in range(arguments.requests):
        lengths = rng.integers(3, longest + 1, rng.integers(1, arguments.largest_batch + 1))
        rows = [(rng.integers(5, vocabulary, length), np.zeros(length, np.int64)) for length in lengths]
        predictor.logits(rows, len(rows))
        if (request + 1) % (arguments.requests // 10) == 0:
            tenths.append(round(resident_mb(), 1))
            print(f"{request + 1} requests: {tenths[-1]} MB, {time.perf_counter() - start:.0f} s", flush=True)
    found = {"engine": predictor.engine, "requests": arguments.requests, "max_length": longest, "tenths_mb": tenths}
    print(json.dumps({**found, "machine": machine()["cpu"]}))


def resident_mb() -> float:
    """The memory of this process that is in use, in 1e6 bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    run_tool(main)
