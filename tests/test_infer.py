"""Lines in, JSON lines out: one for one, in order, also for lines that have no answer, and never all in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_kqat import Predictor
from ernie_kqat.infer import WINDOW, answer_lines

TOOL = Path(__file__).parents[1] / "tools/infer.py"
LINES = [b"a good film\n", b"\n", b"bad\tfilm\n", b"caf\xe9\n", "电影很好\r\n".encode(), b"a dull plot"]


@pytest.fixture(scope="module")
def model(tiny_int8):
    return Predictor(tiny_int8)


def flat(windows):
    return [answer for window in windows for answer in window]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_one_answer_for_each_line_in_order(model, batch_size):
    found = flat(answer_lines(model, LINES, batch_size))
    assert [answer.get("text") for answer in found] == ["a good film", None, None, None, "电影很好", "a dull plot"]
    assert found[1] == {"line": 2, "error": "no text in it; an empty sentence has no label"}
    assert found[2] == {"line": 3, "error": "2 columns between tabs where the model takes 1"}
    assert found[3]["line"] == 4
    assert "not UTF-8" in found[3]["error"]
    for answer in found[:1] + found[4:]:
        [expected] = model.predict([answer["text"]])
        assert answer["label"] == expected.label
        assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
        assert "logits" not in answer


def test_many_windows(model):
    lines = [b"good " * (1 + index % 13) for index in range(100)]
    found = flat(answer_lines(model, lines, batch_size=4, window=7, with_logits=True))
    assert [answer["text"].count("good") for answer in found] == [1 + index % 13 for index in range(100)]
    assert found[0]["logits"] == pytest.approx(found[13]["logits"], abs=1e-5)


def test_a_window_is_read_at_a_time(model):
    taken = []

    def lines():
        for index in range(10**6):
            taken.append(index)
            yield b"a good film\n"

    answers = answer_lines(model, lines(), batch_size=2)
    assert len(next(answers)) == 2 * WINDOW
    assert len(taken) == 2 * WINDOW
    assert len(next(answer_lines(model, lines(), batch_size=1))) == 1


def test_a_window_without_any_answer(model):
    assert [set(answer) for answer in flat(answer_lines(model, [b"\n", b" \n"]))] == [{"line", "error"}] * 2
    assert flat(answer_lines(model, [])) == []


def test_a_byte_order_mark_is_no_text(model):
    assert flat(answer_lines(model, ["\ufeffgood".encode()]))[0]["text"] == "good"


def test_pairs(tmp_path, tiny_ernie):
    from artifacts import make_artifact

    model = Predictor(make_artifact(tmp_path / "pair", tiny_ernie, pair=True))
    found = flat(answer_lines(model, [b"good film\tbad film\n", b"good film\n", b"good\t\n"]))
    assert found[0]["text"] == "good film"
    assert found[0]["pair"] == "bad film"
    assert found[0]["label"] in model.labels
    assert found[1]["error"].startswith("1 columns")
    assert found[2]["error"].startswith("no text")


def test_arguments_of_the_tool(tool, tiny_int8):
    code, out, _ = tool("infer", "--model", tiny_int8, "a good film", "a dull plot", "--logits")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer["text"] for answer in answers] == ["a good film", "a dull plot"]
    assert all(len(answer["logits"]) == 2 for answer in answers)


def test_a_file_with_bad_lines(tool, tiny_int8, tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"".join(LINES))
    code, out, err = tool("infer", "--model", tiny_int8, "--file", tmp_path / "lines.txt")
    assert code == 1
    assert len(out.splitlines()) == len(LINES)
    assert "lines without an answer: 3" in err


def test_wrong_input(tool, tiny_int8, tmp_path):
    for arguments, message in (
        (["--model", tiny_int8], "give texts, or --file FILE"),
        (["--model", tiny_int8, "good", "--file", "-"], "not both"),
        (["--model", tiny_int8, "good", "--batch", 0], "--batch 0 is not in 1..1024"),
        (["--model", tiny_int8, "--file", tmp_path / "none"], "none: No such file"),
        (["--model", tmp_path / "none", "good"], "no such artifact folder"),
    ):
        code, _, err = tool("infer", *arguments)
        assert code == 2
        assert message in err


def test_head_may_close_the_pipe(tiny_int8):
    """Endless input: it ends, and without a traceback, only because the reader goes away."""
    command = [sys.executable, str(TOOL), "--model", str(tiny_int8), "--file", "-", "--batch", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    pipe = subprocess.PIPE
    source = subprocess.Popen(["yes", "电影"], stdout=pipe)
    with source, subprocess.Popen(command, stdin=source.stdout, stdout=pipe, stderr=pipe, env=environment) as tool:
        source.stdout.close()
        assert json.loads(tool.stdout.readline())["text"] == "电影"
        tool.stdout.close()
        assert tool.wait(timeout=60) == 0
        assert tool.stderr.read() == b""
