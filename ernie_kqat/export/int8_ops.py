"""Whether a program really computes in INT8: counted from what oneDNN says that it executed, not from what was asked.

An `fc` whose scales are missing, or an engine on a CPU without the kernels, computes in fp32 and says nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VERBOSE = {"ONEDNN_VERBOSE": "1"}  # one line on stdout for each primitive that is executed
TIMEOUT_SECONDS = 300
_EXECUTED = re.compile(r"^onednn_verbose,exec,", re.MULTILINE)
_EXECUTED_INT8 = re.compile(
    r"^onednn_verbose,exec,cpu,(?:inner_product|matmul|convolution),.*\bsrc_[su]8:", re.MULTILINE
)


def int8_ops_run(model: str | Path, params: str | Path, inputs: dict[str, np.ndarray]) -> int:
    """How many inner products, matmuls and convolutions oneDNN executes with int8 inputs in one forward.

    inputs: an array for each input name of the program. Runs in a process of its own, because oneDNN reads its verbose
    setting once. Raises RuntimeError if that process dies or oneDNN reports nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        feed = Path(folder, "feed.npz")
        with open(feed, "wb") as file:
            np.savez(file, **inputs)
        command = [sys.executable, "-m", "ernie_kqat.export.int8_ops", str(model), str(params), str(feed)]
        done = subprocess.run(
            command, env={**os.environ, **VERBOSE}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    if done.returncode:
        raise RuntimeError(f"running {model} failed with code {done.returncode}: {done.stderr.strip()[-500:]}")
    if not _EXECUTED.search(done.stdout):
        raise RuntimeError(f"running {model}: oneDNN reported no operation; is it compiled into this Paddle?")
    return len(_EXECUTED_INT8.findall(done.stdout))


def _run(model: str, params: str, feed: str) -> None:
    import paddle.inference

    config = paddle.inference.Config(model, params)
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    predictor = paddle.inference.create_predictor(config)
    with np.load(feed) as arrays:
        for name in predictor.get_input_names():
            predictor.get_input_handle(name).copy_from_cpu(arrays[name])
    predictor.run()


if __name__ == "__main__":
    _run(*sys.argv[1:])
