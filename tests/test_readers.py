"""Files in every shape that users have; whatever is wrong is named by file and line."""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from ernie_kqat import UserError
from ernie_kqat.data.readers import Example, ExampleReader, read_examples

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _rows(examples: list[Example]) -> list[tuple]:
    return [(example.text, example.text_pair, example.label) for example in examples]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("glue.tsv", "sentence\tlabel\na b \t1\nc\t0\n", [("a b", None, "1"), ("c", None, "0")]),
        ("bom_crlf.tsv", "\ufeffsentence\tlabel\r\na\t1\r\n", [("a", None, "1")]),
        ("no_end.tsv", "label\tsentence\n1\ta", [("a", None, "1")]),
        ("case.tsv", "Text\tLabel\na\t1\n", [("a", None, "1")]),
        ("quotes.tsv", 'sentence\tlabel\n"a\t1\nb "c" d\t0\n', [('"a', None, "1"), ('b "c" d', None, "0")]),
        (
            "mrpc.tsv",
            "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n",
            [("a", "b", "1")],
        ),
        ("qnli.tsv", "index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment\n", [("q", "s", "entailment")]),
        ("headerless.tsv", "好 书\tpositive\n坏\tnegative\n", [("好 书", None, "positive"), ("坏", None, "negative")]),
        ("headerless_bom.tsv", "\ufeffa\tx\nb\ty\n", [("a", None, "x"), ("b", None, "y")]),
        ("headerless_pair.tsv", "a\tb\t1\nc\td\t0\n", [("a", "b", "1"), ("c", "d", "0")]),
        ("separators.tsv", "sentence\tlabel\na\u2028b\x85c\t1\n", [("a\u2028b\x85c", None, "1")]),
        ("quoted.csv", 'label,text\n1,"a, ""b""\nc"\n0,d\n', [('a, "b"\nc', None, "1"), ("d", None, "0")]),
        ("crlf.csv", '\ufefftext,label\r\n"a\r\nb",1\r\n', [("a\nb", None, "1")]),
        ("pair.csv", "text,text_pair,label\na,b,1\n", [("a", "b", "1")]),
        (
            "objects.jsonl",
            '{"sentence": "a", "label": 1, "id": [3]}\n\n{"label": "x", "sentence": "\\u597d"}\n'
            '{"sentence": "b", "label": true}\n',
            [("a", None, "1"), ("好", None, "x"), ("b", None, "true")],
        ),
        ("afqmc.jsonl", '{"sentence1": "a", "sentence2": "b", "label": "0"}', [("a", "b", "0")]),
    ],
)
def test_what_is_read(tmp_path, name, content, expected):
    assert _rows(read_examples(_write(tmp_path / name, content))) == expected


def test_named_columns(tmp_path):
    path = _write(tmp_path / "a.tsv", "id\tcomment\tsentence\trating\tlabel\n1\tc\ts\tgood\t0\n")
    assert _rows(read_examples(path)) == [("s", None, "0")]
    assert _rows(read_examples(path, text="comment")) == [("c", None, "0")]
    assert _rows(read_examples(path, "comment", "sentence", "rating")) == [("c", "s", "good")]
    assert _rows(read_examples(path, label="rating")) == [("s", None, "good")]
    headerless = _write(tmp_path / "b.tsv", "a\t1\nb\t0\n")
    with pytest.raises(UserError, match=r"b.tsv: no column 'comment' \(Data.text\); found: 'a', '1'"):
        read_examples(headerless, text="comment")
    with pytest.raises(UserError, match="different columns"):
        read_examples(path, text="comment", text_pair="comment")


def test_labels_may_be_optional(tmp_path):
    for name, content in (
        ("a.txt", "one sentence\n\ntwo\tstill two\n"),
        ("a.tsv", "index\tsentence\n0\tone sentence\n1\ttwo\n"),
        ("b.tsv", "one sentence\ntwo\n"),
        ("a.jsonl", '{"text": "one sentence"}\n{"text": "two", "label": null}\n'),
    ):
        path = _write(tmp_path / name, content)
        examples = read_examples(path, require_label=False)
        assert [example.label for example in examples] == [None, None]
        assert examples[0].text == "one sentence"
        with pytest.raises(UserError, match=name):
            read_examples(path)


def test_where_is_the_line_a_row_starts_at(tmp_path):
    csv = _write(tmp_path / "a.csv", 'text,label\n"a\nb\nc",1\n\nd,0\n')
    assert [example.where for example in read_examples(csv)] == [f"{csv}:2", f"{csv}:6"]
    tsv = _write(tmp_path / "a.tsv", "\nsentence\tlabel\n\na\t1\n")
    assert [example.where for example in read_examples(tsv)] == [f"{tsv}:4"]


def test_blank_lines_and_empty_texts_are_left_out_and_counted(tmp_path, caplog):
    path = _write(tmp_path / "a.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\n\n  \n\tb\t1\na\t \t0\n\t\t\nc\td\t0\n")
    reader = ExampleReader(path)
    assert _rows(list(reader)) == [("a", "b", "1"), ("c", "d", "0")]
    assert (reader.blank_lines, reader.empty_texts) == (3, 2)
    assert "2 rows with an empty text" in caplog.text
    assert len(list(reader)) == 2
    assert (reader.blank_lines, reader.empty_texts) == (3, 2)  # of one pass, not of both


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\na\t1\nb\t1\textra\n", r"a.tsv:3: 3 columns found where 2 are needed"),
        ("a.tsv", "sentence\tlabel\na\n", r"a.tsv:2: 1 columns found where 2 are needed: 'sentence', 'label'"),
        ("a.tsv", "a\tx\nb\n", r"a.tsv:2: 1 columns found where 2"),
        ("a.tsv", "sentence\tlabel\na\t\n", r"a.tsv:2: no label in column 'label'"),
        ("a.tsv", "a\tb\tc\td\n", r"a.tsv:1: 4 columns and no known column name in the first line"),
        ("a.tsv", "comment\tlabel\na\t1\n", r"no column of text is known among 'comment', 'label'"),
        ("a.tsv", "sentence\tscore\na\t1\n", r"no column of labels is known among 'sentence', 'score'"),
        ("a.tsv", "sentence\tlabel\tlabel\na\t1\t1\n", r"column 'label' is there more than once"),
        ("a.tsv", "", r"a.tsv: no rows \(blank: 0\)"),
        ("a.tsv", "sentence\tlabel\n\n\t1\n", r"a.tsv: no rows \(blank: 1, with an empty text: 1\)"),
        ("a.tsv", "sentence\tlabel\nabc\t1\n".encode("utf-16"), r"a.tsv:1: not UTF-8"),
        ("a.tsv", "sentence\tlabel\nabc\t1\n".encode("utf-16-le"), r"a.tsv:1: a NUL character"),
        (
            "a.tsv",
            b"sentence\tlabel\na\t1\nb\xff\t1\n",
            r"a.tsv:3: not UTF-8 \(invalid start byte, byte 1 of the line\)",
        ),
        ("a.tsv", "comment\trating\n" + "a\tx\nb\ty\n" * 9, r"label 'rating' is in no other row"),
        ("a.csv", "a,b\nc,1\n", r"a.csv: no column of text is known among 'a', 'b'"),
        ("a.csv", "text;label\na;1\n", r"no column of text is known among 'text;label'"),
        ("a.csv", 'text,label\na,1\n"b,0\nc,1\n', r"a.csv:3: not valid CSV"),
        ("a.csv", 'text,label\n"a"b,1\n', r"a.csv:2: not valid CSV"),
        ("a.csv", "text,label\na,b,1\n", r"a.csv:2: 3 columns found where 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: list found where an object is needed"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 1}\n', r"a.jsonl:2: no 'text'; found: 'label'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n', r"a.jsonl:2: text: 3 found where text"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', r"a.jsonl:1: label: \[1\] found where one label"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"a.jsonl:2: no label"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', r"a.jsonl:1: text: '\\ud800' is not valid Unicode"),
        ("a.jsonl", "[" * 10**5 + "\n", r"a.jsonl:1: not valid JSON"),
        ("a.txt", "a\n", r"a.txt: a .txt file has no labels"),
        ("a.xlsx", "a\n", r"suffix '.xlsx' is not one of .tsv, .csv, .jsonl, .txt"),
        ("a", "a\n", r"suffix '' is not one of"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_examples(_write(tmp_path / name, content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"a.tsv: no such file"):
        read_examples(tmp_path / "a.tsv")
    with pytest.raises(UserError, match="is a folder"):
        read_examples(tmp_path)


def test_a_line_without_end_is_refused(tmp_path):
    path = _write(tmp_path / "a.jsonl", b'{"text": "' + b"a" * (1 << 24) + b'"}')
    with pytest.raises(UserError, match=r"a.jsonl:1: a line of over 16777216 bytes"):
        read_examples(path)


def test_random_fields_survive_each_format(tmp_path):
    rng = random.Random(0)
    letters = "ab \"',;\\#|é好😀\u2028\x85"
    rows = [("".join(rng.choices(letters, k=9)) + "x", rng.choice("01")) for _ in range(500)]
    _write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    _write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    expected = [(text.strip(), None, label) for text, label in rows]
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        assert _rows(read_examples(tmp_path / name)) == expected


def test_a_large_file_is_not_held_in_memory(tmp_path):
    path = _write(
        tmp_path / "a.tsv", "sentence\tlabel\n" + ("a rather long sentence about a film " * 20 + "\t1\n") * 20000
    )
    assert path.stat().st_size > 10**7
    tracemalloc.start()
    assert sum(1 for _ in ExampleReader(path)) == 20000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


@pytest.mark.parametrize(
    ("file", "rows", "labels", "pair"),
    [
        ("SST-2/train.tsv", 67349, {"0": 29780, "1": 37569}, False),
        ("SST-2/dev.tsv", 872, {"0": 428, "1": 444}, False),
        ("MRPC/dev.tsv", 408, {"0": 129, "1": 279}, True),
        ("RTE/dev.tsv", 277, {"entailment": 146, "not_entailment": 131}, True),
        ("ChnSentiCorp/dev.tsv", 1200, {"positive": 593, "negative": 607}, False),
    ],
)
def test_real_files(file, rows, labels, pair):
    path = SHARED / "data" / file
    if not path.is_file():
        pytest.skip("no ../shared")
    examples = read_examples(path)
    assert len(examples) == rows
    counts = {label: sum(example.label == label for example in examples) for label in labels}
    assert counts == labels
    assert {example.text_pair is not None for example in examples} == {pair}
