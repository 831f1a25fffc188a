"""Metrics against their definitions, and the best model by the metric that the task asks for."""

import json

import numpy as np
import pytest
from test_trainer import settings

from ernie_kqat import UserError, metrics
from ernie_kqat.trainer import train

RNG = np.random.default_rng(0)


def of(found, labels, classes=2):
    return metrics.scores(np.eye(classes, dtype=np.float32)[np.array(found)], np.array(labels))


def test_two_classes_by_counts():
    found, labels = RNG.integers(0, 2, 200), RNG.integers(0, 2, 200)
    tp, fp = ((found == 1) & (labels == 1)).sum(), ((found == 1) & (labels == 0)).sum()
    fn, tn = ((found == 0) & (labels == 1)).sum(), ((found == 0) & (labels == 0)).sum()
    scores = of(found, labels)
    assert set(scores) == set(metrics.NAMES)
    assert scores["accuracy"] == pytest.approx((tp + tn) / 200)
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert scores["macro_f1"] == pytest.approx((scores["f1"] + 2 * tn / (2 * tn + fp + fn)) / 2)
    root = np.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["matthews"] == pytest.approx((tp * tn - fp * fn) / root)


def test_one_class_found_is_no_correlation():
    scores = of([1, 1, 1, 1], [1, 1, 0, 1])
    assert (scores["accuracy"], scores["matthews"]) == (0.75, 0.0)


def test_three_classes_have_no_f1():
    scores = of([0, 1, 2, 2], [0, 1, 2, 1], classes=3)
    assert set(scores) == set(metrics.NAMES) - {"f1"}
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    with pytest.raises(UserError, match="Train.metric: f1: it is of two classes, and there are 3 labels; say macro_f1"):
        metrics.check("f1", 3)


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_the_best_is_by_the_metric(tmp_path, tiny_ernie, tiny_task, metric, monkeypatch):
    """Accuracy falls from step to step, Matthews rises."""
    steps = iter(range(100))

    def made(logits, labels):
        step = next(steps)
        return {"accuracy": 1 - step / 100, "macro_f1": 0.5, "matthews": step / 100, "f1": 0.5}

    monkeypatch.setattr(metrics, "scores", made)
    brief = {"epochs": 1, "max_steps": 3, "eval_steps": 1, "metric": metric}
    summary = train(settings(tmp_path, tiny_ernie, tiny_task, Slim=None, Train=brief))
    assert summary["best_step"] == {"accuracy": 0, "matthews": 3}[metric]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"eval_accuracy", "eval_macro_f1", "eval_matthews", "eval_f1"} < set(rows[-1])
    assert f"best dev {metric}" in (tmp_path / "run/train.log").read_text()
