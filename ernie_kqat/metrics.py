"""The metrics of GLUE's and CLUE's classification tasks, by scikit-learn."""

from __future__ import annotations

import numpy as np

from .errors import UserError

NAMES = ("accuracy", "macro_f1", "matthews", "f1")


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """By name, of logits [rows, classes] and label ids [rows]:

    accuracy   share of rows whose largest logit is the label's
    macro_f1   F1 of each class against all others, averaged over the classes that occur
    matthews   Matthews' correlation (CoLA's metric), in -1..1; 0 where all rows get one class
    f1         F1 of the second class (MRPC's and QQP's metric); of two classes only
    """
    from sklearn.metrics import f1_score, matthews_corrcoef  # a second to load: not at import

    found = logits.argmax(axis=1)
    values = {
        "accuracy": float(np.mean(found == labels)),
        "macro_f1": float(f1_score(labels, found, average="macro", zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, found)),
    }
    if logits.shape[1] == 2:
        values["f1"] = float(f1_score(labels, found, pos_label=1, zero_division=0.0))
    return values


def check(name: str, classes: int) -> None:
    """UserError where metric `name` does not go with the number of classes."""
    if name == "f1" and classes != 2:
        raise UserError(f"Train.metric: f1: it is of two classes, and there are {classes} labels; say macro_f1")
