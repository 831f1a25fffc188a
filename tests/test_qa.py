"""Data.task: qa. Trained, exported, verified and predicted; windows, spans and SQuAD's scores by hand; wrong files."""

import itertools
import json

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieForQuestionAnswering
from tiny_ernie import make_tiny_ernie
from tiny_tasks import make, make_questions

from ernie_kqat import Predictor, UserError, config
from ernie_kqat.data.dataset import load_eval_split, load_task_data
from ernie_kqat.export import exporter
from ernie_kqat.infer import answer_lines
from ernie_kqat.measure import evaluate_any
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.tasks.qa import MAX_ANSWER, QuestionAnswering, best_span, normal, overlap
from ernie_kqat.tokenizer import load_tokenizer

TASK = QuestionAnswering()
RNG = np.random.default_rng(0)
KEYS = {"max_length": 16, "doc_stride": 4, "unanswerable": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    encoder = make_tiny_ernie(folder / "encoder", head=False)
    data = make_questions(folder / "data", rows=128, unanswerable=0.2)
    return make(folder, encoder, data, "qa", Data=KEYS)


def test_it_learns_and_the_deployed_answers_are_the_trained_ones(made):
    found = made.manifest["verification"]
    assert made.summary["best_f1"] > 0.8
    assert made.summary["dev_rows"] > 32  # some contexts are read in several windows
    assert found["passed"]
    assert found["agreement"] >= 0.995
    assert found["deployed_f1"] == pytest.approx(made.summary["best_f1"], abs=0.02)
    assert found["int8_ops"] == 13
    assert made.manifest["task"] == {"kind": "qa", "doc_stride": 4, "unanswerable": True}
    assert (made.manifest["labels"], made.manifest["pair"]) == (["start", "end"], True)


def test_run_and_artifact_have_the_same_scores(made):
    data = made.run.parent / "data"
    run, artifact = (evaluate_any(path, data, config.Data(**KEYS)) for path in (made.run, made.artifact))
    assert run["f1"] == made.summary["best_f1"]
    assert artifact["exact_match"] == pytest.approx(run["exact_match"], abs=0.04)


def test_an_answer_is_a_part_of_a_context_of_any_length(made):
    predictor = Predictor(made.artifact)
    filler = " ".join(["it was"] * 20)
    contexts = [f"{filler} The very good {filler}", "The so lovely", f"{filler}"]
    answers = predictor.predict(["what is the film?"] * 3, contexts)
    assert len(predictor.encode(["what is the film?"], contexts[:1])[0].windows) > 5
    for context, answer in zip(contexts, answers):
        assert context[answer.start : answer.end] == answer.answer
        assert 0 < answer.score <= 1
    assert "good" in answers[0].answer
    line = b"what is the film?\tThe so lovely\n"
    ((found,),) = answer_lines(predictor, [line])
    assert found == {"text": "what is the film?", "pair": "The so lovely", **answers[1].fields()}
    with pytest.raises(UserError, match=r"texts\[0\] or pairs\[0\]: no text in it"):
        predictor.predict(["what?"], [" "])


def test_paddlenlp_loads_the_best_model_and_computes_the_same(made):
    theirs = ErnieForQuestionAnswering.from_pretrained(str(made.run / "best_model"))
    ours = load_classifier(str(made.run / "best_model"), 2, task="qa")
    assert not ours.new_head
    assert load_classifier(str(made.run / "best_model"), 2).new_head  # two classes of sentences are something else
    ids = paddle.to_tensor(RNG.integers(0, 90, (3, 9)))
    for model in (theirs, ours):
        model.eval()
    np.testing.assert_allclose(ours(ids).numpy(), np.stack([part.numpy() for part in theirs(ids)], -1), atol=1e-5)


def test_native_and_tensorrt_are_refused(made, tmp_path):
    for key, value in (("engine", "native"), ("target", "tensorrt")):
        with pytest.raises(
            UserError, match=rf"Export\.{key}: {value}: it is for answers read from .CLS.; .* task is qa"
        ):
            exporter.export_run(str(made.run), str(tmp_path / "out"), config.Export(**{key: value}))


def test_windows_overlap_and_cover_every_token(tiny_ernie):
    tokenizer = load_tokenizer(tiny_ernie)
    context = " ".join("abcdefghijklmnopqrstuvw")
    (asked,) = QuestionAnswering(doc_stride=4).encode(tokenizer, ["is it good"], [context], 14)
    assert asked.question_tokens == 3
    seen = set()
    for part, begin in zip(asked.parts, itertools.count(0, 4)):
        assert (part.begin, part.offset) == (begin, 5)
        assert len(part.input_ids) == len(part.token_type_ids) <= 14
        assert part.input_ids[5:-1] == asked.located.ids[begin : begin + part.count]
        assert part.token_type_ids == [0] * 5 + [1] * (part.count + 1)
        seen |= set(range(begin, begin + part.count))
    assert seen == set(range(23))
    assert asked.parts[-2].begin + asked.parts[-2].count < 23  # the last one was needed
    (cut,) = TASK.encode(tokenizer, ["is " * 40], [context], 14)
    assert (cut.cut, cut.question_tokens) == (True, 5)


def question(text, answers, **more):
    return {"id": "q", "question": text, "answers": [{"text": a, "answer_start": b} for a, b in answers], **more}


def write(folder, context, *questions, name="dev.json"):
    tree = {"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]}
    (folder / name).write_text(json.dumps(tree), encoding="utf-8")
    return folder / name


def test_targets_are_the_answers_tokens_where_a_window_holds_them(tmp_path, tiny_ernie):
    tokenizer = load_tokenizer(tiny_ernie)
    context = "the film is xyz good but it was very dull"
    path = write(tmp_path, context, question("what is it?", [("xyz good", 12), ("xyz", 12)]))
    split = load_eval_split(path, tokenizer, ["start", "end"], 14, task=QuestionAnswering(doc_stride=3))
    # [CLS] what is it ? [SEP], where `what` and the context's `xyz` are several tokens
    offset = split.sources[0][0].parts[0].offset
    first = tokenizer.located(context).starts.index(12)
    for labels, part, ids in zip(split.labels, split.sources[0][0].parts, split.input_ids):
        if part.begin <= first and first + 4 <= part.begin + part.count:
            assert ids[labels[0] : labels[1] + 1].tolist() == tokenizer.ids(["xyz good"])[0]
            assert labels[0] == first - part.begin + offset
        else:
            assert labels.tolist() == [0, 0]
    assert (split.labels > 0).any()
    assert (split.labels.sum(axis=1) == 0).any()


def test_best_span_is_what_trying_all_finds():
    for tokens in (1, 2, 7, 40):
        logits = RNG.normal(size=(tokens, 2)).astype(np.float32)
        spans = [(a, b) for a in range(tokens) for b in range(a, min(tokens, a + MAX_ANSWER))]
        best = max(spans, key=lambda span: float(logits[span[0], 0]) + float(logits[span[1], 1]))
        first, last, score = best_span(logits)
        assert (first, last) == best
        assert score == pytest.approx(float(logits[first, 0]) + float(logits[last, 1]))
    far = np.zeros((40, 2), np.float32)
    far[0, 0] = far[39, 1] = 9  # farther apart than an answer may be
    assert best_span(far)[1] - best_span(far)[0] < MAX_ANSWER


def scored(tmp_path, tokenizer, task, place, null):
    """Scores of logits that say: the answer is the tokens at these places of the one window, and [CLS] has `null`."""
    split = load_eval_split(tmp_path / "dev.json", tokenizer, ["start", "end"], 40, task=task)
    offset = split.sources[0][0].parts[0].offset
    logits = np.zeros((len(split.input_ids[0]), 2), np.float32)
    logits[offset + place[0], 0] = logits[offset + place[1], 1] = 3
    logits[0] = null
    return task.scores(logits, split, ["start", "end"])


def test_scores_of_an_answer_and_of_none(tmp_path, tiny_ernie):
    tokenizer = load_tokenizer(tiny_ernie)
    write(tmp_path, "the film is very good", question("is it", [("very good", 12), ("good", 17)]))
    may = QuestionAnswering(unanswerable=True)
    assert scored(tmp_path, tokenizer, TASK, (3, 4), 9) == {"f1": 1, "exact_match": 1}  # [CLS] is no answer here
    assert scored(tmp_path, tokenizer, TASK, (2, 4), 0) == {"f1": pytest.approx(4 / 5), "exact_match": 0}
    assert scored(tmp_path, tokenizer, may, (3, 4), 2.9) == {"f1": 1, "exact_match": 1}
    assert scored(tmp_path, tokenizer, may, (3, 4), 3.1) == {"f1": 0, "exact_match": 0}
    write(tmp_path, "the film is very good", question("is it", [], is_impossible=True))
    assert scored(tmp_path, tokenizer, may, (3, 4), 3.1) == {"f1": 1, "exact_match": 1}


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ("The Film!", "film", 1.0),
        ("very good film", "good", 0.5),
        ("", "", 1.0),
        ("a", "", 1.0),  # an article is nothing
        ("film", "", 0.0),
        ("好电影", "电影", 0.8),
        ("good good", "good", 2 / 3),
    ],
)
def test_overlap_is_squads(found, wanted, expected):
    assert overlap(found, wanted) == pytest.approx(expected)


def test_normal_is_squads():
    assert normal(" The  U.S. \t anthem, an end") == "us anthem end"


def test_loss_is_the_mean_of_both_cross_entropies_and_padding_is_no_choice():
    logits, labels = RNG.normal(size=(3, 5, 2)).astype(np.float32), np.array([[1, 3], [0, 0], [2, 2]])
    exact = logits.astype(np.float64)
    log_chance = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    rows = np.arange(3)
    expected = -(log_chance[rows, labels[:, 0], 0].mean() + log_chance[rows, labels[:, 1], 1].mean()) / 2
    assert float(TASK.loss(paddle.to_tensor(logits), paddle.to_tensor(labels))) == pytest.approx(expected, rel=1e-5)
    real = np.float32([[1] * 5, [1, 1, 1, 0, 0], [1] * 5])
    choices = TASK.choices(paddle.to_tensor(logits), paddle.to_tensor(real)).numpy()
    np.testing.assert_allclose(choices[0], logits[0, :, 0])
    np.testing.assert_allclose(choices[5], logits[2, :, 1])
    assert (choices[2:4, 3:] < -9000).all()


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (
            [question("what?", [("film", 5)])],
            r"dev\.json: question 1 \(q\): answer 'film' is not at character 5 .* 'ilm '",
        ),
        ([question("what?", [("gone", 4)])], r"question 1 \(q\): answer 'gone' is not at character 4 of the context"),
        (
            [question("what?", [("film", 4)]), question("is it?", [])],
            r"question 2 \(q\): no answer; say Data.unanswerable",
        ),
        ([question("what?", [("film", -4)])], r"answer_start: -4 is not a place in the context"),
        ([question(" ", [("film", 4)])], r"dev\.json: question 1: no text 'question'"),
        ([{"question": "what?"}], r"dev\.json: question 1: no list 'answers', as SQuAD's format has it"),
        ([], r"dev\.json: no questions"),
    ],
)
def test_wrong_questions_are_named_by_file_and_number(tmp_path, tiny_ernie, questions, message):
    write(tmp_path, "the film is good", question("what?", [("film", 4)]), name="train.json")
    write(tmp_path, "the film is good", *questions)
    with pytest.raises(UserError, match=message):
        load_task_data(config.Data(task="qa", path=str(tmp_path)), load_tokenizer(tiny_ernie), 0)


@pytest.mark.parametrize(
    ("text", "message"), [("[", "not valid JSON"), ("[]", "no list 'data', as SQuAD's format has it")]
)
def test_files_that_are_not_squads(tmp_path, tiny_ernie, text, message):
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(UserError, match=rf"dev\.json: {message}"):
        load_eval_split(tmp_path, load_tokenizer(tiny_ernie), ["start", "end"], 16, task=TASK)
