"""Two processes of Paddle's launcher against one with the doubled batch, and what happens when one of them dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_kill import LSQ, TOOL

from ernie_kqat import parallel

SLIM = {
    "fp32": None,
    "qat, moving average, kurtosis in the loss": {
        "quant": {"weight": {"bits": 4}, "activation": {"range": "moving_average"}},
        "kurtosis": {"targets": {"fixed": 1.8}, "lambda": 1e-2},
    },
    "lsq": {"quant": LSQ},
    "lsq, squat": {"quant": {**LSQ, "weight": {**LSQ["weight"], "bits": 8}}, "squat": {}},
}
# A weight that is rounded the other way moves the loss, and which are near the edge depends on last bits; SQuAT meets them twice.
TOLERANCE = {"lsq": 1e-4, "lsq, squat": 1e-3}


def write_config(path, run, tiny_ernie, tiny_task, slim, task="classification", **train):
    tree = {
        "Global": {"output_dir": str(run), "seed": 1, "log_every": 1},
        "Model": {"name_or_path": str(tiny_ernie), "dropout": 0.0},
        "Data": {"path": str(tiny_task), "max_length": 32, "task": task},
        "Slim": slim,
        "Train": {"epochs": 100, "learning_rate": 1e-4, "eval_steps": 25, **train},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def launch(config, *options, processes=2, **keywords):
    """The tool by Paddle's launcher, or alone; its logs beside the config."""
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}
    together = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes), "--backend", "gloo"]
    together += ["--log_dir", str(config.with_suffix(""))]
    command = [sys.executable, *(together if processes > 1 else []), str(TOOL), "-c", str(config), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **keywords
    )


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def flat(tree, prefix=""):
    """The numbers of a row by the path to them."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: value for key, one in tree.items() for path, value in flat(one, f"{prefix}/{key}").items()}


def compare(tmp_path, tiny_ernie, tiny_task, slim, steps, tolerance=1e-5, task="classification"):
    configs = [
        write_config(
            tmp_path / f"{name}.yaml",
            tmp_path / name,
            tiny_ernie,
            tiny_task,
            slim,
            task,
            batch_size=rows,
            max_steps=steps,
        )
        for name, rows in (("one", 30), ("two", 15))
    ]
    for processes, config in enumerate(configs, 1):
        process = launch(config, processes=processes)
        out, _ = process.communicate()
        assert process.returncode == 0, out
    first, second = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert len(first) > steps
    for alone, together in zip(first, second):
        assert alone.keys() == together.keys()
        for name, value in flat(alone).items():
            limit = 0.02 if name.startswith("/eval_") else tolerance * max(1.0, abs(value))
            assert flat(together)[name] == pytest.approx(value, abs=limit), (alone["step"], name)
    dev_rows = [json.loads((tmp_path / name / "summary.json").read_text())["dev_rows"] for name in ("one", "two")]
    assert dev_rows[0] == dev_rows[1]


def test_two_processes_are_one_with_the_doubled_batch(tmp_path, tiny_ernie, tiny_task):
    """256 rows in batches of 30: the last of an epoch has 16. LSQ's first steps, SQuAT's two gradients, activation ranges."""
    compare(tmp_path, tiny_ernie, tiny_task, SLIM["qat, moving average, kurtosis in the loss"], steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("slim", SLIM)
def test_over_fifty_steps(tmp_path, tiny_ernie, tiny_task, slim):
    compare(tmp_path, tiny_ernie, tiny_task, SLIM[slim], 50, TOLERANCE.get(slim, 1e-5))


@pytest.mark.slow
def test_words_of_two_processes_count_alike(tmp_path, tiny_ernie):
    """Of sentences as long in tokens, one has as many words and the next a third; the batch's mean is over words."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        sentences = [["film", "-", "good"] * 4 if rng.random() < 0.5 else ["film-good"] * 4 for _ in range(256)]
        lines = ["".join(f"{word}\t{rng.choice(['O', 'B-GOOD'])}\n" for word in words) for words in sentences]
        (tmp_path / "data" / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    compare(tmp_path, tiny_ernie, tmp_path / "data", None, steps=12, task="tokens")


@pytest.mark.slow
def test_when_one_process_is_asked_to_stop_all_stop_with_a_checkpoint(tmp_path, tiny_ernie, tiny_task):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", tiny_ernie, tiny_task, None, save_steps=1000)
    process = launch(config, start_new_session=True)
    try:
        until(lambda: (tmp_path / "run/metrics.jsonl").is_file() and len(rows_of(tmp_path / "run")) > 15)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert re.search(r"stopped at step \d+/400; --resume continues", (tmp_path / "run/train.log").read_text()), out
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends(tmp_path, tiny_ernie, tiny_task):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", tiny_ernie, tiny_task, None, save_steps=10)
    process = launch(config, start_new_session=True)
    try:
        log = tmp_path / "c/workerlog.1"
        until(lambda: (tmp_path / "run/metrics.jsonl").is_file() and len(rows_of(tmp_path / "run")) > 15)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert re.search(r"abort|ABORT|exit code -9|error", out), out
        assert not any(Path(f"/proc/{child}").exists() for child in children), log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process = launch(config, "--resume", "-o", "Train.max_steps=null", start_new_session=True)
    try:
        until(lambda: "resumed at step" in (tmp_path / "run/train.log").read_text())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(done, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize("rows", [1, 2, 3, 30])
def test_every_row_is_computed_once(monkeypatch, rows):
    """Of shares that count something."""
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    targets = np.arange(50)
    found, total = [], 0
    for rank in range(4):
        monkeypatch.setenv("PADDLE_TRAINER_ID", str(rank))
        own, counted = parallel.share_of(np.arange(10, 10 + rows), targets)
        assert len(own)
        total += counted
        found += list(own) if counted else []
    assert sorted(found) == list(range(10, 10 + rows))
    assert total == sum(range(10, 10 + rows))


def test_a_rank_out_of_range_is_named(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "2")
    with pytest.raises(
        parallel.UserError, match=r"PADDLE_TRAINER_ID: 2 is not in 0\.\.1; use paddle.distributed.launch"
    ):
        parallel.begin()
