"""Lines of text -> answers, a window of lines in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import UserError
from .predictor import Predictor

WINDOW = 16  # batches read ahead, so that lines of like length share a batch

Answer = dict[str, Any]


def answer_lines(
    predictor: Predictor,
    lines: Iterable[bytes],
    batch_size: int = 32,
    window: int | None = None,
    with_logits: bool = False,
) -> Iterator[list[Answer]]:
    """The answers to each `window` lines, one a line and in order; by default WINDOW batches, or one line at batch size 1.

    A line is UTF-8 text, for a model of pairs two texts with a tab between them. An answer is {text, label, score}, or what
    the model's task has for an answer (docs/tasks.md), with `pair` and `logits` where they apply; for a line that has none {line:
    its number from 1, error: why}.
    """
    size = window or (1 if batch_size == 1 else WINDOW * batch_size)
    numbered = enumerate(lines, 1)
    while chunk := list(itertools.islice(numbered, size)):
        yield _answer(predictor, chunk, batch_size, with_logits)


def _answer(predictor: Predictor, chunk: list[tuple[int, bytes]], batch_size: int, with_logits: bool) -> list[Answer]:
    answers: list[Answer] = []
    for number, line in chunk:
        try:
            answers.append(_parse(line, number, predictor.pair))
        except UserError as error:
            answers.append({"line": number, "error": str(error)})
    readable = [index for index, answer in enumerate(answers) if "error" not in answer]
    texts = [answers[index]["text"] for index in readable]
    pairs = [answers[index]["pair"] for index in readable] if predictor.pair else None
    task = predictor.task
    encoded = dict(zip(readable, task.encode(predictor.tokenizer, texts, pairs, predictor.max_length)))
    for index in [index for index, row in encoded.items() if task.lacks_text(row)]:
        answers[index] = {"line": chunk[index][0], "error": "no text in it; an empty sentence has no label"}
        del encoded[index]
    for index, prediction in zip(encoded, predictor.answer(list(encoded.values()), batch_size)):
        answers[index].update(prediction.fields())
        if with_logits:
            answers[index]["logits"] = prediction.logits
    return answers


def _parse(line: bytes, number: int, pair: bool) -> Answer:
    try:
        columns = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    names = ("text", "pair") if pair else ("text",)
    if len(columns) != len(names):
        raise UserError(f"{len(columns)} columns between tabs where the model takes {len(names)}")
    return dict(zip(names, columns))
