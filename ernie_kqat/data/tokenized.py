"""Examples -> token ids, once: what was tokenized before is read from a cache folder."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import files
from ..home import home
from ..tokenizer import Tokenizer
from .batching import UNLABELLED
from .readers import Example

FORMAT = 1
CHUNK_ROWS = 1000

# What NumPy and zipfile raise at arbitrary bytes.
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """Tokenized rows: ids and segments as one int32 and one int8 array [tokens] a row.

    `labels` are what the task's loss is given: an array [rows, …], or an array [tokens] a row, or None. `pairs` is None for
    single sentences; `truncated` counts the rows that were cut to the maximal length. `sources`: what a task needs besides to
    judge its answers (tasks/tokens.py, tasks/qa.py).
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray]
    labels: Any
    texts: list[str]
    pairs: list[str] | None
    truncated: int
    name: str
    sources: Any = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> np.ndarray:
        """Over how many targets the task's loss takes its mean in each row: its labelled tokens, or 1."""
        if isinstance(self.labels, list):
            return np.array([np.count_nonzero(row != UNLABELLED) for row in self.labels])
        return np.ones(len(self), int)


@dataclass(frozen=True)
class _Tokens:
    """The rows of a split end to end, as cached: row r has `length[r]` tokens, `first[r]` of them in segment 0."""

    ids: np.ndarray
    length: np.ndarray
    first: np.ndarray
    truncated: np.ndarray  # scalar


def tokenize(
    examples: Sequence[Example],
    labels: np.ndarray | None,
    tokenizer: Tokenizer,
    max_length: int,
    name: str,
    cache_dir: str | Path | None = None,
) -> Split:
    """Tokenize, or read what the same tokenizer made of the same texts before.

    `cache_dir` defaults to $ERNIE_KQAT_HOME/tokenized. A cache that cannot be read or written only costs time: the log
    says so.
    """
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples if example.text_pair is not None] or None
    if not examples:
        return Split([], [], labels, texts, pairs, 0, name)
    path = Path(cache_dir or home() / "tokenized") / f"{_key(texts, pairs, tokenizer, max_length)}.npz"
    tokens = _read_cache(path, len(texts), tokenizer.vocab_size, max_length)
    if tokens is None:
        tokens = _run(texts, pairs, tokenizer, max_length, name)
        _write_cache(path, tokens)
    ends = np.cumsum(tokens.length)[:-1]
    segments = np.stack([tokens.first, tokens.length - tokens.first], axis=1).ravel()
    types = np.repeat(np.tile(np.array([0, 1], np.int8), len(texts)), segments)
    return Split(np.split(tokens.ids, ends), np.split(types, ends), labels, texts, pairs, int(tokens.truncated), name)


def _key(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Tokenizer, max_length: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {max_length} {len(texts)} {pairs is not None}".encode())
    for text in [*texts, *(pairs or ())]:
        content = text.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _run(
    texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Tokenizer, max_length: int, name: str
) -> _Tokens:
    ids, length, first, truncated = [], [], [], 0
    with tqdm(total=len(texts), desc=f"tokenizing {name}", unit="row", delay=1, disable=None) as bar:
        for start in range(0, len(texts), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            encoded = tokenizer.encode(texts[rows], None if pairs is None else pairs[rows], max_length)
            ids.append(np.concatenate([np.asarray(row.input_ids, np.int32) for row in encoded]))
            length += [len(row.input_ids) for row in encoded]
            first += [row.token_type_ids.count(0) for row in encoded]
            truncated += sum(row.truncated for row in encoded)
            bar.update(len(encoded))
    return _Tokens(np.concatenate(ids), np.array(length, np.int32), np.array(first, np.int32), np.array(truncated))


def _read_cache(path: Path, rows: int, vocab_size: int, max_length: int) -> _Tokens | None:
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            tokens = _Tokens(**archive)
        sound = (
            len(tokens.length) == len(tokens.first) == rows
            and len(tokens.ids) == tokens.length.sum()
            and 0 <= tokens.ids.min() <= tokens.ids.max() < vocab_size
            and (tokens.first > 0).all()
            and (tokens.first <= tokens.length).all()
            and (tokens.length <= max_length).all()
        )
    except _UNREADABLE as error:
        log.warning("%s: unreadable cache file (%s); tokenizing again", path, error)
        return None
    if not sound:
        log.warning("%s: damaged cache file; tokenizing again", path)
        return None
    return tokens


def _write_cache(path: Path, tokens: _Tokens) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **vars(tokens))
    try:
        files.write_bytes(path, buffer.getvalue())
    except OSError as error:  # a read-only or full cache folder costs time at the next run, nothing else
        log.warning("%s: tokenized rows could not be cached: %s", path, error)
