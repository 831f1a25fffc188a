"""Task data: which rows, which labels, as token ids."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Data
from ..errors import UserError
from ..tokenizer import Tokenizer
from .named import load_named
from .readers import Example, ExampleReader
from .tokenized import Split, tokenize

__all__ = ["Split", "TaskData", "load_eval_split", "load_task_data"]

SUFFIXES = (".tsv", ".csv", ".jsonl")
MAX_FOUND_LABELS = 1000


@dataclass(frozen=True, eq=False)
class TaskData:
    """A classification task; label id i is `labels[i]`, `pair` says whether rows have a second sentence."""

    train: Split
    dev: Split
    labels: list[str]
    pair: bool


def load_task_data(
    data: Data, tokenizer: Tokenizer, seed: int, cache_dir: str | Path | None = None, need_train: bool = True
) -> TaskData:
    """Read and tokenize `data`. Without `need_train`, `train` has no rows, and is read only if the labels need it.

    The labels are `data.labels`, else the named data set's own, else those of the whole train file: by value where all
    are whole numbers, by name otherwise. `data.train_rows` takes a random subset that depends on `seed` alone.
    Raises UserError for data that cannot be read, a dev label that train does not have, or a task of one label.
    """
    dev_rows, own_labels = _open(data, "dev", data.dev_rows)
    known = data.labels or own_labels
    train: list[Example] = []
    found: Iterable[str] = ()
    if need_train or not known:
        train_rows, _ = _open(data, "train", None)
        train, found = _sample(train_rows, data.train_rows if need_train else 0, seed)
    labels = _two_or_more(known, "Data.labels") if known else _sorted_labels(found)
    dev = list(itertools.islice(dev_rows, data.dev_rows))
    pair = dev[0].text_pair is not None
    if train and (train[0].text_pair is not None) != pair:
        raise UserError(f"{train[0].where} and {dev[0].where}: only one of them has a second sentence")

    def split(examples: list[Example], name: str) -> Split:
        ids = _label_ids(examples, labels, numbers_are_ids=bool(known))
        return tokenize(examples, ids, tokenizer, data.max_length, name, cache_dir)

    return TaskData(split(train, "train"), split(dev, "dev"), labels, pair)


def load_eval_split(
    path: str | Path,
    tokenizer: Tokenizer,
    labels: Sequence[str] | None,
    max_length: int,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    rows: int | None = None,
    pair: bool | None = None,
    cache_dir: str | Path | None = None,
) -> Split:
    """The rows of one file, or of the dev file of a folder; a .txt file is a sentence a line.

    The split has labels if the file has and `labels` is given. `rows` takes the first so many. `pair` says whether rows
    must or must not have a second sentence. Raises UserError as `load_task_data` does.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = find_file(path, "dev", None)
    examples = list(itertools.islice(ExampleReader(path, text, text_pair, label, require_label=False), rows))
    if pair is not None and (examples[0].text_pair is not None) != pair:
        raise UserError(f"{path}: {'one sentence' if pair else 'two sentences'} a row; the task takes {1 + pair}")
    ids = None
    if labels is not None and any(example.label is not None for example in examples):
        ids = _label_ids(examples, labels, numbers_are_ids=True)
    return tokenize(examples, ids, tokenizer, max_length, path.name, cache_dir)


def _open(data: Data, split: str, rows: int | None) -> tuple[Iterable[Example], list[str] | None]:
    """The examples of "train" or "dev", and the data set's own labels if it has any."""
    chosen = getattr(data, split)
    if data.path is not None:
        path = find_file(Path(data.path).expanduser(), split, chosen)
        return ExampleReader(path, data.text, data.text_pair, data.label), None
    if data.name is not None:
        named = load_named(data, chosen or split, rows)
        return named.examples, named.labels
    raise UserError("Data: no path and no name; -o Data.path=DIR (with train and dev files) or -o Data.name=glue/sst-2")


def find_file(folder: Path, split: str, name: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (Data.path)")
    if name is not None:
        return folder / name
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder}: {' and '.join(path.name for path in found)} are there; say which with Data.{split}")
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UserError(f"{folder}: no {split}.tsv, .csv or .jsonl (Data.{split} can name another file); found: {there}")


def _sample(examples: Iterable[Example], rows: int | None, seed: int) -> tuple[list[Example], set[str]]:
    """A uniform random subset in file order (all examples if `rows` is None), and the labels of all.

    One pass with `rows` examples in memory, however long the file is (reservoir sampling).
    """
    kept: list[tuple[int, Example]] = []
    found = set()
    rng = random.Random(seed)
    for index, example in enumerate(examples):
        found.add(str(example.label))
        if rows is None or index < rows:
            kept.append((index, example))
            continue
        place = rng.randrange(index + 1)
        if place < rows:
            kept[place] = (index, example)
    return [example for _, example in sorted(kept, key=lambda item: item[0])], found


def _sorted_labels(found: Iterable[str]) -> list[str]:
    labels = sorted(found)
    if len(labels) > MAX_FOUND_LABELS:
        raise UserError(f"train: {len(labels)} labels ({_listed(labels)}); is Data.label the right column?")
    if all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        labels.sort(key=int)
    return _two_or_more(labels, "labels of train")


def _two_or_more(labels: Sequence[str], source: str) -> list[str]:
    if len(set(labels)) < max(len(labels), 2):
        raise UserError(f"{source}: {_listed(labels)} found where two or more different labels are needed")
    return list(labels)


def _label_ids(examples: Sequence[Example], labels: Sequence[str], numbers_are_ids: bool) -> np.ndarray:
    """int64 [rows]. With `numbers_are_ids`, a file may have 0..n-1 where the labels have names."""
    ids = {label: index for index, label in enumerate(labels)}
    if numbers_are_ids and not any(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        ids.update({str(index): index for index in range(len(labels))})
    for example in examples:
        if example.label not in ids:
            found = "no label" if example.label is None else f"label {example.label!r}"
            raise UserError(f"{example.where}: {found} found where one of {_listed(labels)} is needed")
    return np.array([ids[str(example.label)] for example in examples], np.int64)


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:20]) + (f", … ({len(labels)})" if len(labels) > 20 else "")
