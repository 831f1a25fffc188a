"""CPU time of two artifacts' programs in turn, by length and batch: what a key costs or gives, on a busy machine too.

python tools/benchmarks/two_artifacts.py --model WITHOUT --model WITH --engine native --lengths 32 64 128 --batch 1 8 32

CPU time and not time, so that other processes lengthen it by lost caches only. Rows are random ids of one length.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from ernie_kqat import Predictor
from ernie_kqat.errors import run_tool

PASSES = 9
ENOUGH_TOKENS = 4096  # of a pass, at least: a call of some 100 us is no measure


def cpu_ms(predictor: Predictor, rows: list, batch: int) -> float:
    """CPU milliseconds of a sentence."""
    start = time.process_time()
    predictor.logits(rows, batch)
    return (time.process_time() - start) * 1e3 / len(rows)


def compare(predictors: list[Predictor], length: int, batch: int, words: int) -> str:
    """A line of the table: medians of both, and of the ratios of passes that follow each other."""
    count = -(-max(batch, ENOUGH_TOKENS // length) // batch) * batch
    ids = np.random.default_rng(length).integers(1, words, (count, length))
    rows = [(row.tolist(), [0] * length) for row in ids]
    for predictor in predictors:
        predictor.logits(rows[:batch], batch)
    times = np.array([[cpu_ms(predictor, rows, batch) for predictor in predictors] for _ in range(PASSES)])
    first, second = np.median(times, axis=0)
    low, ratio, high = np.percentile(times[:, 0] / times[:, 1], [0, 50, 100])
    return f"| {length} | {batch} | {first:.2f} | {second:.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, metavar="ARTIFACT", help="twice: the first over the second"
    )
    parser.add_argument("--engine", default="native", help="paddle or native")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128], metavar="N", help="tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="rows of a call")
    arguments = parser.parse_args()
    if len(arguments.model) != 2:
        parser.error("--model: two artifacts are needed")
    predictors = [Predictor(folder, engine=arguments.engine) for folder in arguments.model]
    words = min(predictor.manifest["vocab_size"] for predictor in predictors)
    print("| tokens | batch | first, CPU ms a sentence | second | first / second (smallest to largest of passes) |")
    print("|---|---|---|---|---|")
    for length in arguments.lengths:
        for batch in arguments.batch:
            print(compare(predictors, length, batch, words), flush=True)


if __name__ == "__main__":
    run_tool(main)
