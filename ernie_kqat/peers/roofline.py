"""How near an engine comes to what the CPU can do: the model's INT8 operations and bytes against measured peaks.

The peak of INT8 is a large product by oneDNN, as oneDNN itself times it; that of memory is a copy too large for the caches.
An operation is a multiplication or an addition.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..models.folder import CONFIG, read_json

IN, OUT, ROWS, RUNS = 4096, 2048, 4096, 9
COPY_BYTES = 2**28
_PRODUCT = re.compile(r"^onednn_verbose,exec,cpu,inner_product,.*,([\d.]+)$", re.MULTILINE)


def measure(threads: int) -> dict[str, float]:
    """{int8_gops: 1e9 INT8 operations a second, copy_gb: 1e9 bytes a second read and written} on `threads` cores."""
    variables = {"ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", __name__, str(threads)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    times = [float(ms) for ms in _PRODUCT.findall(done.stdout)]
    if done.returncode or len(times) < RUNS:
        raise RuntimeError(f"the peak of INT8 was not measured: {done.stderr.strip()[-500:]}")
    copied = json.loads(done.stdout.strip().splitlines()[-1])["copy_s"]
    return {"int8_gops": 2 * IN * OUT * ROWS / min(times) / 1e6, "copy_gb": 2 * COPY_BYTES / copied / 1e9}


def work(settings: dict[str, Any], rows: int, tokens: int) -> dict[str, float]:
    """Of one forward of [rows, tokens] without padding:

    int8_ops       of all Linears in all tokens, as the model is written
    int8_ops_least without what no answer needs: after the last layer's keys and values, all tokens but the first
    fp32_ops       attention's two products, likewise without the last layer's unneeded queries
    weight_bytes   int8 weights of the Linears, read once
    """
    hidden, ffn, layers = (settings[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    attention, feed_forward = 4 * hidden * hidden, 2 * hidden * ffn
    layer, head = attention + feed_forward, hidden * hidden
    every = rows * tokens
    last = every * 2 * hidden * hidden + rows * (2 * hidden * hidden + feed_forward)
    return {
        "int8_ops": 2.0 * (layers * every * layer + rows * head),
        "int8_ops_least": 2.0 * ((layers - 1) * every * layer + last + rows * head),
        "fp32_ops": 4.0 * hidden * tokens * ((layers - 1) * every + rows),
        "weight_bytes": float(layers * layer + head),
    }


def shares(model: str, peak: dict[str, float], cells: list[dict[str, Any]], engines: tuple[str, ...]) -> dict[str, Any]:
    """`peak`, and for each cell of fixed length the least milliseconds a sentence and what share of it engines reach."""
    settings = read_json(Path(model, CONFIG))
    found = []
    for cell in cells:
        if not cell["length"].isdigit():
            continue
        rows, tokens = cell["batch"], int(cell["length"])
        needed = work(settings, rows, tokens)
        least_ms = needed["int8_ops_least"] / peak["int8_gops"] / 1e6 / rows
        read_ms = needed["weight_bytes"] / peak["copy_gb"] / 1e6 / rows
        reached = {name: least_ms / cell["engines"][name]["ms"] for name in engines}
        found.append(
            {
                "length": cell["length"],
                "batch": rows,
                "least_ms": least_ms,
                "weights_ms": read_ms,
                **needed,
                "share": reached,
            }
        )
    return {**peak, "cells": found}


def _run(threads: int) -> None:
    import paddle
    import paddle.inference

    from .. import artifact
    from ..export import program
    from ..quantizers.attach import LayerGrid

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    rng = np.random.default_rng(0)
    linear = paddle.nn.Linear(IN, OUT)
    linear.weight.set_value(rng.integers(-127, 128, (IN, OUT)).astype(np.float32) / 256)
    grid = LayerGrid(np.full(1, 1 / 256, np.float32), 8, 1 / 64, 8)
    with tempfile.TemporaryDirectory() as folder:
        program.save_fp32(linear, Path(folder, "fp32"), [paddle.static.InputSpec([None, IN], "float32", name="x")])
        program.compile_int8(Path(folder, "fp32"), Path(folder, "inference"), {linear.weight.name: grid})
        config = paddle.inference.Config(str(Path(folder, artifact.MODEL)), str(Path(folder, artifact.PARAMS)))
        config.disable_gpu()
        config.disable_glog_info()
        config.enable_mkldnn()
        config.set_cpu_math_library_num_threads(threads)
        predictor = paddle.inference.create_predictor(config)
        predictor.get_input_handle("x").copy_from_cpu(rng.integers(-128, 128, (ROWS, IN)).astype(np.float32) / 64)
        for _ in range(RUNS):
            predictor.run()
    source = np.ones(COPY_BYTES, np.uint8)
    target = source.copy()
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - start)
    print(json.dumps({"copy_s": min(taken)}))


if __name__ == "__main__":
    _run(int(sys.argv[1]))
