"""Sentences with a tag a word: CoNLL's columns, and JSON lines. Whatever is wrong is named by file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .columns import Example, listed
from .readers import json_rows, lines_of

WORD_KEYS, TAG_KEYS = ("tokens", "words", "text"), ("labels", "tags", "ner_tags", "label")
DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Tagged(Example):
    """One sentence; `label` is its tags with blanks between them, or None."""

    tokens: list[str]
    tags: list[str] | None


class TaggedReader:
    """The sentences of one file, in its order.

    `.txt` and `.conll`: a word a line, its tag in the last of two or more columns (between tabs, or else between blanks), a
    blank line after each sentence; lines of -DOCSTART- are left out. `.jsonl`: an object a line with a list of words and a
    list of as many tags, `words` and `tags` naming their keys.
    """

    def __init__(self, path: str | Path, words: str | None = None, tags: str | None = None, require_tags: bool = True):
        self.path, self.keys, self.require_tags = Path(path), (words, tags), require_tags
        if not self.path.is_file():
            raise UserError(f"{path}: {'is a folder; a file is needed' if self.path.is_dir() else 'no such file'}")
        if self.path.suffix not in (".txt", ".conll", ".jsonl"):
            raise UserError(f"{path}: suffix {self.path.suffix!r} is not one of .txt, .conll, .jsonl")

    def __iter__(self) -> Iterator[Tagged]:
        found = False
        for example in self._json() if self.path.suffix == ".jsonl" else self._columns():
            found = True
            yield example
        if not found:
            raise UserError(f"{self.path}: no sentences")

    def _columns(self) -> Iterator[Tagged]:
        rows: list[list[str]] = []
        begin = width = 0
        for number, line in enumerate([*lines_of(self.path), ""], 1):
            cells = line.split("\t") if "\t" in line else line.split()
            if cells[:1] == [DOCUMENT]:
                cells = []
            if not "".join(cells).strip():
                if rows:
                    yield self._sentence(rows, begin)
                rows = []
                continue
            width = width or len(cells)
            if not all(cell.strip() for cell in cells):
                raise UserError(f"{self.path}:{number}: an empty column: {line[:80]!r}")
            if len(cells) != width:
                raise UserError(
                    f"{self.path}:{number}: {len(cells)} columns found where {width} are needed: {line[:80]!r}"
                )
            if width < 2 and self.require_tags:
                raise UserError(f"{self.path}:{number}: no tag beside {line[:80]!r}: a word and its tag are needed")
            begin = begin if rows else number
            rows.append([cell.strip() for cell in cells])

    def _sentence(self, rows: list[list[str]], number: int) -> Tagged:
        tokens = [row[0] for row in rows]
        tags = [row[-1] for row in rows] if len(rows[0]) > 1 else None
        return _tagged(tokens, tags, f"{self.path}:{number}")

    def _json(self) -> Iterator[Tagged]:
        for number, row in json_rows(self.path):
            where = f"{self.path}:{number}"
            tokens = self._listed(row, self._key(row, self.keys[0], WORD_KEYS), where)
            key = self._key(row, self.keys[1], TAG_KEYS)
            tags = None if key not in row and not self.require_tags else self._listed(row, key, where)
            if tags is not None and len(tags) != len(tokens):
                raise UserError(f"{where}: {len(tokens)} words with {len(tags)} tags; each word needs one")
            if tokens:
                yield _tagged(tokens, tags, where)

    def _key(self, row: dict[str, Any], named: str | None, known: Sequence[str]) -> str:
        return named or next((name for name in known if name in row), known[0])

    def _listed(self, row: dict[str, Any], key: str, where: str) -> list[str]:
        if key not in row:
            raise UserError(f"{where}: no {key!r}; found: {listed(row)}")
        value = row[key]
        if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
            raise UserError(f"{where}: {key}: {repr(value)[:80]} found where a list of words is needed")
        return value


def _tagged(tokens: list[str], tags: list[str] | None, where: str) -> Tagged:
    return Tagged(" ".join(tokens), None, None if tags is None else " ".join(tags), where, tokens, tags)
