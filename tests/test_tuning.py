"""Instances and threads: the same answers, the fastest found and kept, and used only where it was found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from artifacts import random_rows

from ernie_kqat import Predictor, UserError, artifact, tuning
from ernie_kqat.machine import machine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tuned(tiny_int8, tmp_path):
    """(folder of a copy, what is kept in it)."""
    folder = Path(shutil.copytree(tiny_int8, tmp_path / "artifact"))
    kept = {"cpu": machine()["cpu"], "cores": 1, "batch": 4, "instances": 3, "threads": 1, "tried": []}
    tuning.save(folder, kept)
    return folder, kept


def test_every_division_of_the_cores():
    assert tuning.divisions(1) == [(1, 1)]
    assert tuning.divisions(6) == [(6, 1), (3, 2), (2, 3), (1, 6)]


def test_instances_answer_as_one_does(tiny_int8):
    rows = random_rows(45, 150)
    expected = Predictor(tiny_int8, instances=1).logits(rows, 8)
    several = Predictor(tiny_int8, instances=3)
    for batch_size in (1, 8, 100):
        np.testing.assert_allclose(several.logits(rows, batch_size), expected, atol=1e-5)
    assert several.logits([]).shape == (0, 2)
    assert len(several._idle) <= 3


def test_what_one_instance_raises_is_raised(tiny_int8, monkeypatch):
    predictor = Predictor(tiny_int8, instances=2)

    def broken(rows):
        raise MemoryError("no memory")

    monkeypatch.setattr(predictor, "_batch", broken)
    with pytest.raises(MemoryError, match="no memory"):
        predictor.logits(random_rows(4, 150))


def test_what_was_found_is_used_unless_told_otherwise(tuned):
    folder, _ = tuned
    assert (Predictor(folder).instances, Predictor(folder).threads) == (3, 1)
    assert (Predictor(folder, threads=1).instances, Predictor(folder, instances=2).instances) == (1, 2)
    assert Predictor(folder).predict(["a good film"])[0].label == Predictor(folder, 1).predict(["a good film"])[0].label


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"cores": 10**6}])
def test_what_was_found_elsewhere_is_not_used(tuned, change):
    folder, kept = tuned
    tuning.save(folder, {**kept, **change})
    assert (Predictor(folder).instances, Predictor(folder).threads) == (1, 1)


def test_the_tool_keeps_what_it_prints(tiny_int8, tiny_task, tmp_path):
    folder = shutil.copytree(tiny_int8, tmp_path / "artifact")
    command = [sys.executable, "tools/tune.py", "--model", folder, "--data", tiny_task, "--rows", "16", "--cores", "1"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert artifact.read_manifest(folder)["tuning"] == found
    assert [(one["instances"], one["threads"]) for one in found["tried"]] == [(1, 1)]
    assert found["tried"][0]["sentences_per_s"] > 0


def test_wrong_numbers_are_refused(tiny_int8):
    with pytest.raises(UserError, match=r"cores: 0 is not in 1\.\.\d+, the cores that this process may use"):
        tuning.measure(tiny_int8, [], 0)
    with pytest.raises(UserError, match="instances: 0 is under 1"):
        Predictor(tiny_int8, instances=0)
