"""Evaluation of a Paddle model on a tokenized split."""

from __future__ import annotations

import numpy as np
import paddle
from tqdm import tqdm

from . import parallel, shapes
from .data.batching import collate, eval_batches
from .data.dataset import Split
from .strides import dense


@dense()
@paddle.no_grad()
def logits_of(
    model: paddle.nn.Layer,
    split: Split,
    pad_token_id: int,
    batch_size: int = 64,
    what: str = "evaluate",
    shared: bool = False,
) -> np.ndarray:
    """float32 [positions, outputs] in the split's order (tasks/__init__.py); the model is put in eval mode and back.

    shared: the processes of a training share the batches, and all get all logits.
    """
    training = model.training
    model.eval()
    logits = np.zeros((0, 0), np.float32)
    lengths = [len(row) for row in split.input_ids]
    batches = eval_batches(lengths, batch_size)
    shared = shared and len(batches) >= parallel.size()
    if shared:
        batches = batches[parallel.rank() :: parallel.size()]
    for rows in tqdm(batches, desc=what, disable=None, leave=False):
        batch = collate(split, rows, pad_token_id)
        out = model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"])).numpy()
        if not logits.size:
            places = shapes.starts(lengths, per_token=out.ndim == 3)
            logits = np.zeros((places[-1], out.shape[-1]), np.float32)
        shapes.put(out, rows, places, logits)
    if training:
        model.train()
    return parallel.add_up(logits) if shared else logits


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest logit is the label's."""
    return float(np.mean(logits.argmax(axis=1) == labels))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax(logits)[label]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]))


def comparison(logits: np.ndarray, reference: np.ndarray, agreement: float | None = None) -> dict[str, float]:
    """How near two sets of logits are: share of equal answers, and rms difference over the reference's std.

    agreement: that share, where it is not the one of equal labels (Task.agreement).
    """
    difference = np.sqrt(np.mean(np.square(logits.astype(np.float64) - reference)))
    if agreement is None:
        agreement = float(np.mean(logits.argmax(axis=1) == reference.argmax(axis=1)))
    return {
        "agreement": agreement,
        "rms_over_std": float(difference / max(reference.astype(np.float64).std(), 1e-12)),
    }
