"""Data.task: tokens. Trained, exported, verified and predicted; entities and their F1 by hand; alignment; wrong tags."""

import json
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieForTokenClassification
from tiny_ernie import make_tiny_ernie
from tiny_tasks import make, make_entities

from ernie_kqat import Predictor, UserError, config
from ernie_kqat.data.conll import TaggedReader
from ernie_kqat.data.dataset import Split, load_eval_split, load_task_data
from ernie_kqat.export.native import contents
from ernie_kqat.export.rewrites import ALL, FirstTokenLayer, rewrite_model
from ernie_kqat.infer import answer_lines
from ernie_kqat.measure import evaluate_any
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.serving import models
from ernie_kqat.tasks.tokens import Tokens, entities_of, entity_scores, words_in
from ernie_kqat.tokenizer import load_tokenizer

TASK = Tokens()
TAGS = ["O", "B-GOOD", "I-GOOD", "B-THING", "I-THING"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    encoder = make_tiny_ernie(folder / "encoder", head=False)
    return make(folder, encoder, make_entities(folder / "data", rows=160), "tokens", Train={"epochs": 6})


def test_it_learns_and_the_deployed_tags_are_the_trained_ones(made):
    found = made.manifest["verification"]
    assert made.summary["best_f1"] > 0.5
    assert found["passed"]
    assert found["agreement"] >= 0.995
    assert found["deployed_f1"] == pytest.approx(made.summary["best_f1"], abs=0.02)
    assert found["int8_ops"] == 13  # six a layer and the head: no pooler
    assert made.manifest["labels"] == TAGS
    assert made.manifest["pair"] is False


def test_run_and_artifact_have_the_same_scores(made):
    data = made.run.parent / "data"
    run, artifact = (evaluate_any(path, data, config.Data()) for path in (made.run, made.artifact))
    assert {"f1", "precision", "recall", "accuracy"} < set(run)
    assert run["f1"] == made.summary["best_f1"]
    assert artifact["f1"] == pytest.approx(run["f1"], abs=0.02)


def test_answers_are_entities_with_their_places_whatever_the_batch(made):
    predictor = Predictor(made.artifact)
    texts = ["The film script was good xyz.", "the music", "the actor is fresh", "the story movie was lovely xyz"]
    answers = predictor.predict(texts)
    assert any(answer.entities for answer in answers)
    for text, answer in zip(texts, answers):
        (row,) = predictor.encode([text])
        assert len(answer.logits) == len(row.input_ids)
        tags = [TAGS[index] for index in np.array(answer.logits)[row.first].argmax(axis=1)]
        expected = [(name, row.spans[a][0], row.spans[b - 1][1]) for name, a, b in entities_of(tags)]
        assert [(one.label, one.start, one.end) for one in answer.entities] == expected
        assert all(text[one.start : one.end] == one.text for one in answer.entities)
        assert all(0.2 < one.score <= 1 for one in answer.entities)
        (alone,) = predictor.predict([text], batch_size=1)
        np.testing.assert_allclose(alone.logits, answer.logits, rtol=0, atol=1e-4)
    (lines,) = answer_lines(predictor, [b"the film is good\n", b" \n"])
    assert lines[1]["error"].startswith("no text in it")
    assert set(lines[0]) == {"text", "entities"}
    assert all(set(one) == {"label", "start", "end", "text", "score"} for one in lines[0]["entities"])


def test_it_answers_without_the_training_side_and_is_not_served(made):
    code = f"""
import sys
import ernie_kqat.predictor
ernie_kqat.predictor.Predictor({str(made.artifact)!r}).predict(["a good film"])
training = ("methods", "quantizers", "trainer", "config", "qat", "data", "models", "export")
sys.exit(str([name for name in sys.modules if name.split(".")[0] in ("paddleslim", "paddlenlp")
              or name.startswith("ernie_kqat.") and name.split(".")[1] in training] or ""))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "")
    with pytest.raises(UserError, match="model 'a': .*its task is tokens, which is not served"):
        models.load({"a": made.artifact})


def test_paddlenlp_loads_the_best_model_and_computes_the_same(made):
    theirs = ErnieForTokenClassification.from_pretrained(str(made.run / "best_model"))
    ours = load_classifier(str(made.run / "best_model"), len(TAGS), task="tokens")
    assert not ours.new_head
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 90, (3, 9)))
    theirs.eval()
    ours.eval()
    np.testing.assert_allclose(ours(ids).numpy(), theirs(ids).numpy(), rtol=0, atol=1e-5)


def test_a_head_of_sentences_is_none_of_tokens(tmp_path):
    folder = make_tiny_ernie(tmp_path / "sentences", num_labels=5)
    assert not load_classifier(str(folder), 5).new_head
    assert load_classifier(str(folder), 5, task="tokens").new_head


def test_every_token_of_the_last_layer_is_computed(made):
    model = load_classifier(str(made.run / "best_model"), len(TAGS), task="tokens")
    rewrite_model(model, ALL)
    assert not isinstance(model.ernie.encoder.layers[-1], FirstTokenLayer)
    with pytest.raises(UserError, match="native: the operator answers from .CLS.; the model judges every token"):
        contents(model)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-A I-A O B-A", [("A", 0, 2), ("A", 3, 4)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("O I-A I-A I-B", [("A", 1, 3), ("B", 3, 4)]),
        ("B-A I-B I-B O I-B", [("A", 0, 1), ("B", 1, 3), ("B", 4, 5)]),
        ("I-A", [("A", 0, 1)]),
        ("", []),
    ],
)
def test_entities_by_hand(tags, expected):
    assert entities_of(tags.split()) == expected


def test_entity_scores_by_hand_and_by_seqeval():
    wanted = [["B-A", "I-A", "O", "B-B"], ["O", "O", "B-A"], ["B-B", "O"]]
    found = [["B-A", "I-A", "O", "B-A"], ["O", "B-A", "I-A"], ["B-B", "O"]]
    # found: 4 entities, wanted: 4, equal in type and both ends: 2
    assert entity_scores(found, wanted) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0}
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    found, wanted = ([rng.choice(TAGS, 8).tolist() for _ in range(50)] for _ in range(2))
    scores = entity_scores(found, wanted)
    assert scores["f1"] == pytest.approx(seqeval.f1_score(wanted, found))
    assert scores["precision"] == pytest.approx(seqeval.precision_score(wanted, found))
    assert scores["recall"] == pytest.approx(seqeval.recall_score(wanted, found))


def test_words_of_a_text():
    text = 'He said: "(U.S. film)" 好电影，x'
    words = [text[a:b] for a, b in words_in(text)]
    assert words == ["He", "said", ":", '"', "(", "U.S", ".", "film", ")", '"', "好", "电", "影", "，", "x"]
    assert words_in(" \t ") == []
    assert words_in("...") == [(0, 1), (1, 2), (2, 3)]


def write(folder, text, name="dev.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_tag_stands_at_its_words_first_token(tmp_path, tiny_ernie):
    tokenizer = load_tokenizer(tiny_ernie)
    path = write(tmp_path, "good\tB-GOOD\nxyz\tO\n\u200b\tO\nfilm\tB-THING\n\nthe O\nfilm B-THING\n")
    split = load_eval_split(path, tokenizer, TAGS, 16, task=TASK)
    pieces = [len(ids) for ids in tokenizer.ids(["good", "xyz", "film"])]
    assert pieces == [1, 3, 1]
    assert split.labels[0].tolist() == [-100, 1, 0, -100, -100, 0, 3, -100]
    assert split.input_ids[0][5] == tokenizer.unk_token_id  # a word of a control character
    assert split.labels[1].tolist() == [-100, 0, 3, -100]
    assert split.texts == ["good xyz \u200b film", "the film"]
    cut = load_eval_split(path, tokenizer, TAGS, 7, task=TASK)
    assert (cut.truncated, cut.labels[0].tolist()) == (1, [-100, 1, 0, -100, -100, 0, -100])
    logits = np.zeros((sum(map(len, cut.input_ids)), 5), np.float32)
    logits[1, 1] = logits[9, 3] = 1  # good in the first row and film in the second: all that can be found
    scores = TASK.scores(logits, cut, TAGS)
    assert (scores["precision"], scores["recall"]) == (1, 2 / 3)  # the entity that was cut off is missed
    assert scores["accuracy"] == 5 / 6


def test_columns_documents_and_json_are_read(tmp_path):
    columns = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\n"
    (one,) = TaggedReader(write(tmp_path, columns, "a.conll"))
    assert (one.tokens, one.tags, one.where) == (["EU", "rejects"], ["B-ORG", "O"], f"{tmp_path / 'a.conll'}:3")
    row = {"words": ["EU", "a b"], "ner_tags": ["B-ORG", "O"]}
    (one,) = TaggedReader(write(tmp_path, json.dumps(row) + "\n", "a.jsonl"))
    assert (one.tokens, one.tags) == (row["words"], row["ner_tags"])
    (one,) = TaggedReader(write(tmp_path, "good\nfilm\n", "b.txt"), require_tags=False)
    assert (one.tokens, one.tags, one.label) == (["good", "film"], None, None)


def test_loss_and_imitation_leave_out_what_has_no_tag():
    rng = np.random.default_rng(0)
    logits, teacher = (rng.normal(size=(2, 4, 3)).astype(np.float32) for _ in range(2))
    labels = np.array([[-100, 0, 2, -100], [-100, 1, -100, -100]])
    exact = logits.astype(np.float64)
    log_chance = exact - np.log(np.exp(exact).sum(axis=2, keepdims=True))
    expected = -np.mean([log_chance[0, 1, 0], log_chance[0, 2, 2], log_chance[1, 1, 1]])
    assert float(TASK.loss(paddle.to_tensor(logits), paddle.to_tensor(labels))) == pytest.approx(expected, rel=1e-5)
    real = np.float32([[1, 1, 1, 1], [1, 1, 1, 0]])
    wanted = np.exp(teacher.astype(np.float64))
    wanted /= wanted.sum(axis=2, keepdims=True)
    expected = -(wanted * log_chance).sum(axis=2)[real > 0].mean()
    tensors = map(paddle.to_tensor, (logits, teacher))
    assert float(TASK.imitation(*tensors, 1.0, paddle.to_tensor(real))) == pytest.approx(expected, rel=1e-5)


def test_agreement_is_of_words():
    split = Split(
        [np.zeros(4), np.zeros(3)], [], None, [], None, 0, "x", [(np.array([1]), None), (np.array([1]), None)]
    )
    reference = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 0, 1, 0]]
    other = np.eye(3, dtype=np.float32)[[1, 1, 1, 1, 1, 2, 1]]
    assert TASK.agreement(other, reference, split) == 0.5


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("good\tB-X\n", "dev.txt", r"dev\.txt:1: tag 'B-X' of word 1 is not one of O, B-GOOD, I-GOOD"),
        ("good\tB-GOOD\nfilm\n", "dev.txt", r"dev\.txt:2: 1 columns found where 2 are needed: 'film'"),
        ("\tO\n", "dev.txt", r"dev\.txt:1: an empty column: '\\tO'"),
        ("good\n", "dev.txt", r"dev\.txt:1: no tag beside 'good': a word and its tag are needed"),
        ("\n\n", "dev.txt", r"dev\.txt: no sentences"),
        (
            '{"tokens": ["a", "b"], "labels": ["O"]}\n',
            "dev.jsonl",
            r"dev\.jsonl:1: 2 words with 1 tags; each word needs one",
        ),
        ('{"tokens": ["a"]}\n', "dev.jsonl", r"dev\.jsonl:1: no 'labels'; found: 'tokens'"),
        ('{"tokens": "a", "labels": ["O"]}\n', "dev.jsonl", r"dev\.jsonl:1: tokens: 'a' found where a list of words"),
        (
            '{"tokens": ["a", " "], "labels": ["O", "O"]}\n',
            "dev.jsonl",
            r"dev\.jsonl:1: tokens: .* where a list of words",
        ),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path, tiny_ernie, text, name, message):
    write(tmp_path, "good\tB-GOOD\nfilm\tB-THING\n", "train.txt")
    write(tmp_path, text, name)
    data = config.Data(task="tokens", path=str(tmp_path), dev=name)
    with pytest.raises(UserError, match=message):
        load_task_data(data, load_tokenizer(tiny_ernie), 0)


@pytest.mark.parametrize(
    ("train", "labels", "message"),
    [
        ("good\tS-GOOD\n", None, r"tags of train: S-GOOD found where O, B-… and I-… are needed"),
        ("good\tO\n", None, "tags of train: only O found where entities are needed"),
        ("good\tO\n", ["B-A", "I-A"], "Data.labels: B-A, I-A found where O and other different tags are needed"),
        ("good\tO\n", ["O", "A"], "Data.labels: A found where O, B-… and I-… are needed"),
    ],
)
def test_wrong_tags(tmp_path, tiny_ernie, train, labels, message):
    for name in ("train.txt", "dev.txt"):
        write(tmp_path, train, name)
    data = config.Data(task="tokens", path=str(tmp_path), labels=labels)
    with pytest.raises(UserError, match=message):
        load_task_data(data, load_tokenizer(tiny_ernie), 0)


def test_it_needs_files_of_its_own(tmp_path, tiny_ernie, tiny_task):
    with pytest.raises(UserError, match=r"no dev\.txt, \.conll or \.jsonl"):
        load_task_data(config.Data(task="tokens", path=str(tiny_task)), load_tokenizer(tiny_ernie), 0)
    with pytest.raises(UserError, match="Data.name: msra_ner: for Data.task tokens say -o Data.path=DIR"):
        load_task_data(config.Data(task="tokens", name="msra_ner"), load_tokenizer(tiny_ernie), 0)
