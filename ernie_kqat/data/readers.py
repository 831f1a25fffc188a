"""Rows of .tsv, .csv, .jsonl and .txt files, read a line at a time; whatever is wrong is named by file and line."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..errors import UserError
from .columns import LABEL_COLUMNS, TEXT_COLUMNS, Example, choose_columns, listed, make_example

__all__ = ["Example", "ExampleReader", "read_examples"]

HEADERLESS = {1: ("text",), 2: ("text", "label"), 3: ("text", "text_pair", "label")}
MAX_LINE_BYTES = 1 << 24

log = logging.getLogger(__name__)


class ExampleReader:
    """The examples of one file, in its order, with one row in memory at a time.

    `.tsv` is GLUE's: quotes are text; without a header line (only where no column is named) the columns are text, label
    or text, pair, label. `.csv` has quoting and a header line, `.jsonl` an object a line, `.txt` a sentence a line.
    `text`, `text_pair` and `label` name columns. Where `text` is not named it is found by `TEXT_COLUMNS` with its
    pair, and the label by `LABEL_COLUMNS`. `separator` is given where a row has any number of labels (`make_example`).

    Blank lines and rows with an empty text are left out; `blank_lines` and `empty_texts` count them after iteration.
    Raises UserError, with file and line, for whatever else cannot be read as it is meant, and for a file without rows.
    """

    def __init__(
        self,
        path: str | Path,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        require_label: bool = True,
        separator: str | None = None,
    ):
        self.path = Path(path)
        self.separator = separator
        self.named = (text, text_pair, label)
        self.require_label = require_label
        self.blank_lines = 0
        self.empty_texts = 0
        if not self.path.is_file():
            raise UserError(f"{path}: {'is a folder; a file is needed' if self.path.is_dir() else 'no such file'}")
        if self.path.suffix not in _FORMATS:
            raise UserError(f"{path}: suffix {self.path.suffix!r} is not one of {', '.join(_FORMATS)}")

    def __iter__(self) -> Iterator[Example]:
        self.blank_lines = self.empty_texts = 0
        names, rows = _FORMATS[self.path.suffix](self)
        columns = choose_columns(names, *self.named, self.require_label, str(self.path))
        any_example = False
        for number, row in rows:
            example = make_example(row, columns, self.require_label, f"{self.path}:{number}", self.separator)
            if example is None:
                self.empty_texts += 1
            else:
                any_example = True
                yield example
        if not any_example:
            raise UserError(f"{self.path}: no rows (blank: {self.blank_lines}, with an empty text: {self.empty_texts})")
        if self.empty_texts:
            log.warning("%s: %d rows with an empty text left out", self.path, self.empty_texts)


def read_examples(
    path: str | Path,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    require_label: bool = True,
) -> list[Example]:
    """All examples of a file; `ExampleReader` says how it is read."""
    return list(ExampleReader(path, text, text_pair, label, require_label))


_Item = TypeVar("_Item")
_Rows = Iterator[tuple[int, dict[str, Any]]]  # line number and row
_Table = tuple[Sequence[str], _Rows]  # column names and rows


def _read_tsv(reader: ExampleReader) -> _Table:
    lines = _not_blank(reader)
    number, line = _first(reader, lines)
    header = line.split("\t")
    cells = ((number, line.split("\t")) for number, line in lines)
    if any(reader.named) or _is_header(header):
        return _with_header(reader, header, cells)
    names = HEADERLESS.get(len(header), ())
    if not names or (reader.require_label and "label" not in names):
        raise UserError(
            f"{reader.path}:{number}: {len(header)} columns and no known column name in the first line "
            f"({line[:80]!r}); a header is needed, or text, label or text, pair, label"
        )
    return names, _refuse_unknown_header(reader, _rows(reader, names, itertools.chain([(number, header)], cells)))


def _read_csv(reader: ExampleReader) -> _Table:
    cells = _csv_cells(reader)
    _, header = _first(reader, cells)
    if not any(reader.named) and not _is_header(header):
        raise UserError(f"{reader.path}: no column of text is known among {listed(header)}; name it with Data.text")
    return _with_header(reader, header, cells)


def _read_jsonl(reader: ExampleReader) -> _Table:
    rows = _objects(reader.path, _not_blank(reader))
    first = _first(reader, rows)
    names = dict.fromkeys([*first[1], *(name for name in reader.named if name)])  # a named key is checked row by row
    return list(names), itertools.chain([first], rows)


def _read_txt(reader: ExampleReader) -> _Table:
    if reader.require_label:
        raise UserError(f"{reader.path}: a .txt file has no labels; .tsv, .csv or .jsonl is needed")
    return ("text",), ((number, {"text": line}) for number, line in _not_blank(reader))


_FORMATS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".txt": _read_txt}


def _first(reader: ExampleReader, rows: Iterator[_Item]) -> _Item:
    for row in rows:
        return row
    raise UserError(f"{reader.path}: no rows (blank: {reader.blank_lines})")


def _is_header(cells: Sequence[str]) -> bool:
    known = {name for pair in TEXT_COLUMNS for name in pair}.union(LABEL_COLUMNS)
    return any(cell.strip().lower() in known for cell in cells)


def _with_header(reader: ExampleReader, header: Sequence[str], cells: Iterator[tuple[int, list[str]]]) -> _Table:
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise UserError(f"{reader.path}: column {', '.join(map(repr, twice))} is there more than once")
    return names, _rows(reader, names, cells)


def _rows(reader: ExampleReader, names: Sequence[str], cells: Iterable[tuple[int, list[str]]]) -> _Rows:
    for number, row in cells:
        if len(row) != len(names):
            where = f"{reader.path}:{number}"
            raise UserError(f"{where}: {len(row)} columns found where {len(names)} are needed: {listed(names)}")
        yield number, dict(zip(names, row))


def _refuse_unknown_header(reader: ExampleReader, rows: _Rows) -> _Rows:
    """Pass rows through; a header of unknown names, read as a row, shows by a label that no other row has."""
    first, count, again = None, 0, False
    for number, row in rows:
        label = row.get("label", "").strip()
        again = again or (count > 0 and label == first)
        first = label if count == 0 else first
        count += 1
        yield number, row
    if first and not again and count > 10:  # fewer rows prove nothing
        raise UserError(
            f"{reader.path}:1: label {first!r} is in no other row: if this line is a header, name its columns with "
            "Data.text and Data.label; if it is not, put the line `text<TAB>label` before it"
        )


def _csv_cells(reader: ExampleReader) -> Iterator[tuple[int, list[str]]]:
    parser = csv.reader((line + "\n" for line in lines_of(reader.path)), strict=True)
    while True:
        number = parser.line_num + 1
        try:
            cells = next(parser, None)
        except csv.Error as error:
            raise UserError(f"{reader.path}:{number}: not valid CSV: {error} (is a quote left open?)") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield number, cells
        else:
            reader.blank_lines += 1


def json_rows(path: Path) -> _Rows:
    """(line number, object) of each line of a JSONL file that is not blank."""
    return _objects(path, ((number, line) for number, line in enumerate(lines_of(path), 1) if line.strip()))


def _objects(path: Path, lines: Iterable[tuple[int, str]]) -> _Rows:
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: {type(row).__name__} found where an object is needed")
        yield number, row


def _not_blank(reader: ExampleReader) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines_of(reader.path), 1):
        if line.strip():
            yield number, line
        else:
            reader.blank_lines += 1


def lines_of(path: Path) -> Iterator[str]:
    """Lines without their ends, split at newlines only: U+2028 and the like are text."""
    size, what = path.stat().st_size, f"reading {path.name}"
    with open(path, "rb") as file, tqdm(total=size, desc=what, unit="B", unit_scale=True, delay=2, disable=None) as bar:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            bar.update(len(raw))
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: a line of over {MAX_LINE_BYTES} bytes; a row a line is needed")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 ({error.reason}, byte {error.start} of the line)"
                ) from None
            if "\0" in line:
                raise UserError(f"{path}:{number}: a NUL character; UTF-8 text is needed")
            yield line.rstrip("\r\n")
