"""One row of any source as an `Example`: which columns hold its text, second text and label."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

# (text, pair) columns as GLUE, CLUE and PaddleNLP call them, compared without case; the first that is there wins.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("#1 string", "#2 string"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("query", "title"),
    ("sentence", None),
    ("text", None),
    ("text_a", None),
    ("review", None),
    ("content", None),
)
LABEL_COLUMNS = ("label", "labels", "quality", "gold_label", "is_duplicate")


@dataclass(frozen=True)
class Example:
    """One row. `label` is as written in the file, or None; `where` is "file:line"."""

    text: str
    text_pair: str | None
    label: str | None
    where: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read."""

    text: str
    text_pair: str | None
    label: str | None


def choose_columns(
    names: Sequence[str], text: str | None, text_pair: str | None, label: str | None, require_label: bool, source: str
) -> Columns:
    """The columns to read: those named, else those found by `TEXT_COLUMNS` and `LABEL_COLUMNS`."""
    for key, name in (("text", text), ("text_pair", text_pair), ("label", label)):
        if name is not None and name not in names:
            raise UserError(f"{source}: no column {name!r} (Data.{key}); found: {listed(names)}")
    known = {name.lower(): name for name in names}
    if text is None:
        found = next((pair for pair in TEXT_COLUMNS if all(name is None or name in known for name in pair)), None)
        if found is None:
            raise UserError(f"{source}: no column of text is known among {listed(names)}; name it with Data.text")
        text = known[found[0]]
        text_pair = text_pair or (known[found[1]] if found[1] else None)
    if label is None:
        label = next((known[name] for name in LABEL_COLUMNS if name in known), None)
    if label is None and require_label:
        raise UserError(f"{source}: no column of labels is known among {listed(names)}; name it with Data.label")
    chosen = [name for name in (text, text_pair, label) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{source}: text, text_pair and label must be different columns; found: {', '.join(chosen)}")
    return Columns(text, text_pair, label)


def make_example(
    row: dict[str, Any], columns: Columns, require_label: bool, where: str, separator: str | None = None
) -> Example | None:
    """One row as an example, or None if a text of it is empty. Raises UserError for a row that lacks text or label.

    separator: of the labels in one cell, of which there may be none; lists of labels, as JSON has them, are joined by it.
    """
    text = _text(row, columns.text, where)
    pair = None if columns.text_pair is None else _text(row, columns.text_pair, where)
    label = None if columns.label is None else _label(row.get(columns.label), columns.label, where, separator)
    if label is None and require_label:
        raise UserError(f"{where}: no label in column {columns.label!r}")
    return None if text == "" or pair == "" else Example(text, pair, label, where)


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise UserError(f"{where}: no {column!r}; found: {listed(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: {column}: {repr(value)[:80]} found where text is needed")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise UserError(f"{where}: {column}: {repr(value)[:80]} is not valid Unicode") from None
    return value.strip()


def _label(value: Any, column: str, where: str, separator: str | None) -> str | None:
    if separator is not None and isinstance(value, list):
        return separator.join(_one_of_several(part, column, where, separator) for part in value)
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: {column}: {repr(value)[:80]} found where one label is needed")
    if value is None:
        return None
    label = (value if isinstance(value, str) else json.dumps(value)).strip()
    return label if label or separator is not None else None


def _one_of_several(value: Any, column: str, where: str, separator: str) -> str:
    if not isinstance(value, str) or separator in value or not value.strip():
        raise UserError(
            f"{where}: {column}: {repr(value)[:80]} found where a label without {separator!r} is needed (Data.separator)"
        )
    return value


def listed(names: Iterable[str]) -> str:
    """Column names for a message."""
    return ", ".join(map(repr, names)) or "none"
