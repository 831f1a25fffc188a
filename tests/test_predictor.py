"""The predictor: right answers in the right order, from many threads, and no id that would crash the engine."""

import json
import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from artifacts import MAX_LENGTH, make_artifact, random_rows

from ernie_kqat import Predictor, UserError, artifact, files, predictor, shapes
from ernie_kqat.models.loading import load_classifier


@pytest.fixture(scope="module")
def model(tiny_int8):
    return Predictor(tiny_int8)


@pytest.fixture
def copy(tiny_int8, tmp_path):
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(tiny_int8, tmp_path / "copy"))


def change_manifest(folder, **changes):
    files.write_json(folder / artifact.MANIFEST, {**json.loads((folder / artifact.MANIFEST).read_text()), **changes})


def one_by_one(model, rows):
    return np.concatenate([model.logits([row]) for row in rows])


def test_fp32_answers_are_the_models(tiny_fp32, tiny_ernie):
    rows = random_rows(20, 150)
    reference = load_classifier(str(tiny_ernie), 2)
    reference.eval()
    with paddle.no_grad():
        expected = [reference(paddle.to_tensor([ids]), paddle.to_tensor([types])).numpy()[0] for ids, types in rows]
    np.testing.assert_allclose(Predictor(tiny_fp32).logits(rows, batch_size=8), expected, atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32, 100])
def test_order_batches_and_padding_change_no_answer(model, batch_size):
    rows = random_rows(75, 150)
    expected = one_by_one(model, rows)
    assert len(np.unique(expected, axis=0)) > 70  # a shuffled answer would be seen
    found = model.logits(rows, batch_size)
    assert found.shape == (75, 2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shapes_are_few(model, monkeypatch):
    seen = set()
    run = predictor._Engine.run
    monkeypatch.setattr(predictor._Engine, "run", lambda self, batch: seen.add(batch.shape) or run(self, batch))
    for count in range(1, 40):
        model.logits(random_rows(count, 150, seed=count))
    lengths = -(-MAX_LENGTH // shapes.LENGTH_STEP)
    assert len(seen) <= 6 * lengths
    assert {shape[1] for shape in seen} == {1, 2, 4, 8, 16, 32}
    assert all(shape[2] % shapes.LENGTH_STEP == 0 for shape in seen)


def test_a_padded_length_never_exceeds_what_the_model_takes(tmp_path, tiny_ernie):
    model = Predictor(make_artifact(tmp_path / "odd", tiny_ernie, "fp32", max_length=127))
    assert np.isfinite(model.logits([(list(range(5, 132)), [0] * 127)])).all()
    assert model._batch([np.zeros((2, 127), np.int64)]).shape == (2, 1, 127)


def test_predict(model):
    texts = ["the film was great .", "a very dull plot"]
    found = model.predict(texts)
    logits = model.logits([(row.input_ids, row.token_type_ids) for row in model.encode(texts)])
    for prediction, row in zip(found, logits):
        assert prediction.logits == row.tolist()
        assert prediction.label == model.labels[row.argmax()]
        assert prediction.score == pytest.approx(1 / (1 + np.exp(-abs(np.diff(row.astype(np.float64))[0]))))
    assert model.predict([]) == []
    assert model.logits([]).shape == (0, 2)


def test_long_texts_are_cut(model):
    assert model.predict(["good " * 500]) == model.predict(["good " * (MAX_LENGTH - 2)])


def test_eight_threads_answer_as_one(tiny_int8):
    model = Predictor(tiny_int8)
    work = [random_rows(12, 150, seed=seed) for seed in range(40)]
    expected = [model.logits(rows) for rows in work]
    barrier = threading.Barrier(8)

    def answer(rows):
        return model.logits(rows)

    def together(part):
        barrier.wait()
        return [answer(rows) for rows in work[part:] + work[:part]]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(together, range(8)))
    for part, answers in enumerate(found):
        for rows, wanted in zip(answers, expected[part:] + expected[:part]):
            assert np.array_equal(rows, wanted)
    assert 1 <= len(model._idle) <= 8


def test_threads_that_come_and_go_share_one_engine(tiny_int8):
    model = Predictor(tiny_int8)
    for _ in range(5):
        thread = threading.Thread(target=model.predict, args=(["a good film"],))
        thread.start()
        thread.join()
    assert len(model._idle) == 1


def test_a_clone_is_its_own(model):
    rows = random_rows(9, 150)
    twin = model.clone()
    assert np.array_equal(twin.logits(rows), model.logits(rows))
    assert not {id(one) for one in twin._idle} & {id(one) for one in model._idle}


def test_two_models_of_one_process_do_not_mix(tiny_fp32, model):
    rows = random_rows(9, 150)
    other = Predictor(tiny_fp32)
    expected = model.logits(rows), other.logits(rows)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4
    for _ in range(3):
        assert np.array_equal(model.logits(rows), expected[0])
        assert np.array_equal(other.logits(rows), expected[1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([1, 10**6], [0, 0]), r"row 1: input_ids: 1000000 is not in 0\.\."),
        (([1, -1], [0, 0]), r"row 1: input_ids: -1 is not in 0\.\."),
        (([1, 2], [0, 2]), r"row 1: token_type_ids: 2 is not in 0\.\.1"),
        (([1, 2], [0]), "row 1: 2 input_ids with 1 token_type_ids"),
        (([], []), r"row 1: input_ids: 0 tokens, not in 1\.\.64"),
        (([1] * 65, [0] * 65), r"row 1: input_ids: 65 tokens, not in 1\.\.64"),
        (([1.0, 2.0], [0, 0]), r"row 1: input_ids: float64 of shape \[2\]"),
        (([True, False], [0, 0]), r"row 1: input_ids: bool of shape \[2\]"),
        ((["a", "b"], [0, 0]), "row 1: input_ids: <U1 of shape"),
        (([[1, 2]], [[0, 0]]), r"row 1: input_ids: int64 of shape \[1, 2\]"),
        (([[1], [2, 3]], [0, 0]), "row 1: input_ids: not a flat list"),
        (([2**70, 1], [0, 0]), "row 1: input_ids: object of shape"),
        ((np.array([2**64 - 1, 1], np.uint64), [0, 0]), "row 1: input_ids: 18446744073709551615 is not in"),
    ],
)
def test_ids_that_would_crash_the_engine_are_refused(model, row, message):
    with pytest.raises(UserError, match=message):
        model.logits([([1, 2], [0, 0]), row])


def test_the_largest_ids_are_accepted(model):
    last = model.manifest["vocab_size"] - 1
    assert np.isfinite(model.logits([(np.array([0, last], np.int32), np.array([0, 1], np.uint8))])).all()
    with pytest.raises(UserError, match=f"{last + 1} is not in 0..{last}"):
        model.logits([([last + 1], [0])])


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        (["good", ""], None, r"texts\[1\]: no text in it"),
        (["good", " \t\n"], None, r"texts\[1\]: no text in it"),
        (["\u200b"], None, r"texts\[0\]: no text in it"),
        (["good", 3], None, r"texts\[1\]: 3 is not text"),
        ("good", None, "texts: 'good' is one text"),
        (["good"], ["bad"], "takes no `pairs`"),
    ],
)
def test_texts_without_an_answer(model, texts, pairs, message):
    with pytest.raises(UserError, match=message):
        model.predict(texts, pairs)


def test_pairs(tmp_path, tiny_ernie):
    model = Predictor(make_artifact(tmp_path / "pair", tiny_ernie, pair=True))
    one, other = model.predict(["good film", "good film"], ["bad film", "very dull music"])
    assert one.logits != other.logits
    for texts, pairs, message in (
        (["good"], None, "`pairs` is missing"),
        (["good", "bad"], ["good"], "2 texts with 1 pairs"),
        (["good", "bad"], ["good", ""], r"texts\[1\] or pairs\[1\]: no text"),
        (["", "bad"], ["good", "bad"], r"texts\[0\] or pairs\[0\]: no text"),
    ):
        with pytest.raises(UserError, match=message):
            model.predict(texts, pairs)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}])
def test_wrong_options(tiny_int8, options):
    with pytest.raises(UserError, match="threads: "):
        Predictor(tiny_int8, **options)


def test_wrong_batch_size(model):
    with pytest.raises(UserError, match="batch_size: 0"):
        model.predict(["good"], batch_size=0)


def test_a_changed_file_is_refused(copy):
    data = bytearray((copy / artifact.PARAMS).read_bytes())
    data[-1] ^= 1
    (copy / artifact.PARAMS).write_bytes(data)
    with pytest.raises(UserError, match=r"inference\.pdiparams: its sha256"):
        Predictor(copy)
    assert Predictor(copy, check_hashes=False).predict(["good"])


@pytest.mark.parametrize("name", [artifact.PARAMS, "vocab.txt", artifact.MANIFEST])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=name):
        Predictor(copy)


@pytest.mark.parametrize(
    ("verification", "why"), [(None, "never verified"), ({"passed": False}, "verification failed")]
)
def test_an_unverified_artifact_is_refused(copy, verification, why):
    change_manifest(copy, verification=verification)
    with pytest.raises(UserError, match=why):
        Predictor(copy)
    assert Predictor(copy, allow_unverified=True).predict(["good"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tensorrt"}, "engine 'tensorrt' is not one of onednn_int8, tensorrt_int8, fp32"),
        ({"output": "nothing"}, r"has output \['.+'\]; \['nothing'\] are needed"),
        ({"format": 2}, "format 2; this version reads format 1"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, changes, message):
    change_manifest(copy, **changes)
    with pytest.raises(UserError, match=message):
        Predictor(copy)


def test_a_cpu_without_vnni_is_warned_of(tiny_int8, monkeypatch, caplog):
    monkeypatch.setattr(predictor.machine, "machine", lambda: {"instruction_sets": ["avx2", "avx512f"]})
    with caplog.at_level(logging.WARNING):
        Predictor(tiny_int8)
    assert "no VNNI" in caplog.text


def test_an_engine_that_failed_is_not_used_again(tiny_int8, monkeypatch):
    model = Predictor(tiny_int8)

    def fail(self, batch):
        raise RuntimeError("as oneDNN would")

    with monkeypatch.context() as patch:
        patch.setattr(predictor._Engine, "run", fail)
        with pytest.raises(RuntimeError, match="as oneDNN would"):
            model.predict(["good"])
    assert model._idle == []
    assert model.predict(["good"])


def test_serving_loads_nothing_of_the_training_side(tiny_int8):
    code = f"""
import sys
import ernie_kqat.predictor
ernie_kqat.predictor.Predictor({str(tiny_int8)!r}).predict(["a good film"])
training = ("methods", "quantizers", "trainer", "config", "qat", "data", "models", "export")
loaded = [name for name in sys.modules if name.split(".")[0] in ("paddleslim", "paddlenlp")
          or name.startswith("ernie_kqat.") and name.split(".")[1] in training]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
