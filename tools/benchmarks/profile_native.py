"""Where the native program's time goes: Linux `perf` samples it, and its functions' shares are printed as JSON.

Needs `perf` (Debian: linux-perf) and the right to use it. Shares are of the samples that fall into the operator. With AMX
sums and outputs are one function.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ernie_kqat.errors import UserError, run_tool

PARTS = {  # of the operator's functions, by what stands in their names
    "products: sums": "all_dots",
    "products: outputs": "product_of<(ernie_kqat::Activation)0",
    "products: outputs with GELU, ReLU or tanh": "product_of<(ernie_kqat::Activation)",
    "attention": "attend",
    "residual and LayerNorm": "normalize",
    "rounding": "quantize",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="ARTIFACT")
    parser.add_argument("--tokens", type=int, default=128, metavar="N")
    parser.add_argument("--batch", type=int, default=32, metavar="N")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        repeat(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "perf.data"))
        called("perf", "record", "-e", "cpu-clock", "-F", "500", "-o", data, sys.executable, *sys.argv, "--run")
        found = called(
            "perf", "report", "-i", data, "--stdio", "--sort", "symbol", "--dsos", "libernie_kqat.so", "-w", "200"
        )
    samples = dict(share_and_name(line) for line in found.splitlines() if "%" in line and not line.startswith("#"))
    total = sum(samples.values())
    if not total:
        raise UserError(f"{arguments.model}: no sample fell into the native operator; is the artifact's engine native?")
    shares = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for symbol, percent in samples.items():
        part = next((name for name, text in PARTS.items() if text in symbol), "the rest")
        shares[part] += percent / total
    print(json.dumps({name: round(share, 3) for name, share in shares.items()}))


def repeat(arguments: argparse.Namespace) -> None:
    """The same batch over and over."""
    from ernie_kqat.predictor import Predictor

    predictor = Predictor(arguments.model, engine="native")
    ids = np.random.default_rng(0).integers(5, predictor.manifest["vocab_size"], (arguments.batch, arguments.tokens))
    rows = [(row, np.zeros_like(row)) for row in ids]
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        predictor.logits(rows, len(rows))


def called(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; install it (Debian: linux-perf)") from None
    if done.returncode:
        raise UserError(f"{command[0]} {command[1]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def share_and_name(line: str) -> tuple[str, float]:
    """A line of perf's report, as `  46.39%  [.] symbol`."""
    percent, _, symbol = line.strip().partition("%")
    return symbol.strip(), float(percent)


if __name__ == "__main__":
    run_tool(main)
