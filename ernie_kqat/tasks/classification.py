"""One label a row: SST-2, CoLA, MRPC, QQP, RTE, MNLI, ChnSentiCorp, TNEWS and the like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import metrics
from ..errors import UserError
from . import Task

MAX_FOUND_LABELS = 1000


@dataclass(frozen=True)
class Prediction:
    """The answer for one text: the likeliest label, its probability (softmax of the logits), and all logits."""

    label: str
    score: float
    logits: list[float]

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"label": self.label, "score": round(self.score, 6)}


@dataclass(frozen=True)
class Classification(Task):
    metrics = metrics.NAMES

    def labels_in(self, example):
        return (str(example.label),)

    def outputs(self, known, found):
        return _two_or_more(known, "Data.labels") if known else _sorted_labels(found)

    def targets(self, examples, labels, numbers_are_ids):
        """Label ids, int64 [rows]. With `numbers_are_ids`, a file may have 0..n-1 where the labels have names."""
        ids = {label: index for index, label in enumerate(labels)}
        if numbers_are_ids and not any(re.fullmatch(r"-?[0-9]+", label) for label in labels):
            ids.update({str(index): index for index in range(len(labels))})
        for example in examples:
            if example.label not in ids:
                found = "no label" if example.label is None else f"label {example.label!r}"
                raise UserError(f"{example.where}: {found} found where one of {listed(labels)} is needed")
        return np.array([ids[str(example.label)] for example in examples], np.int64)

    def loss(self, logits, labels):
        """Cross-entropy."""
        import paddle.nn.functional as F

        return F.cross_entropy(logits, labels)

    def metric(self, chosen, labels):
        metrics.check(chosen or "", len(labels))
        return super().metric(chosen, labels)

    def scores(self, logits, split, labels):
        return metrics.scores(logits, split.labels)

    def agreement(self, found, reference, split):
        """Share of rows with the same likeliest label."""
        return float(np.mean(found.argmax(axis=1) == reference.argmax(axis=1)))

    def answers(self, logits, rows, labels):
        return [
            Prediction(labels[score.argmax()], float(score.max()), row.tolist())
            for score, row in zip(softmax(logits), logits)
        ]

    def served(self, logits, labels):
        exact = logits.astype(np.float64)
        best = exact.argmax(axis=1)
        scores = 1 / np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1)
        return [(labels[label], score) for label, score in zip(best.tolist(), scores.tolist())]


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [rows, classes], over the classes."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=1, keepdims=True)


def listed(labels: Sequence[str]) -> str:
    """Labels for a message, the first 20."""
    return ", ".join(labels[:20]) + (f", … ({len(labels)})" if len(labels) > 20 else "")


def _sorted_labels(found: Iterable[str]) -> list[str]:
    """By value where all are whole numbers, by name otherwise."""
    labels = sorted(found)
    if len(labels) > MAX_FOUND_LABELS:
        raise UserError(f"train: {len(labels)} labels ({listed(labels)}); is Data.label the right column?")
    if all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        labels.sort(key=int)
    return _two_or_more(labels, "labels of train")


def _two_or_more(labels: Sequence[str], source: str) -> list[str]:
    if len(set(labels)) < max(len(labels), 2):
        raise UserError(f"{source}: {listed(labels)} found where two or more different labels are needed")
    return list(labels)
