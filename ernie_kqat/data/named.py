"""PaddleNLP's own data sets by name, as `glue/sst-2` or `chnsenticorp`."""

from __future__ import annotations

import itertools
import logging
import pkgutil
from dataclasses import dataclass
from typing import Any

from ..config import Data
from ..errors import UserError
from .readers import Example, choose_columns, make_example

log = logging.getLogger(__name__)

NOT_DATASETS = ("dataset", "hf_datasets", "intokens_dataset")


@dataclass(frozen=True)
class NamedSplit:
    """Rows of one split, with the data set's own label names in order of their ids (None if it has none)."""

    examples: list[Example]
    labels: list[str] | None


def load_named(data: Data, split: str, rows: int | None = None) -> NamedSplit:
    """One split of `data.name`, its first `rows` rows. PaddleNLP downloads it once and keeps it.

    Raises UserError for a name or split that PaddleNLP does not have, and when the download fails.
    """
    name = data.name or ""
    dataset = _load(name, split)
    first = dataset[0]
    names = [column for column in first if isinstance(first[column], (str, int, float))]
    columns = choose_columns(names, data.text, data.text_pair, data.label, True, f"Data.name: {name}")
    label_names = None if dataset.label_list is None else [str(label) for label in dataset.label_list]
    examples = []
    for index, row in enumerate(itertools.islice(dataset, rows)):
        label = row.get(columns.label)
        if label_names and isinstance(label, int):
            row = {**row, columns.label: label_names[label]}
        example = make_example(row, columns, True, f"{name} {split}[{index}]")
        if example is not None:
            examples.append(example)
    return NamedSplit(examples, label_names)


def _load(name: str, split: str) -> Any:
    from paddlenlp import datasets
    from paddlenlp.utils.env import DATA_HOME

    module, _, part = name.partition("/")
    known = sorted({item.name for item in pkgutil.iter_modules(datasets.__path__)}.difference(NOT_DATASETS))
    if module not in known:  # where PaddleNLP would go on to look for code to run on a model hub
        raise UserError(f"Data.name: {name!r} is not one of PaddleNLP's data sets: {', '.join(known)}")
    log.info("loading %s %s through PaddleNLP", name, split)
    try:
        return datasets.load_dataset(module, name=part or None, splits=split, lazy=False)
    except ValueError as error:
        raise UserError(f"Data.name: {name}: {error} Data.train and Data.dev name the splits.") from None
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"Data.name: {name} is not in {DATA_HOME} and could not be downloaded ({error}). Either run this once "
            "where the network can be reached, or have train and dev files in a folder and give -o Data.path=DIR"
        ) from None
