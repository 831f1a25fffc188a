"""Which rows and labels a task has, the cache of token ids, and data sets by name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_ernie import make_tiny_task

from ernie_kqat import UserError
from ernie_kqat.config import Data
from ernie_kqat.data.dataset import load_eval_split, load_task_data
from ernie_kqat.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def tokenizer(tiny_ernie):
    return load_tokenizer(tiny_ernie)


def _folder(path: Path, train: str, dev: str) -> Data:
    path.mkdir(exist_ok=True)
    (path / "train.tsv").write_text("sentence\tlabel\n" + train)
    (path / "dev.tsv").write_text("sentence\tlabel\n" + dev)
    return Data(path=str(path))


def _rows(count: int) -> str:
    return "".join(f"the film number {index}\t{index % 3}\n" for index in range(count))


def test_ids_labels_and_texts_belong_together(tmp_path, tokenizer):
    task = load_task_data(Data(path=str(make_tiny_task(tmp_path, pair=True)), max_length=12), tokenizer, 1)
    assert task.labels == ["negative", "positive"]
    assert task.pair
    assert (len(task.train), len(task.dev)) == (256, 64)
    lines = (tmp_path / "train.tsv").read_text().splitlines()[1:]
    encoded = tokenizer.encode(task.train.texts, task.train.pairs, 12)
    for index, line in enumerate(lines):
        first, second, label = line.split("\t")
        assert (task.train.texts[index], task.train.pairs[index]) == (first.strip(), second.strip())
        assert task.labels[task.train.labels[index]] == label
        assert task.train.input_ids[index].tolist() == encoded[index].input_ids
        assert task.train.token_type_ids[index].tolist() == encoded[index].token_type_ids
    assert task.train.truncated == sum(row.truncated for row in encoded) > 0
    assert task.train.labels.dtype == np.int64


def test_random_subset_is_the_seeds_and_uniform(tmp_path, tokenizer):
    data = _folder(tmp_path, _rows(300), _rows(30))

    def texts(seed, rows):
        return load_task_data(Data(path=data.path, train_rows=rows), tokenizer, seed).train.texts

    assert texts(1, 50) == texts(1, 50)
    assert texts(1, 50) != texts(2, 50)
    numbers = [int(text.split()[-1]) for text in texts(1, 50)]
    assert len(set(numbers)) == 50
    assert numbers == sorted(numbers)
    assert len(texts(1, 1000)) == 300
    drawn = [int(text.split()[-1]) for seed in range(40) for text in texts(seed, 50)]
    counts = np.histogram(drawn, bins=3, range=(0, 300))[0] / 2000
    np.testing.assert_allclose(counts, 1 / 3, atol=0.04)  # the start of the file is not preferred


def test_dev_rows_are_the_first_and_labels_those_of_the_whole_file(tmp_path, tokenizer):
    data = _folder(tmp_path, _rows(300) + "a rare film\t10\n", _rows(30))
    task = load_task_data(Data(path=data.path, dev_rows=7, train_rows=5), tokenizer, 0)
    assert [text.split()[-1] for text in task.dev.texts] == list("0123456")
    assert task.labels == ["0", "1", "2", "10"]  # by value, not by text; 10 may well not be among the 5 rows


def test_label_names_and_numbers(tmp_path, tokenizer):
    data = _folder(tmp_path, "a\t0\nb\t1\n", "a\t1\nb\tbad\n")
    with pytest.raises(UserError, match=r"dev.tsv:3: label 'bad' found where one of 0, 1 is needed"):
        load_task_data(data, tokenizer, 0)
    named = Data(path=data.path, labels=["bad", "good"])
    assert load_task_data(named, tokenizer, 0).dev.labels.tolist() == [1, 0]
    data = _folder(tmp_path, "a\tbad\nb\tgood\n", "a\tgood\nb\t0\n")
    with pytest.raises(UserError, match=r"dev.tsv:3: label '0' found where one of bad, good"):  # 0 of what order?
        load_task_data(data, tokenizer, 0)
    swapped = load_task_data(Data(path=data.path, labels=["good", "bad"]), tokenizer, 0)
    assert swapped.train.labels.tolist() == [1, 0]
    assert swapped.dev.labels.tolist() == [0, 0]
    data = _folder(tmp_path, "a\t1\nb\t2\n", "a\t0\n")
    with pytest.raises(UserError, match="label '0' found where one of 1, 2"):  # numbers that are names are not ids
        load_task_data(Data(path=data.path, labels=["1", "2"]), tokenizer, 0)


@pytest.mark.parametrize(
    ("train", "labels", "message"),
    [
        ("a\t1\nb\t1\n", None, "labels of train: 1 found where two or more"),
        ("a\t1\nb\t0\n", ["0"], "Data.labels: 0 found where two or more"),
        ("a\t1\nb\t0\n", ["0", "0"], "Data.labels: 0, 0 found where two or more different"),
        ("a\t1\nb\t7\n", ["0", "1"], "train.tsv:3: label '7'"),
        ("".join(f"a\t0.{index}\n" for index in range(1001)), None, "1001 labels .* is Data.label the right column"),
    ],
)
def test_labels_that_are_refused(tmp_path, tokenizer, train, labels, message):
    data = _folder(tmp_path, train, "a\t1\n")
    with pytest.raises(UserError, match=message):
        load_task_data(Data(path=data.path, labels=labels), tokenizer, 0)


def test_evaluation_needs_train_for_its_labels_only(tmp_path, tokenizer):
    data = _folder(tmp_path, "a\tx\nb\ty\n", "a\ty\n")
    task = load_task_data(data, tokenizer, 0, need_train=False)
    assert (len(task.train), task.labels, task.dev.labels.tolist()) == (0, ["x", "y"], [1])
    (tmp_path / "train.tsv").unlink()
    assert load_task_data(Data(path=data.path, labels=["y", "x"]), tokenizer, 0, need_train=False).dev.labels == [0]
    with pytest.raises(UserError, match=r"no train.tsv"):
        load_task_data(data, tokenizer, 0, need_train=False)


def test_files_of_a_folder(tmp_path, tokenizer):
    data = _folder(tmp_path, "a\tx\nb\ty\n", "a\ty\n")
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": "x"}\n')
    with pytest.raises(UserError, match=r"dev.tsv and dev.jsonl are there; say which with Data.dev"):
        load_task_data(data, tokenizer, 0)
    assert load_task_data(Data(path=data.path, dev="dev.jsonl"), tokenizer, 0).dev.labels.tolist() == [0]
    with pytest.raises(UserError, match=r"other.tsv: no such file"):
        load_task_data(Data(path=data.path, dev="other.tsv"), tokenizer, 0)
    with pytest.raises(UserError, match=r"nowhere: no such folder \(Data.path\)"):
        load_task_data(Data(path=str(tmp_path / "nowhere")), tokenizer, 0)
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "dev.tsv").rename(tmp_path / "test.tsv")
    with pytest.raises(UserError, match=r"no dev.tsv, .csv or .jsonl .*; found: test.tsv, train.tsv"):
        load_task_data(data, tokenizer, 0)
    with pytest.raises(UserError, match="no path and no name"):
        load_task_data(Data(), tokenizer, 0)
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tx\n")
    with pytest.raises(UserError, match=r"train.tsv:2 and .*dev.tsv:2: only one of them has a second sentence"):
        load_task_data(data, tokenizer, 0)


def test_eval_split(tmp_path, tokenizer):
    data = _folder(tmp_path, "a\tx\nb\ty\n", "a\t1\nb\tx\n")
    split = load_eval_split(data.path, tokenizer, ["x", "y"], 16)
    assert (split.labels.tolist(), split.texts, split.name) == ([1, 0], ["a", "b"], "dev.tsv")
    assert load_eval_split(tmp_path / "dev.tsv", tokenizer, ["x", "y"], 16, rows=1).labels.tolist() == [1]
    assert load_eval_split(tmp_path / "dev.tsv", tokenizer, None, 16).labels is None
    plain = tmp_path / "plain.txt"
    plain.write_text("the film\n\nthe plot\n")
    split = load_eval_split(plain, tokenizer, ["x", "y"], 16, pair=False)
    assert (split.labels, split.texts) == (None, ["the film", "the plot"])
    with pytest.raises(UserError, match=r"plain.txt: one sentence a row; the task takes 2"):
        load_eval_split(plain, tokenizer, None, 16, pair=True)
    (tmp_path / "holes.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"holes.jsonl:2: no label found where one of x, y"):
        load_eval_split(tmp_path / "holes.jsonl", tokenizer, ["x", "y"], 16)
    with pytest.raises(UserError, match="gone: no such file"):
        load_eval_split(tmp_path / "gone", tokenizer, ["x", "y"], 16)


class _Counting:
    """A tokenizer that counts the rows it is given."""

    def __init__(self, inner):
        self.inner = inner
        self.rows = 0
        self.pad_token_id, self.vocab_size = inner.pad_token_id, inner.vocab_size
        self.kind, self.fingerprint = inner.kind, inner.fingerprint

    def encode(self, texts, pairs, max_length):
        self.rows += len(texts)
        return self.inner.encode(texts, pairs, max_length)


def _same(a, b) -> bool:
    arrays = zip(a.input_ids + a.token_type_ids, b.input_ids + b.token_type_ids)
    return a.truncated == b.truncated and len(a) == len(b) and all(np.array_equal(x, y) for x, y in arrays)


def test_rows_are_tokenized_once(tmp_path, tokenizer):
    folder = make_tiny_task(tmp_path / "task", rows=2500, pair=True)
    data, cache = Data(path=str(folder), max_length=16), tmp_path / "cache"
    counting = _Counting(tokenizer)
    first = load_task_data(data, counting, 0, cache)
    assert counting.rows == 2500 + 625
    second = load_task_data(data, counting, 0, cache)
    assert counting.rows == 2500 + 625
    assert _same(first.train, second.train)
    assert second.train.truncated > 0
    load_task_data(Data(path=str(folder), max_length=15), counting, 0, cache)
    assert counting.rows == 2 * (2500 + 625)
    counting.fingerprint = "another tokenizer"
    load_task_data(data, counting, 0, cache)
    assert counting.rows == 3 * (2500 + 625)


def test_damaged_cache_is_noticed_and_rewritten(tmp_path, tokenizer, caplog):
    (tmp_path / "a.txt").write_text("".join(f"the film {'good ' * (index % 9)}\n" for index in range(40)))
    cache = tmp_path / "cache"

    def load():
        return load_eval_split(tmp_path / "a.txt", tokenizer, None, 16, cache_dir=cache)

    expected = load()
    (file,) = cache.iterdir()
    good = file.read_bytes()
    rng = random.Random(0)
    damaged = [b"", b"not a zip", good[: len(good) // 2], good[:-1]]
    for _ in range(200):
        content = bytearray(good)
        content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    for content in damaged:
        file.write_bytes(content)
        assert _same(load(), expected)
    file.write_bytes(b"not a zip")
    caplog.clear()
    load()
    assert f"{file}: unreadable cache file" in caplog.text
    assert file.read_bytes() == good
    assert os.listdir(cache) == [file.name]


def test_cache_of_another_vocabulary_size_is_not_believed(tmp_path, tokenizer, caplog):
    (tmp_path / "a.txt").write_text("the film\n")
    load_eval_split(tmp_path / "a.txt", tokenizer, None, 16, cache_dir=tmp_path / "cache")
    smaller = _Counting(tokenizer)
    smaller.vocab_size = 5
    load_eval_split(tmp_path / "a.txt", smaller, None, 16, cache_dir=tmp_path / "cache")
    assert smaller.rows == 1
    assert "damaged cache file" in caplog.text


def test_unwritable_cache_costs_only_time(tmp_path, tokenizer, caplog):
    (tmp_path / "a.txt").write_text("the film\n")
    (tmp_path / "file").write_text("")
    split = load_eval_split(tmp_path / "a.txt", tokenizer, None, 16, cache_dir=tmp_path / "file")
    assert len(split) == 1
    assert "could not be cached" in caplog.text


def test_names_that_paddlenlp_does_not_have(tokenizer):
    with pytest.raises(UserError, match=r"'nosuch/x' is not one of PaddleNLP's data sets: .*chnsenticorp.*glue"):
        load_task_data(Data(name="nosuch/x"), tokenizer, 0)
    with pytest.raises(UserError, match=r"glue/sst-3: Invalid name .*sst-2"):
        load_task_data(Data(name="glue/sst-3"), tokenizer, 0)
    with pytest.raises(UserError, match=r"glue/mnli: Invalid split .*dev_matched.* Data.dev name the splits"):
        load_task_data(Data(name="glue/mnli"), tokenizer, 0)


def test_unreachable_network_names_both_ways_out(tokenizer, monkeypatch):
    from paddlenlp import datasets

    def load_dataset(*args, **kwargs):
        raise RuntimeError("Download from somewhere failed. Retry limit reached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"datasets and could not be downloaded .*network.*-o Data.path=DIR"):
        load_task_data(Data(name="chnsenticorp"), tokenizer, 0)


def test_data_set_by_name(tmp_path, tiny_ernie):
    """RTE through PaddleNLP from its own download folder, which is chosen when PaddleNLP is imported."""
    source = SHARED / "data" / "RTE"
    if not source.is_dir():
        pytest.skip("no ../shared")
    target = tmp_path / "datasets" / "Glue" / "RTE"
    shutil.copytree(source, target)
    assert hashlib.md5((target / "dev.tsv").read_bytes()).hexdigest() == "973cb4178d4534cf745a01c309d4a66c"
    code = f"""
import json
from ernie_kqat.config import Data
from ernie_kqat.data.dataset import load_task_data
from ernie_kqat.tokenizer import load_tokenizer
task = load_task_data(Data(name="glue/rte", dev_rows=20, train_rows=30), load_tokenizer({str(tiny_ernie)!r}), 0)
counts = len(task.train), len(task.dev)
print(json.dumps([counts, task.pair, task.labels, task.dev.labels.tolist(), task.dev.pairs[0]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PPNLP_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    counts, pair, labels, ids, second = json.loads(done.stdout.splitlines()[-1])
    assert (counts, pair, labels) == ([30, 20], True, ["entailment", "not_entailment"])
    expected = [line.split("\t") for line in (target / "dev.tsv").read_text("utf-8").splitlines()[1:21]]
    assert [labels[label] for label in ids] == [row[3] for row in expected]
    assert second == expected[0][2]
