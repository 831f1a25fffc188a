"""What holds for every task: methods, quantizers and export; which model folder is of which; defaults and refusals."""

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from running import serve
from safetensors.numpy import load_file, save_file
from tiny_bert import make_tiny_bert
from tiny_ernie import make_tiny_ernie
from tiny_tasks import make, make_entities, make_multilabel, make_questions, make_regression

from ernie_kqat import Predictor, UserError, config, tasks
from ernie_kqat.analysis.workbench import open_workbench
from ernie_kqat.models.convert import convert_bert
from ernie_kqat.models.folder import labels_of, task_of
from ernie_kqat.models.loading import load_classifier, save_classifier
from ernie_kqat.narrow import narrow_folder
from ernie_kqat.serving.client import connect

SHARED = Path(__file__).resolve().parents[2] / "shared"
FAMILIES = {
    "regression": (make_regression, {"label": "score"}, ["score"]),
    "multilabel": (make_multilabel, {}, ["actor", "film", "movie"]),
    "tokens": (make_entities, {}, ["O", "B-GOOD", "I-GOOD", "B-THING", "I-THING"]),
    "qa": (make_questions, {}, ["start", "end"]),
}
TRAINED = {
    "quant": {"weight": {"bits": 4, "range": "mse"}, "activation": {"quantizer": "lsq", "offset": True}},
    "kurtosis": {"targets": {"cap": 2.5}, "apply": "decoupled"},
    "distill": {"logits": 1.0, "hidden": 1.0, "attention": 1.0},
    "squat": {"rho": 0.05},
}
CALIBRATED = {
    "quant": {"weight": {"bits": 4, "range": "mse"}},
    "smoothquant": {},
    "brecq": {"iterations": 3, "step_iterations": 3},
    "bias_correction": {},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A random model with a head, and data, of each family."""
    root = tmp_path_factory.mktemp("families")
    encoder = make_tiny_ernie(root / "encoder", head=False)
    for name, (make_data, _, labels) in FAMILIES.items():
        make_data(root / name / "data", rows=48)
        (root / name / "model").mkdir()
        save_classifier(load_classifier(str(encoder), len(labels), task=name), encoder, root / name / "model", labels)
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_says_its_task_and_labels(trained, name):
    model = trained / name / "model"
    assert (task_of(model), labels_of(model)) == (name, FAMILIES[name][2])
    assert not load_classifier(str(model), len(FAMILIES[name][2]), task=name).new_head
    for other in {*FAMILIES, "classification"} - {name}:
        assert load_classifier(str(model), len(FAMILIES[name][2]), task=other).new_head


@pytest.mark.parametrize("name", ["regression", "tokens", "qa"])
def test_methods_of_training_work_and_what_they_made_is_exported(trained, tmp_path, name):
    model, data = trained / name / "model", trained / name / "data"
    slim = {**TRAINED, "distill": {**TRAINED["distill"], "teacher": str(model)}}
    brief = {"max_steps": 4, "learning_rate": 1e-4, "eval_steps": 4}
    made = make(tmp_path, model, data, name, slim, Data=FAMILIES[name][1], Train=brief)
    assert made.manifest["verification"]["passed"]
    assert made.manifest["verification"]["fp32_model"] == str(model)
    rows = [json.loads(line) for line in (made.run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert all(row[term] > 0 for row in logged for term in ("loss", "logits", "hidden", "attention"))
    assert f"fp32_start_{tasks.find(name).metrics[0]}" in made.summary


@pytest.mark.parametrize("name", ["regression", "multilabel", "tokens"])
def test_methods_of_calibration_work_and_what_they_made_is_exported(trained, tmp_path, name):
    model, data = trained / name / "model", trained / name / "data"
    made = make(tmp_path, model, data, name, CALIBRATED, Data=FAMILIES[name][1], Train={"epochs": 0})
    assert made.manifest["verification"]["passed"]
    if name == "regression":
        check_service(made.artifact)


def check_service(artifact):
    texts, pairs = ["a film", "a plot"], ["the plot is bad", "the actor is fresh"]
    expected = Predictor(artifact).predict(texts, pairs)
    with serve(artifact) as running, connect(f"http://{running.http}") as client:
        answers = client.predict(texts, pairs)
    assert [answer.label for answer in answers] == ["score", "score"]
    np.testing.assert_allclose([one.score for one in answers], [one.score for one in expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("architectures", "problem", "outputs", "kind"),
    [
        (None, None, 2, "classification"),
        (["ErnieForSequenceClassification"], None, 3, "classification"),
        (["ErnieForSequenceClassification"], "single_label_classification", 3, "classification"),
        (["ErnieForSequenceClassification"], None, 1, "regression"),
        (["ErnieForSequenceClassification"], "regression", 1, "regression"),
        (None, "multi_label_classification", 3, "multilabel"),
        (["ErnieForTokenClassification"], None, 9, "tokens"),
        (["ErnieForTokenClassification"], None, 1, "tokens"),
        (["ErnieForQuestionAnswering"], None, 2, "qa"),
        (["ErnieModel"], None, 2, "classification"),
    ],
)
def test_which_config_is_of_which_task(architectures, problem, outputs, kind):
    assert tasks.kind_of_settings(architectures, problem, outputs) == kind


def test_the_config_knows_every_task_and_metric():
    hints = typing.get_type_hints(config.Data)
    assert sorted(typing.get_args(hints["task"])) == sorted(tasks.names())
    metric = typing.get_args(typing.get_args(typing.get_type_hints(config.Train)["metric"])[0])
    assert set(metric) == {name for kind in tasks.names() for name in tasks.find(kind).metrics}
    for kind in tasks.names():
        task = tasks.of_data(config.Data(task=kind))
        assert tasks.of_manifest(json.loads(json.dumps({"task": task.manifest()}))) == task
        assert {field.name for field in dataclasses.fields(task)} <= {
            field.name for field in dataclasses.fields(config.Data)
        }


def test_an_artifact_without_a_task_is_of_classification_and_an_unknown_one_is_refused():
    assert tasks.kind(tasks.of_manifest({})) == "classification"
    with pytest.raises(
        UserError, match="the artifact's task is 'poetry'; this version knows classification, multilabel"
    ):
        tasks.of_manifest({"task": {"kind": "poetry"}})
    with pytest.raises(UserError, match="the artifact's task regression has scale, which this version does not know"):
        tasks.of_manifest({"task": {"kind": "regression", "scale": 2}})


def test_what_is_for_classification_only_says_so(trained, tmp_path):
    model, data = str(trained / "tokens/model"), trained / "tokens/data"
    with pytest.raises(UserError, match=r"tools/narrow.py is for classification; the model's task is tokens"):
        narrow_folder(model, str(data), 0.5, 0.5, tmp_path / "narrow")
    with pytest.raises(
        UserError, match=r"what quantizing a layer costs is for classification; the model's task is tokens"
    ):
        open_workbench(model, data, config.Quant())


@pytest.mark.parametrize(
    ("architecture", "head", "task", "outputs"),
    [("BertForTokenClassification", "classifier", "tokens", 3), ("BertForQuestionAnswering", "qa_outputs", "qa", 2)],
)
def test_berts_heads_are_converted(tmp_path, architecture, head, task, outputs):
    bert = make_tiny_bert(tmp_path / "bert", prefix="bert.")
    weights = {name: one for name, one in load_file(bert / "model.safetensors").items() if "pooler" not in name}
    own = np.random.default_rng(0).normal(size=(outputs, 32)).astype(np.float32)
    save_file({**weights, f"{head}.weight": own, f"{head}.bias": own[:, 0].copy()}, bert / "model.safetensors")
    settings = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**settings, "architectures": [architecture]}))
    (tmp_path / "ernie").mkdir()
    assert convert_bert(bert, tmp_path / "ernie") == []  # no word on the pooler: nothing reads it
    assert task_of(tmp_path / "ernie") == task
    model = load_classifier(str(tmp_path / "ernie"), outputs, task=task)
    assert not model.new_head
    np.testing.assert_array_equal(model.classifier.weight.numpy(), own.T)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "length"), [("MRPC", "f1", 128), ("RTE", "accuracy", 128), ("ChnSentiCorp", "macro_f1", 64)]
)
def test_real_pairs_and_reviews_are_trained_exported_verified_and_predicted(tmp_path, name, metric, length):
    model, data = SHARED / "models/minilm-l6-sst2-fp32", SHARED / "data" / name
    if not (model.is_dir() and data.is_dir()):
        pytest.skip("no real data here")
    brief = {"epochs": 1, "max_steps": 60, "batch_size": 32, "learning_rate": 1e-4, "eval_steps": 60, "metric": metric}
    keys = {"max_length": length, "dev_rows": 400}
    made = make(tmp_path, model, data, "classification", Data=keys, Train=brief, Model={"dropout": 0.0})
    found = made.manifest["verification"]
    assert found["agreement"] >= 0.995
    assert found["scores"]["deployed"][metric] == pytest.approx(made.summary["best_scores"][metric], abs=0.02)
    predictor = Predictor(made.artifact)
    texts = [line.split("\t") for line in (data / "dev.tsv").read_text(encoding="utf-8-sig").splitlines()[1:9]]
    columns = {"MRPC": (3, 4), "RTE": (1, 2), "ChnSentiCorp": (0,)}[name]
    answers = predictor.predict(*[[row[column] for row in texts] for column in columns])
    assert all(answer.label in predictor.labels for answer in answers)
