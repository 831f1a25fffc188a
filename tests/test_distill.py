"""Distillation against NumPy, switched off, and its mistakes."""

import dataclasses
import json
import shutil

import numpy as np
import paddle
import pytest
from test_trainer import QAT, same, settings, weights_of
from tiny_ernie import make_tiny_ernie

from ernie_kqat import UserError, config
from ernie_kqat.data.batching import collate
from ernie_kqat.data.dataset import load_task_data
from ernie_kqat.methods.distill import Distillation, cached_logits, masked_mse, soft_cross_entropy
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.tokenizer import load_tokenizer
from ernie_kqat.trainer import train

RNG = np.random.default_rng(0)
IDS = RNG.integers(5, 90, (6, 9))
IDS[2:, 6:] = 0  # padding
BATCH = {"input_ids": IDS, "token_type_ids": np.zeros_like(IDS), "labels": RNG.integers(0, 2, 6)}


def log_softmax(values):
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_and_its_gradient(temperature):
    student, teacher = (RNG.standard_normal((5, 3)).astype(np.float32) * 3 for _ in range(2))
    x = paddle.to_tensor(student, stop_gradient=False)
    loss = soft_cross_entropy(x, paddle.to_tensor(teacher), temperature)
    loss.backward()
    wanted, got = (np.exp(log_softmax(v.astype(np.float64) / temperature)) for v in (teacher, student))
    expected = -(wanted * np.log(got)).sum(axis=1).mean() * temperature**2
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), (got - wanted) * temperature / 5, atol=1e-5)


def test_masked_mse_leaves_padding_out():
    a, b = (RNG.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2))
    mask = np.float32([[1, 1, 0], [1, 0, 0]])[:, :, None]
    got = float(masked_mse(*map(paddle.to_tensor, (a, b, mask))))
    kept = np.broadcast_to(mask, a.shape) == 1
    np.testing.assert_allclose(got, np.square(a - b)[kept].mean(), rtol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_ernie(folder / f"{seed}", seed=seed, layers=layers) for seed, layers in ((0, 2), (1, 4))]


def attached(student, teacher, **weights):
    model = load_classifier(str(student), 2, dropout=0.0)
    method = Distillation(teacher=str(teacher), **weights)
    method.attach(model, dict)
    model.train()
    return model, method


def terms_of(model, method):
    logits = model(paddle.to_tensor(BATCH["input_ids"]), paddle.to_tensor(BATCH["token_type_ids"]))
    return method.loss_terms(BATCH, logits)


def states_of(folder):
    """Hidden states of each layer, and attention scores before mask and softmax, by Paddle's own layers."""
    model = load_classifier(str(folder), 2)
    model.eval()
    ids = paddle.to_tensor(BATCH["input_ids"])
    hidden = model.ernie(ids, output_hidden_states=True)[2]
    scores = []
    for layer, before in zip(model.ernie.encoder.layers, hidden):
        q, k = (
            projection(before).numpy().reshape(6, 9, 4, 8).transpose(0, 2, 1, 3).astype(np.float64)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        scores.append(q @ k.transpose(0, 1, 3, 2) / np.sqrt(8))
    return [state.numpy().astype(np.float64) for state in hidden[1:]], scores


def test_hidden_and_attention_terms_of_a_deeper_teacher(folders):
    student, teacher = folders
    model, method = attached(student, teacher, logits=0.0, hidden=0.5, attention=2.0)
    terms = terms_of(model, method)
    (own_hidden, own_scores), (hidden, scores) = states_of(student), states_of(teacher)
    real = IDS != 0
    pairs = np.broadcast_to((real[:, :, None] & real[:, None, :])[:, None], own_scores[0].shape)
    for_hidden = sum(np.square(own_hidden[i] - hidden[2 * i + 1])[real].mean() for i in range(2))
    for_scores = sum(np.square(own_scores[i] - scores[2 * i + 1])[pairs].mean() for i in range(2))
    np.testing.assert_allclose(float(terms["hidden"]), 0.5 * for_hidden, rtol=1e-4)
    np.testing.assert_allclose(float(terms["attention"]), 2.0 * for_scores, rtol=1e-4)
    assert set(terms) == {"hidden", "attention"}


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_and_the_teacher_none_ever(folders):
    model, method = attached(folders[0], folders[0], hidden=1.0, attention=1.0)
    terms = terms_of(model, method)
    assert float(terms["hidden"]) < 1e-10
    assert float(terms["attention"]) < 1e-10
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in method.model.parameters())
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert np.abs(parameter.grad.numpy()).max() < 1e-5  # softmax(t) is where cross-entropy to it is least


def test_weights_of_zero_are_bit_identical_to_its_absence(tmp_path, tiny_ernie, tiny_task):
    brief = {"max_steps": 4}
    off = {"teacher": str(tiny_ernie), "logits": 0.0}
    train(settings(tmp_path, tiny_ernie, tiny_task, "absent", Slim=QAT, Train=brief))
    train(settings(tmp_path, tiny_ernie, tiny_task, "off", Slim={**QAT, "distill": off}, Train=brief))
    same(weights_of(tmp_path / "absent"), weights_of(tmp_path / "off"))


def test_without_the_task_loss_a_student_comes_to_its_teacher(tmp_path, tiny_ernie, tiny_task):
    teacher = make_tiny_ernie(tmp_path / "teacher", seed=5)
    slim = {"distill": {"teacher": str(teacher), "task": 0.0, "hidden": 0.1, "attention": 0.1}}
    train(settings(tmp_path, tiny_ernie, tiny_task, Slim=slim, Train={"epochs": 4}))
    for name in ("logits", "hidden", "attention"):
        terms = logged(tmp_path / "run", name)
        assert terms[-1] < terms[0]
    assert not any(logged(tmp_path / "run", "loss"))


def cached(tmp_path, tiny_ernie, tiny_task, name, **options):
    """Trained with the teacher's logits only: what the weights became."""
    slim = {**QAT, "distill": {"teacher": str(tiny_ernie), "task": 0.5, **options}}
    train(settings(tmp_path, tiny_ernie, tiny_task, name, Slim=slim, Train={"max_steps": 6}))
    return weights_of(tmp_path / name)


def logged(run, name):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tiny_ernie(tmp_path_factory.mktemp("teacher") / "ernie", seed=5)


def test_cached_logits_train_as_the_teacher_itself_does(tmp_path, tiny_ernie, teacher, tiny_task, monkeypatch):
    slim = {"teacher": str(teacher), "cache": str(tmp_path / "cache")}
    first = cached(tmp_path, tiny_ernie, tiny_task, "first", **slim)
    (file,) = (tmp_path / "cache").iterdir()
    live = cached(tmp_path, tiny_ernie, tiny_task, "live", teacher=str(teacher))
    for (
        name
    ) in first:  # but for the rounding of other batches; of k_proj.bias it is the whole gradient, for Adam to magnify
        if name.startswith("model/") and "k_proj.bias" not in name:
            np.testing.assert_allclose(first[name], live[name], atol=2e-3 * np.abs(live[name]).max(), err_msg=name)
    terms = [logged(tmp_path / name, "logits") for name in ("first", "live")]
    np.testing.assert_allclose(*terms, rtol=1e-4)
    monkeypatch.setattr("ernie_kqat.methods.distill.logits_of", None)  # the second run computes none
    same(cached(tmp_path, tiny_ernie, tiny_task, "second", **slim), first)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]


def test_the_logits_of_a_row_do_not_depend_on_the_padding_of_its_batch(tmp_path, teacher, tiny_task):
    data = load_task_data(config.Data(path=str(tiny_task)), load_tokenizer(teacher), 0)
    model = load_classifier(str(teacher), 2)
    model.eval()
    kept = cached_logits(tmp_path, teacher, model, data.train)
    rng = np.random.default_rng(0)
    for _ in range(4):
        rows = rng.permutation(len(data.train))[:16]
        batch = collate(data.train, rows, 0)
        ids = np.pad(batch["input_ids"], ((0, 0), (0, 20)))  # far more than its longest row needs
        logits = model(paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))).numpy()
        np.testing.assert_allclose(logits, kept[rows], atol=2e-6 * np.abs(kept).max())


@pytest.mark.parametrize("damage", ["cut", "shape", "nan", "readonly"])
def test_a_damaged_or_unwritable_cache_costs_only_time(tmp_path, teacher, tiny_task, damage, caplog):
    data = load_task_data(config.Data(path=str(tiny_task)), load_tokenizer(teacher), 0)
    model = load_classifier(str(teacher), 2)
    folder = tmp_path / "cache"
    expected = cached_logits(folder, teacher, model, data.train)
    (file,) = folder.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "readonly":
        shutil.rmtree(folder)
        folder.write_text("a file where the folder should be")
    else:
        np.save(file, expected[:-1] if damage == "shape" else expected * np.float32("nan"))
    np.testing.assert_array_equal(cached_logits(folder, teacher, model, data.train), expected)
    assert {"cut": "unreadable", "readonly": "could not be kept"}.get(damage, "damaged") in caplog.text
    if damage != "readonly":
        np.testing.assert_array_equal(np.load(file), expected)


def test_the_cache_is_of_one_teacher_and_one_set_of_rows(tmp_path, teacher, tiny_ernie, tiny_task):
    data = load_task_data(config.Data(path=str(tiny_task)), load_tokenizer(teacher), 0)
    for folder, rows in ((teacher, data.train), (tiny_ernie, data.train), (teacher, data.dev), (teacher, data.train)):
        cached_logits(tmp_path, folder, load_classifier(str(folder), 2), rows)
    other = dataclasses.replace(data.train, input_ids=[ids.copy() for ids in data.train.input_ids])
    other.input_ids[3][1] += 1
    cached_logits(tmp_path, teacher, load_classifier(str(teacher), 2), other)
    assert len(list(tmp_path.iterdir())) == 4


def test_hidden_states_and_attention_scores_are_not_cached(tmp_path, tiny_ernie, teacher, tiny_task):
    slim = {"teacher": str(teacher), "cache": str(tmp_path / "cache"), "hidden": 1.0}
    same(
        cached(tmp_path, tiny_ernie, tiny_task, "cache", **slim),
        cached(tmp_path, tiny_ernie, tiny_task, "none", **{**slim, "cache": None}),
    )
    assert "Slim.distill.cache is not used: hidden and attention need" in (tmp_path / "cache/plan.txt").read_text()


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (None, {}, "Slim.distill.teacher: missing"),
        ({"num_labels": 3}, {}, "no classifier of 2 classes"),
        ({"head": False}, {}, "no classifier of 2 classes"),
        ({"layers": 3}, {"hidden": 1.0}, "3 layers, no multiple of the student's 2"),
        ({"hidden": 64}, {"hidden": 1.0}, "hidden_size 64, the student's is 32; say hidden: 0"),
        ({"heads": 2}, {"attention": 1.0}, "num_attention_heads 2, the student's is 4; say attention: 0"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_ernie, teacher, options, message):
    folder = None if teacher is None else str(make_tiny_ernie(tmp_path / "teacher", **teacher))
    with pytest.raises(UserError, match=message):
        Distillation(teacher=folder, **options).attach(load_classifier(str(tiny_ernie), 2), dict)


def test_labels_in_another_order_are_refused(tmp_path, tiny_ernie, tiny_task):
    teacher = make_tiny_ernie(tmp_path / "teacher")
    described = json.loads((teacher / "config.json").read_text())
    described["id2label"] = {"0": "positive", "1": "negative"}
    (teacher / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="its labels are positive, negative; the task's are negative, positive"):
        train(settings(tmp_path, tiny_ernie, tiny_task, Slim={"distill": {"teacher": str(teacher)}}))
