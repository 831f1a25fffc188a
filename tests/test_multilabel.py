"""Data.task: multilabel. Trained, exported, verified, predicted and served; scores against definitions; wrong labels."""

import json

import numpy as np
import paddle
import pytest
from sklearn.metrics import f1_score
from tiny_tasks import TOPICS, make, make_multilabel

from ernie_kqat import Predictor, UserError, config, metrics
from ernie_kqat.data.dataset import Split, load_eval_split, load_task_data
from ernie_kqat.serving import models
from ernie_kqat.tasks.multilabel import MultiLabel, sigmoid
from ernie_kqat.tokenizer import load_tokenizer

RNG = np.random.default_rng(0)
TASK = MultiLabel()
LOGITS = RNG.normal(0, 2, (6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tiny_ernie, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multilabel")
    return make(folder, tiny_ernie, make_multilabel(folder / "data", rows=192), "multilabel", Train={"epochs": 5})


def test_it_learns_and_the_deployed_sets_are_the_trained_ones(made):
    found = made.manifest["verification"]
    assert made.summary["best_micro_f1"] > 0.8
    assert found["passed"]
    assert found["agreement"] >= 0.995
    assert found["deployed_micro_f1"] == pytest.approx(made.summary["best_micro_f1"], abs=0.01)
    assert made.manifest["labels"] == sorted(TOPICS)
    assert made.manifest["task"] == {"kind": "multilabel", "separator": "|"}
    assert json.loads((made.run / "best_model/config.json").read_text())["problem_type"] == "multi_label_classification"


def test_an_answer_is_a_set_and_may_be_empty(made):
    predictor = Predictor(made.artifact)
    (model,) = models.load({"a": made.artifact})
    answers = predictor.predict(["the film story", "the story", "the", "the movie film"])
    for answer in answers:
        chances = 1 / (1 + np.exp(-np.float64(answer.logits)))
        assert answer.labels == [name for name, chance in zip(predictor.labels, chances) if chance > 0.5]
        np.testing.assert_allclose(list(answer.scores.values()), chances, rtol=1e-12)
        assert set(answer.fields()) == {"labels", "scores"}
        ((joined, score),) = model.label(np.float32([answer.logits]))
        assert joined == "|".join(answer.labels)
        assert score == pytest.approx(np.prod(np.where(chances > 0.5, chances, 1 - chances)), rel=1e-6)


def test_scores_by_counts():
    found, wanted = RNG.random((40, 4)) < 0.4, RNG.random((40, 4)) < 0.4
    found[:, 3] = wanted[:, 3] = False  # a label that does not occur is no part of the macro average
    scores = metrics.of_sets(found, wanted)
    assert scores["micro_f1"] == pytest.approx(f1_score(wanted, found, average="micro"))
    assert scores["macro_f1"] == pytest.approx(f1_score(wanted[:, :3], found[:, :3], average="macro"))
    assert scores["exact_match"] == np.mean([(a == b).all() for a, b in zip(found, wanted)])
    assert metrics.of_sets(np.zeros((2, 3), bool), np.zeros((2, 3), bool)) == {
        "micro_f1": 0.0,
        "macro_f1": 0.0,
        "exact_match": 1.0,
    }


def test_loss_is_the_binary_cross_entropy():
    labels = (RNG.random((6, 3)) < 0.5).astype(np.float32)
    chance = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    expected = -(labels * np.log(chance) + (1 - labels) * np.log(1 - chance)).mean()
    assert float(TASK.loss(paddle.to_tensor(LOGITS), paddle.to_tensor(labels))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_imitation_is_the_binary_cross_entropy_to_the_teachers_chances(temperature):
    teacher = RNG.normal(0, 2, (6, 3)).astype(np.float32)
    own, wanted = (1 / (1 + np.exp(-x.astype(np.float64) / temperature)) for x in (LOGITS, teacher))
    expected = -(wanted * np.log(own) + (1 - wanted) * np.log(1 - own)).mean() * temperature**2
    found = TASK.imitation(paddle.to_tensor(LOGITS), paddle.to_tensor(teacher), temperature, None)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(TASK.margins(paddle.to_tensor(LOGITS), None).numpy(), np.abs(LOGITS).ravel())


def test_agreement_asks_for_the_whole_set():
    other = LOGITS.copy()
    other[0, 1] *= -1
    other[2] *= -1
    other[3] *= 2
    assert TASK.agreement(other, LOGITS, Split([], [], None, [], None, 0, "x")) == pytest.approx(4 / 6)


def test_sigmoid_of_large_logits_does_not_overflow():
    assert sigmoid(np.float32([-1e4, 0, 1e4])).tolist() == [0, 0.5, 1]


def test_labels_are_read_from_cells_and_lists(tmp_path, tiny_ernie):
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\tb|a\nbad\t\nfilm\ta\n")
    (tmp_path / "dev.jsonl").write_text('{"text": "good", "label": ["a", "b"]}\n{"text": "bad", "label": []}\n')
    data = config.Data(task="multilabel", path=str(tmp_path), train="train.tsv", dev="dev.jsonl")
    found = load_task_data(data, load_tokenizer(tiny_ernie), 0)
    assert found.labels == ["a", "b"]
    assert found.train.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert found.dev.labels.tolist() == [[1, 1], [0, 0]]
    (tmp_path / "other.tsv").write_text("text\tlabel\ngood\tb; a\n")
    task = MultiLabel(";")
    split = load_eval_split(tmp_path / "other.tsv", load_tokenizer(tiny_ernie), ["a", "b"], 16, task=task)
    assert split.labels.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("dev.tsv", "bad\tc|a", r"dev\.tsv:2: label 'c' found where some of a, b are possible"),
        ("dev.tsv", "bad\ta||b", r"dev\.tsv:2: labels 'a\|\|b': one of them is empty or there twice"),
        ("dev.tsv", "bad\ta|a", r"dev\.tsv:2: labels 'a\|a': one of them is empty or there twice"),
        (
            "dev.jsonl",
            '{"text": "bad", "label": ["a|b"]}',
            r"dev\.jsonl:1: label: 'a\|b' found where a label without '\|'",
        ),
        ("dev.jsonl", '{"text": "bad", "label": [1]}', r"dev\.jsonl:1: label: 1 found where a label without"),
        ("dev.jsonl", '{"text": "bad", "label": null}', r"dev\.jsonl:1: no label in column 'label'"),
    ],
)
def test_wrong_labels_are_named_by_file_and_row(tmp_path, tiny_ernie, file, row, message):
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\tb|a\nbad\t\n")
    (tmp_path / file).write_text(("text\tlabel\n" if file == "dev.tsv" else "") + row + "\n")
    data = config.Data(task="multilabel", path=str(tmp_path), dev=file)
    with pytest.raises(UserError, match=message):
        load_task_data(data, load_tokenizer(tiny_ernie), 0)


def test_a_train_set_without_labels_and_a_wrong_separator(tmp_path, tiny_ernie):
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\t\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood\t\n")
    data = config.Data(task="multilabel", path=str(tmp_path))
    with pytest.raises(UserError, match="labels of train: none found where different labels are needed"):
        load_task_data(data, load_tokenizer(tiny_ernie), 0)
    with pytest.raises(UserError, match="Data.separator: '' is no sign between labels"):
        MultiLabel("")
