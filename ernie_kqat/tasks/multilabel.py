"""Any number of labels a row, each judged by itself: a label column as `travel|food`, which may be empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import metrics
from ..errors import UserError
from . import Task
from .classification import MAX_FOUND_LABELS, listed


@dataclass(frozen=True)
class LabelSet:
    """The answer for one text: every label of a probability over 1/2, and the probability of each label there is."""

    labels: list[str]
    scores: dict[str, float]
    logits: list[float]

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"labels": self.labels, "scores": {name: round(score, 6) for name, score in self.scores.items()}}


@dataclass(frozen=True)
class MultiLabel(Task):
    separator: str = "|"

    problem = "multi_label_classification"
    metrics = ("micro_f1", "macro_f1", "exact_match")

    def __post_init__(self):
        if not self.separator.strip():
            raise UserError(f"Data.separator: {self.separator!r} is no sign between labels")

    def read(self, path, text, text_pair, label, require_label):
        from ..data.readers import ExampleReader

        return ExampleReader(path, text, text_pair, label, require_label, self.separator)

    def labels_in(self, example):
        return self._parts(example)

    def outputs(self, known, found):
        labels = list(known or sorted(found))
        if not labels or len(set(labels)) < len(labels) or len(labels) > MAX_FOUND_LABELS:
            source = "Data.labels" if known else "labels of train"
            raise UserError(f"{source}: {listed(labels) or 'none'} found where different labels are needed")
        return labels

    def targets(self, examples, labels, numbers_are_ids):
        """1 where a row has the label, else 0: float32 [rows, labels]."""
        ids = {label: index for index, label in enumerate(labels)}
        targets = np.zeros((len(examples), len(labels)), np.float32)
        for row, example in enumerate(examples):
            if example.label is None:
                raise UserError(
                    f"{example.where}: no labels found where {listed(labels)} or an empty cell are possible"
                )
            for part in self._parts(example):
                if part not in ids:
                    raise UserError(
                        f"{example.where}: label {part!r} found where some of {listed(labels)} are possible"
                    )
                targets[row, ids[part]] = 1
        return targets

    def _parts(self, example: Any) -> list[str]:
        parts = [part.strip() for part in (example.label or "").split(self.separator)]
        if parts == [""]:
            return []
        if "" in parts or len(set(parts)) < len(parts):
            raise UserError(f"{example.where}: labels {example.label!r}: one of them is empty or there twice")
        return parts

    def loss(self, logits, labels):
        """Binary cross-entropy of each label, mean over rows and labels."""
        import paddle.nn.functional as F

        return F.binary_cross_entropy_with_logits(logits, labels)

    def choices(self, logits, real):
        """Each label against its absence, [rows x labels, 2]: softmax of (0, x) is the sigmoid of x."""
        import paddle

        flat = logits.reshape([-1])
        return paddle.stack([paddle.zeros_like(flat), flat], axis=1)

    def margins(self, logits, real):
        """The logits' sizes: the other side of each choice has 0."""
        return logits.abs().reshape([-1])

    def scores(self, logits, split, labels):
        return metrics.of_sets(logits > 0, split.labels > 0)

    def agreement(self, found, reference, split):
        """Share of rows with exactly the same labels."""
        return float(np.mean(((found > 0) == (reference > 0)).all(axis=1)))

    def answers(self, logits, rows, labels):
        return [
            LabelSet(
                [label for label, logit in zip(labels, row) if logit > 0],
                dict(zip(labels, sigmoid(row).tolist())),
                row.tolist(),
            )
            for row in logits
        ]

    def served(self, logits, labels):
        """The labels joined by the separator, and the probability of exactly this set: the product of each label's."""
        joined = [self.separator.join(label for label, logit in zip(labels, row) if logit > 0) for row in logits]
        return list(zip(joined, sigmoid(np.abs(logits)).prod(axis=1).tolist()))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """float64, of the same shape."""
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
