"""Scores of anything the project makes: a run, a model folder, an artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import artifact, run_folder
from .config import Data
from .data.dataset import Split, load_eval_split
from .errors import UserError
from .evaluate import logits_of
from .tasks import Task
from .tokenizer import load_tokenizer


def evaluate_any(model: str | Path, data: str | Path, columns: Data) -> dict[str, Any]:
    """{model, kind, data, rows, and the task's scores (metrics.py)} of `model` on a labelled file or folder.

    columns: names of the columns, if odd.
    Raises UserError if the folder is none of the three kinds, or the rows have no labels.
    """
    if artifact.is_artifact(model) or Path(model).is_file():
        kind, logits, split, task, labels = "artifact", *_artifact_logits(Path(model), Path(data), columns)
    elif Path(model).is_dir():
        kind, logits, split, task, labels = _model_logits(Path(model), Path(data), columns)
    else:
        raise UserError(f"{model}: no such run, model folder or artifact")
    if split.labels is None:
        raise UserError(f"{data}: the rows have no labels to compare with")
    return {
        "model": str(model),
        "kind": kind,
        "data": str(data),
        "rows": len(split),
        **task.scores(logits, split, labels),
    }


def _artifact_logits(model: Path, data: Path, columns: Data) -> tuple[np.ndarray, Split, Task, list[str]]:
    from .predictor import Predictor

    predictor = Predictor(model)
    split = _split(data, predictor.tokenizer, predictor.labels, predictor.max_length, columns, predictor.task)
    logits = predictor.logits(list(zip(split.input_ids, split.token_type_ids)))
    return logits, split, predictor.task, predictor.labels


def _model_logits(model: Path, data: Path, columns: Data) -> tuple[str, np.ndarray, Split, Task, list[str]]:
    from .restore import restore_folder, restore_run

    is_run = run_folder.is_run(model)
    restored = restore_run(model) if is_run else restore_folder(model, columns)
    names = replace(
        columns, text=columns.text or restored.data.text, text_pair=columns.text_pair or restored.data.text_pair
    )
    task, length = restored.task, restored.data.max_length
    split = _split(data, load_tokenizer(restored.vocabulary), restored.labels, length, names, task)
    logits = logits_of(restored.model, split, restored.pad_token_id)
    return "run" if is_run else "fp32 model", logits, split, task, restored.labels


def _split(data: Path, tokenizer, labels: list[str], max_length: int, columns: Data, task: Task) -> Split:
    return load_eval_split(
        data, tokenizer, labels, max_length, columns.text, columns.text_pair, columns.label, task=task
    )
