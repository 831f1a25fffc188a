"""A run killed at any moment and resumed is bit-identical to one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from ernie_kqat import checkpoint

TOOL = Path(__file__).parents[1] / "tools/train.py"
LSQ = {"weight": {"quantizer": "lsq", "bits": 4, "step_lr": 0.01}, "activation": {"quantizer": "lsq", "step_lr": 0.01}}
SLIM = {
    "fp32": None,
    "qat": {"quant": {"weight": {"bits": 4}}, "kurtosis": {"targets": {"cap": 2.5}, "apply": "decoupled"}},
    "lsq": {"quant": LSQ},
    "squat": {"quant": LSQ, "squat": {}},
    "distill": {"quant": LSQ, "distill": {"task": 0.0, "logits": 1.0, "hidden": 1.0}},
}


def write_config(path, run, tiny_ernie, tiny_task, slim, steps):
    if slim and "distill" in slim:
        slim = {**slim, "distill": {**slim["distill"], "teacher": str(tiny_ernie)}}
    tree = {
        "Global": {"output_dir": str(run), "seed": 1, "log_every": 5},
        "Model": {"name_or_path": str(tiny_ernie)},
        "Data": {"path": str(tiny_task), "max_length": 32},
        "Slim": slim,
        "Train": {"epochs": 100, "max_steps": steps, "learning_rate": 3e-3, "eval_steps": 5, "save_steps": 1},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(config, *options):
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), "-c", str(config), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, bufsize=1
    )


def kill_later(process, seconds):
    """SIGKILL, so long after the first line that says that training goes on. Returns what it said, and whether it was killed."""
    said = []
    with process:
        for line in process.stdout:
            said.append(line)
            if line.startswith(("[EVAL]", "resumed")):
                time.sleep(seconds)
                process.kill()
                break
        said += list(process.stdout)
    return "".join(said), process.returncode == -signal.SIGKILL


def files_of(run):
    """What a run is worth, by content."""
    arrays = {}
    for path in (checkpoint.checkpoints(run / "checkpoints")[0] / "arrays.npz", run / "best_model/quantizers.npz"):
        if path.is_file():
            with np.load(path) as archive:
                arrays.update({f"{path.name}/{name}": archive[name] for name in archive.files})
    summary = json.loads((run / "summary.json").read_text())
    return arrays, {
        "metrics": (run / "metrics.jsonl").read_text(),
        "best": (run / "best_model/model_state.pdparams").read_bytes(),
        "summary": {key: value for key, value in summary.items() if key != "seconds"},
    }


def compare(tmp_path, tiny_ernie, tiny_task, slim, kills, steps):
    whole = write_config(tmp_path / "whole.yaml", tmp_path / "whole", tiny_ernie, tiny_task, slim, steps)
    process = start(whole)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    cut = write_config(tmp_path / "cut.yaml", tmp_path / "cut", tiny_ernie, tiny_task, slim, steps)
    rng, done = random.Random(0), 0
    out, killed = kill_later(start(cut), rng.uniform(0, 0.5))
    while killed:
        done += 1
        resume = "--resume" if checkpoint.checkpoints(tmp_path / "cut/checkpoints") else "--overwrite"
        if done == kills:
            process = start(cut, resume)
            out, _ = process.communicate()
            assert process.returncode == 0, out
            break
        out, killed = kill_later(start(cut, resume), rng.uniform(0, 0.5))
    assert done == kills, f"it ended after {done} kills, before all of them: {out}"
    assert "damaged" not in (tmp_path / "cut/train.log").read_text()
    (arrays, rest), (others, other) = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert rest == other
    assert arrays.keys() == others.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)
    assert not [path.name for path in (tmp_path / "cut").glob(".*")]


def test_one_kill(tmp_path, tiny_ernie, tiny_task):
    compare(tmp_path, tiny_ernie, tiny_task, SLIM["qat"], kills=1, steps=120)


@pytest.mark.slow
@pytest.mark.parametrize("slim", SLIM)
def test_twenty_kills_at_random_moments(tmp_path, tiny_ernie, tiny_task, slim):
    compare(tmp_path, tiny_ernie, tiny_task, SLIM[slim], kills=20, steps=800)
