"""Task data: which rows, which labels, as token ids."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import tasks
from ..config import Data
from ..errors import UserError
from ..tasks import Task
from ..tokenizer import Tokenizer
from .named import load_named
from .readers import Example
from .tokenized import Split

__all__ = ["Split", "TaskData", "load_eval_split", "load_task_data"]


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's rows; output i of the model is `labels[i]`, `pair` says whether rows have a second text."""

    task: Task
    train: Split
    dev: Split
    labels: list[str]
    pair: bool


def load_task_data(
    data: Data, tokenizer: Tokenizer, seed: int, cache_dir: str | Path | None = None, need_train: bool = True
) -> TaskData:
    """Read and tokenize `data`. Without `need_train`, `train` has no rows, and is read only if the labels need it.

    The labels are `data.labels`, else the named data set's own, else those of the whole train file, as the task orders them.
    `data.train_rows` takes a random subset that depends on `seed` alone.
    Raises UserError for data that cannot be read, a dev label that train does not have, or a classification of one label.
    """
    task = tasks.of_data(data)
    dev_rows, own_labels = _open(task, data, "dev", data.dev_rows)
    known = data.labels or own_labels
    train: list[Example] = []
    found: Iterable[str] = ()
    if need_train or not known:
        train_rows, _ = _open(task, data, "train", None)
        train, found = _sample(task, train_rows, data.train_rows if need_train else 0, seed)
    labels = task.outputs(known, found)
    dev = list(itertools.islice(dev_rows, data.dev_rows))
    pair = dev[0].text_pair is not None
    if train and (train[0].text_pair is not None) != pair:
        raise UserError(f"{train[0].where} and {dev[0].where}: only one of them has a second sentence")

    def split(examples: list[Example], name: str) -> Split:
        return task.split(examples, labels, tokenizer, data.max_length, name, cache_dir, numbers_are_ids=bool(known))

    return TaskData(task, split(train, "train"), split(dev, "dev"), labels, pair)


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
    task: Task | None = None,
) -> Split:
    """The rows of one file, or of the dev file of a folder, for `task` (default: classification).

    The split has labels if the file has and `labels` is given. `rows` takes the first so many. `pair` says whether rows
    must or must not have a second sentence. Raises UserError as `load_task_data` does.
    """
    task = task or tasks.find("classification")()
    path = Path(path).expanduser()
    if path.is_dir():
        path = find_file(path, "dev", None, task.suffixes)
    examples = list(itertools.islice(task.read(path, text, text_pair, label, require_label=False), rows))
    if pair is not None and (examples[0].text_pair is not None) != pair:
        raise UserError(f"{path}: {'one sentence' if pair else 'two sentences'} a row; the task takes {1 + pair}")
    labelled = any(example.label is not None for example in examples)
    return task.split(examples, labels if labelled else None, tokenizer, max_length, path.name, cache_dir)


def _open(task: Task, data: Data, split: str, rows: int | None) -> tuple[Iterable[Example], list[str] | None]:
    """The examples of "train" or "dev", and the data set's own labels if it has any."""
    chosen = getattr(data, split)
    if data.path is not None:
        path = find_file(Path(data.path).expanduser(), split, chosen, task.suffixes)
        return task.read(path, data.text, data.text_pair, data.label, require_label=True), None
    if data.name is not None and not task.named:
        raise UserError(f"Data.name: {data.name}: for Data.task {tasks.kind(task)} say -o Data.path=DIR")
    if data.name is not None:
        named = load_named(data, chosen or split, rows)
        return named.examples, named.labels
    raise UserError("Data: no path and no name; -o Data.path=DIR (with train and dev files) or -o Data.name=glue/sst-2")


def find_file(folder: Path, split: str, name: str | None, suffixes: Sequence[str] = tasks.Task.suffixes) -> Path:
    """The file `name` of a folder, or else its one file called `split`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (Data.path)")
    if name is not None:
        return folder / name
    found = [folder / f"{split}{suffix}" for suffix in suffixes if (folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder}: {' and '.join(path.name for path in found)} are there; say which with Data.{split}")
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    wanted = " or ".join([", ".join([f"{split}{suffixes[0]}", *suffixes[1:-1]]), *suffixes[1:][-1:]])
    raise UserError(f"{folder}: no {wanted} (Data.{split} can name another file); found: {there}")


def _sample(task: Task, examples: Iterable[Example], rows: int | None, seed: int) -> tuple[list[Example], set[str]]:
    """A uniform random subset in file order (all examples if `rows` is None), and the labels of all.

    One pass with `rows` examples in memory, however long the file is (reservoir sampling).
    """
    kept: list[tuple[int, Example]] = []
    found: set[str] = set()
    rng = random.Random(seed)
    for index, example in enumerate(examples):
        found.update(task.labels_in(example))
        if rows is None or index < rows:
            kept.append((index, example))
            continue
        place = rng.randrange(index + 1)
        if place < rows:
            kept[place] = (index, example)
    return [example for _, example in sorted(kept, key=lambda item: item[0])], found
