"""tools/search.py: what it may change, what wins, and that it goes on where it was stopped."""

import json
import re

import numpy as np
import pytest
import yaml
from optuna.trial import TrialState
from test_tools import write_config

from ernie_kqat import UserError
from ernie_kqat.search import run, space

SPACE = {
    "each": {"Slim.quant.weight.bits": [8, 4]},
    "search": {
        "Train.learning_rate": {"low": 1e-3, "high": 5e-3, "log": True},
        "Slim.kurtosis": [None, {"targets": "pretrained"}],
    },
}


def write_space(path, tree):
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "it needs a section `search`"),
        ({"search": {}}, "it needs a section `search`"),
        ({"search": {"Train.learning_rate": [1]}, "echa": {}}, "echa: no such section; allowed: each, search"),
        ({"search": {"Train.learning_rate": 3}}, "search.Train.learning_rate: 3 found where a list of values or"),
        (
            {"search": {"Train.learning_rate": {"low": "1e-5", "high": 1}}},
            "low: '1e-5' is not a number .YAML reads 1e-5 as",
        ),
        ({"search": {"Train.learning_rate": {"low": 2, "high": 1}}}, "low <= high is needed"),
        ({"search": {"Train.learning_rate": {"low": 0, "high": 1, "log": True}}}, "with `log: true` 0 < low"),
        ({"search": {"Train.epochs": [1]}, "each": {"Train.epochs": [2]}}, "Train.epochs: in `each` and in `search`"),
        (
            {"search": {"Train.epochs": [1]}, "each": {"Train.warmup": {"low": 0, "high": 1}}},
            "each.Train.warmup: a list",
        ),
    ],
)
def test_a_wrong_space_is_named(tmp_path, tree, message):
    with pytest.raises(UserError, match=message):
        space.read(write_space(tmp_path / "s.yaml", tree))


def test_every_value_is_checked_before_anything_runs(tool, tmp_path, tiny_ernie, tiny_task):
    config = write_config(tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run")
    wrong = write_space(
        tmp_path / "s.yaml", {"search": {"Train.learning_rate": [1e-3]}, "each": {"Slim.quant.weight.bits": [8, 9]}}
    )
    code, _, err = tool("search", "-c", config, "--space", wrong, "--output", tmp_path / "out")
    assert code == 2
    assert "Slim.quant.weight.bits: 9 is not in" in err
    assert not (tmp_path / "out").exists()


def test_the_front_is_what_no_other_beats():
    rng = np.random.default_rng(0)
    rows = [
        {"deployed": float(a), "packed_bytes": int(b), "latency_ms": int(c)}
        for a, b, c in zip(rng.integers(0, 9, 60), rng.integers(0, 9, 60), rng.integers(0, 9, 60))
    ]
    best = run.front(rows)
    points = np.array([[-row["deployed"], row["packed_bytes"], row["latency_ms"]] for row in rows])
    beaten = [bool(((points <= point).all(1) & (points < point).any(1)).any()) for point in points]
    assert best == [row for row, lost in zip(rows, beaten) if not lost]
    assert 0 < len(best) < len(rows)


def test_a_search_goes_on_and_compares_what_it_exported(tool, tmp_path, tiny_ernie, tiny_task):
    short = {"epochs": 1, "eval_steps": 4}
    config = write_config(tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", Train=short)
    options = ["-c", config, "--space", write_space(tmp_path / "s.yaml", SPACE), "--output", tmp_path / "out"]
    code, _, err = tool("search", *options, "--trials", 1)
    assert code == 0, err
    first = json.loads((tmp_path / "out/trials.json").read_text())
    code, out, err = tool("search", *options, "--trials", 2, "--test", tiny_task / "dev.tsv")
    assert code == 0, err
    found = json.loads((tmp_path / "out/trials.json").read_text())
    assert len(first["trials"]) == 2
    assert len(found["trials"]) == 4
    assert [row["values"] for row in first["trials"]] == [
        row["values"] for row in found["trials"] if row["number"] == 0
    ]
    assert len({row["values"]["Train.learning_rate"] for row in found["trials"]}) == 2  # the same for both widths
    for row in found["trials"]:
        assert row["state"] == "complete", row
        folder = tmp_path / "out" / row["folder"]
        stored = yaml.safe_load((folder / "resolved.yaml").read_text())
        assert stored["Slim"]["quant"]["weight"]["bits"] == row["study"]["Slim.quant.weight.bits"]
        assert stored["Train"]["learning_rate"] == row["values"]["Train.learning_rate"]
        assert ("kurtosis" in stored["Slim"]) == (row["values"]["Slim.kurtosis"] is not None)
        assert row["packed_bytes"] == (folder / "packed").stat().st_size
        assert not (folder / "checkpoints").exists()
    tested = [row for row in found["trials"] if row["folder"] in found["front"]]
    assert all(row["test"] == row["deployed"] for row in tested)  # the same rows
    assert re.search(r"4 trials: 4 complete", out)
    assert (tmp_path / "out/pareto.svg").read_text().startswith("<?xml")


def test_a_bad_trial_is_ended_and_a_killed_one_forgotten(tmp_path, tiny_ernie, tiny_task, monkeypatch):
    """The learning rates are given: four that learn, then one that destroys the model in its first steps."""
    import optuna

    settings = write_config(
        tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", Train={"epochs": 1, "eval_steps": 2}
    )
    rates = iter([3e-3, 3e-3, 3e-3, 3e-3, 1.0])
    monkeypatch.setattr(
        space.Range, "suggest", lambda self, trial, key: trial.suggest_float(key, value := next(rates), value)
    )
    monkeypatch.setattr(
        run,
        "_deployed",
        lambda folder, settings, metric: {"deployed": 0.5, "latency_ms": 1, "size_bytes": 1, "packed_bytes": 1},
    )
    made = space.Space({"Train.learning_rate": space.Range(1e-3, 1.0)})
    options = run.Options(str(settings), ["Train.max_grad_norm=0"], made, 4, tmp_path / "out")
    run.search(options)
    storage = run.JournalStorage(run.JournalFileBackend(str(tmp_path / "out/studies.log")))
    optuna.load_study(study_name="{}", storage=storage).ask()  # as a killed process leaves it
    found = run.search(run.Options(str(settings), ["Train.max_grad_norm=0"], made, 5, tmp_path / "out"))
    assert [row["state"] for row in found["trials"]] == ["complete"] * 4 + ["fail", "pruned"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/trial_005/metrics.jsonl").read_text().splitlines()]
    assert max(steps) < 8
    assert not (tmp_path / "out/trial_005/best_model").exists()
    assert TrialState.FAIL.name.lower() == "fail"
