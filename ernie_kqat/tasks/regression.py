"""One number a row: STS-B and the like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import metrics
from ..errors import UserError
from . import Task

# Answers count as equal within this share of their own standard deviation. An error that is normal and just within
# Export.max_rms_over_std (0.03) exceeds it once in 1,200 rows: what it refuses is a few rows that are far off, as an unequal
# label does in classification. On STS-B, whose labels have a std of 1.5, it is 0.15 of 0..5, less than the labels' step of 0.2.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Value:
    """The answer for one text: the number."""

    score: float
    logits: list[float]

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"score": round(self.score, 6)}


@dataclass(frozen=True)
class Regression(Task):
    problem = "regression"
    fixed = ("score",)
    metrics = ("pearson", "spearman")

    def targets(self, examples, labels, numbers_are_ids):
        """float32 [rows, 1]."""
        return np.array([[_number(example)] for example in examples], np.float32)

    def loss(self, logits, labels):
        """Mean squared error."""
        import paddle.nn.functional as F

        return F.mse_loss(logits, labels)

    def imitation(self, student, teacher, temperature, real):
        """Mean squared error: a number has no distribution, so there is no temperature."""
        return self.loss(student, teacher)

    def margins(self, logits, real):
        """The number itself."""
        return logits[:, 0]

    def scores(self, logits, split, labels):
        found, wanted = logits[:, 0].astype(np.float64), split.labels[:, 0].astype(np.float64)
        return {"pearson": metrics.pearson(found, wanted), "spearman": metrics.spearman(found, wanted)}

    def agreement(self, found, reference, split):
        """Share of rows whose numbers differ by at most TOLERANCE x std of the reference's numbers."""
        exact = reference.astype(np.float64)
        return float(np.mean(np.abs(found - exact) <= TOLERANCE * exact.std()))

    def answers(self, logits, rows, labels):
        return [Value(float(row[0]), row.tolist()) for row in logits]

    def served(self, logits, labels):
        return [(labels[0], value) for value in logits[:, 0].tolist()]


def _number(example: Any) -> float:
    try:
        value = float(example.label)
    except (TypeError, ValueError):  # None, and text
        value = math.nan
    if not math.isfinite(value):
        found = "no label" if example.label is None else f"label {example.label!r}"
        raise UserError(f"{example.where}: {found} found where a number is needed (Data.task: regression)")
    return value
