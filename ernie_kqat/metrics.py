"""The metrics of the tasks, as pure functions: scores of labels, numbers and sets of labels."""

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


def pearson(found: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's correlation of two float64 [rows], in -1..1; 0 where either is constant (STS-B's metric)."""
    a, b = found - found.mean(), wanted - wanted.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def spearman(found: np.ndarray, wanted: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(found), _ranks(wanted))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def of_sets(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Of bool [rows, labels]:

    micro_f1     F1 of all (row, label) pairs together
    macro_f1     F1 of each label, averaged over the labels that occur, found or wanted
    exact_match  share of rows whose sets are equal
    """
    both, either = (found & wanted).sum(axis=0), found.sum(axis=0) + wanted.sum(axis=0)
    occur = either > 0
    return {
        "micro_f1": float(2 * both.sum() / max(either.sum(), 1)),
        "macro_f1": float(np.mean(2 * both[occur] / either[occur])) if occur.any() else 0.0,
        "exact_match": float((found == wanted).all(axis=1).mean()),
    }
