"""Lines of text -> answers of a running service, a window of lines in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import UserError
from .client import ROWS_PER_REQUEST, Client, Prediction, Refused, Unauthorized

Answer = dict[str, Any]
Row = tuple[str, ...]  # a text, or a text and its pair


def answer_lines(
    client: Client, lines: Iterable[bytes], model: str = "default", logits: bool = False
) -> Iterator[list[Answer]]:
    """The answers to each window of lines, one a line and in order.

    A line is UTF-8 text, or two texts with a tab between them; the first line says which. An answer is {text, label, score},
    with `pair` and `logits` where they apply; for a line that has none {line: its number from 1, error: why}.
    """
    numbered = enumerate(lines, 1)
    columns = 0
    while chunk := list(itertools.islice(numbered, client.connections * ROWS_PER_REQUEST)):
        rows: dict[int, Row] = {}
        errors: dict[int, str] = {}
        for number, line in chunk:
            try:
                rows[number] = _parse(line, number, columns)
                columns = len(rows[number])
            except UserError as error:
                errors[number] = str(error)
        found = _predict(client, rows, model, logits)
        yield [
            {"line": number, "error": errors[number]}
            if number in errors
            else _answer(number, rows[number], found[number])
            for number, _ in chunk
        ]


def _predict(client: Client, rows: dict[int, Row], model: str, logits: bool) -> dict[int, Prediction | Refused]:
    """By line. One line that the service refuses makes it refuse the request: then each line is asked for alone."""
    texts = [row[0] for row in rows.values()]
    pairs = [row[1] for row in rows.values() if len(row) > 1]
    try:
        return dict(zip(rows, client.predict(texts, pairs or None, model, logits)))
    except Unauthorized:
        raise
    except Refused as error:
        if len(rows) == 1:
            return dict.fromkeys(rows, error)
    return {number: _predict(client, {number: row}, model, logits)[number] for number, row in rows.items()}


def _answer(number: int, row: Row, found: Prediction | Refused) -> Answer:
    if isinstance(found, Refused):
        return {"line": number, "error": found.message}
    answer = {**dict(zip(("text", "pair"), row)), "label": found.label, "score": round(found.score, 6)}
    return answer if found.logits is None else {**answer, "logits": found.logits}


def _parse(line: bytes, number: int, columns: int) -> Row:
    try:
        row = tuple(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8").split("\t"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    if len(row) > 2 or (columns and len(row) != columns):
        raise UserError(f"{len(row)} columns between tabs where {columns or 'one or two'} are taken")
    return row
