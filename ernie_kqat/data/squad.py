"""Questions in SQuAD's JSON. Whatever is wrong is named by file and question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .columns import Example


@dataclass(frozen=True)
class Question(Example):
    """`text` is the question, `text_pair` its context; answers: (text, first character in the context), None if unlabelled,
    empty if there is no answer; `label` is the first."""

    answers: list[tuple[str, int]] | None


class QuestionReader:
    """The questions of a .json file as SQuAD has them: data -> paragraphs (context) -> qas (question, answers).

    Of `is_impossible` the answers count as none, which is an error unless `unanswerable`.
    """

    def __init__(self, path: str | Path, require_answers: bool = True, unanswerable: bool = False):
        self.path, self.require_answers, self.unanswerable = Path(path), require_answers, unanswerable
        if not self.path.is_file():
            raise UserError(f"{path}: {'is a folder; a file is needed' if self.path.is_dir() else 'no such file'}")
        if self.path.suffix != ".json":
            raise UserError(f"{path}: suffix {self.path.suffix!r} is not .json (SQuAD's format)")

    def __iter__(self) -> Iterator[Question]:
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: not valid JSON: {error}") from None
        number = 0
        for article in _list(tree, "data", str(self.path)):
            for paragraph in _list(article, "paragraphs", str(self.path)):
                context = _text(paragraph, "context", f"{self.path}: the paragraph after question {number}")
                for entry in _list(paragraph, "qas", f"{self.path}: the paragraph after question {number}"):
                    number += 1
                    yield self._question(entry, context, f"{self.path}: question {number}")
        if not number:
            raise UserError(f"{self.path}: no questions")

    def _question(self, entry: Any, context: str, where: str) -> Question:
        text = _text(entry, "question", where)
        if "id" in entry:
            where = f"{where} ({str(entry['id'])[:40]})"
        if "answers" not in entry and not self.require_answers:
            return Question(text, context, None, where, None)
        listed = [] if entry.get("is_impossible") else _list(entry, "answers", where)
        answers = [_answer(one, context, where) for one in listed]
        if not answers and not self.unanswerable:
            raise UserError(f"{where}: no answer; say Data.unanswerable: true where questions may have none")
        return Question(text, context, answers[0][0] if answers else "", where, answers)


def _answer(entry: Any, context: str, where: str) -> tuple[str, int]:
    text, begin = _text(entry, "text", where), entry.get("answer_start")
    if isinstance(begin, bool) or not isinstance(begin, int) or begin < 0:
        raise UserError(f"{where}: answer_start: {begin!r} is not a place in the context")
    if context[begin : begin + len(text)] != text:
        found = context[begin : begin + len(text)]
        raise UserError(f"{where}: answer {text!r} is not at character {begin} of the context; found {found!r}")
    return text, begin


def _list(tree: Any, key: str, where: str) -> list[Any]:
    if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
        raise UserError(f"{where}: no list {key!r}, as SQuAD's format has it")
    return tree[key]


def _text(tree: Any, key: str, where: str) -> str:
    if not isinstance(tree, dict) or not isinstance(tree.get(key), str) or not tree[key].strip():
        raise UserError(f"{where}: no text {key!r}, as SQuAD's format has it")
    return tree[key]
