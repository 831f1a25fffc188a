"""Data.task: regression. Trained, exported, verified, predicted and served; scores against definitions; wrong labels."""

import json

import numpy as np
import paddle
import pytest
from scipy import stats
from tiny_tasks import make, make_regression

from ernie_kqat import Predictor, UserError, config, metrics, tasks
from ernie_kqat.data.dataset import Split, load_task_data
from ernie_kqat.infer import answer_lines
from ernie_kqat.measure import evaluate_any
from ernie_kqat.serving import models
from ernie_kqat.tasks.regression import Regression
from ernie_kqat.tokenizer import load_tokenizer

RNG = np.random.default_rng(0)
TASK = Regression()


@pytest.fixture(scope="module")
def made(tiny_ernie, tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression")
    data = make_regression(folder / "data", rows=256)
    changes = {"Data": {"label": "score"}, "Train": {"epochs": 9}, "Model": {"dropout": 0.0}}
    return make(folder, tiny_ernie, data, "regression", **changes)


def test_it_learns_and_the_deployed_numbers_are_the_trained_ones(made):
    found = made.manifest["verification"]
    assert made.summary["best_pearson"] > 0.5  # 64 rows of chance have a std of 0.13
    assert made.summary["fp32_start_pearson"] is None  # the head of two labels was not taken for one of numbers
    assert found["passed"]
    assert found["agreement"] >= 0.995
    assert found["metric"] == "pearson"
    assert found["deployed_pearson"] == pytest.approx(made.summary["best_pearson"], abs=0.01)
    assert json.loads((made.run / "summary.json").read_text())["deployed"]["pearson"] == found["deployed_pearson"]


def test_the_artifact_predicts_as_the_run_does(made):
    data = made.run.parent / "data"
    scores = [evaluate_any(path, data, config.Data(label="score")) for path in (made.run, made.artifact)]
    assert scores[0]["pearson"] == pytest.approx(scores[1]["pearson"], abs=0.01)
    assert {"pearson", "spearman"} < set(scores[0])
    predictor = Predictor(made.artifact)
    low, high = predictor.predict(["a film", "a film"], ["the plot is bad", "the plot is fresh"])
    assert low.score < high.score
    (answers,) = answer_lines(predictor, [b"a film\tthe plot is fresh\n"], with_logits=True)
    assert answers == [
        {"text": "a film", "pair": "the plot is fresh", "score": round(high.score, 6), "logits": high.logits}
    ]


def test_it_is_served_as_a_score(made):
    (model,) = models.load({"a": made.artifact})
    assert model.describe()["task"] == "regression"
    assert model.label(np.array([[3.25], [-1.0]], np.float32)) == [("score", 3.25), ("score", -1.0)]


def test_the_best_model_says_what_it_is(made):
    settings = json.loads((made.run / "best_model/config.json").read_text())
    assert settings["problem_type"] == "regression"
    assert settings["architectures"] == ["ErnieForSequenceClassification"]
    assert settings["id2label"] == {"0": "score"}


def test_correlations_are_scipys():
    for _ in range(5):
        found, wanted = RNG.normal(size=50), RNG.integers(0, 6, 50).astype(np.float64)
        found += wanted
        assert metrics.pearson(found, wanted) == pytest.approx(stats.pearsonr(found, wanted)[0], abs=1e-12)
        assert metrics.spearman(found, wanted) == pytest.approx(stats.spearmanr(found, wanted)[0], abs=1e-12)
    assert metrics.spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 10, 100, 1000])) == pytest.approx(1)
    assert metrics.pearson(np.ones(4), np.arange(4.0)) == 0  # a constant tells nothing


def test_loss_is_the_mean_squared_error():
    logits, labels = RNG.normal(size=(7, 1)).astype(np.float32), RNG.normal(size=(7, 1)).astype(np.float32)
    loss = TASK.loss(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert float(loss) == pytest.approx(np.square(logits.astype(np.float64) - labels).mean(), rel=1e-6)
    told = TASK.imitation(paddle.to_tensor(logits), paddle.to_tensor(labels), 5.0, None)
    assert float(told) == float(loss)


def test_agreement_counts_the_rows_within_a_tenth_of_a_standard_deviation():
    reference = np.arange(10, dtype=np.float32)[:, None]  # std 2.872
    found = reference.copy()
    found[:, 0] += [0.28, -0.28, 0.29, 0, 0, 0, 0, 0, 0, -3]
    split = Split([], [], None, [], None, 0, "x")
    assert TASK.agreement(found, reference, split) == 0.8
    assert TASK.agreement(reference, reference, split) == 1.0
    assert TASK.agreement(np.ones((3, 1)), np.ones((3, 1)), split) == 1.0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("much", r"dev\.tsv:3: label 'much' found where a number is needed"),
        ("nan", r"dev\.tsv:3: label 'nan' found where a number is needed"),
        ("1e999", r"dev\.tsv:3: label '1e999' found where a number is needed"),
        ("", r"dev\.tsv:3: no label in column 'label'"),
    ],
)
def test_a_label_that_is_no_number_is_named_by_file_and_row(tmp_path, tiny_ernie, label, message):
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\t1.5\nbad\t-2\n")
    (tmp_path / "dev.tsv").write_text(f"text\tlabel\ngood\t1\nbad\t{label}\n")
    data = config.Data(task="regression", path=str(tmp_path))
    with pytest.raises(UserError, match=message):
        load_task_data(data, load_tokenizer(tiny_ernie), 0)


def test_options_of_other_tasks_are_refused(tmp_path, tiny_ernie):
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\t1.5\nbad\t-2\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood\t1.5\n")
    data = config.Data(task="regression", path=str(tmp_path), labels=["a", "b"])
    with pytest.raises(UserError, match="Data.labels: a, b: a task of kind regression has none"):
        load_task_data(data, load_tokenizer(tiny_ernie), 0)
    with pytest.raises(UserError, match="Train.metric: accuracy: Data.task regression has pearson, spearman"):
        TASK.metric("accuracy", ["score"])
    assert tasks.of_manifest({"task": TASK.manifest()}) == TASK
