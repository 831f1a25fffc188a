"""Activation ranges from a few batches, without training: the start of QAT, and the whole of PTQ."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle
from tqdm import tqdm

from .data.batching import collate, epoch_batches
from .data.dataset import Split
from .quantizers import ActivationQuantizer
from .restore import Restored

BATCH_SIZE = 32


@paddle.no_grad()
def calibrate(model: paddle.nn.Layer, batches: Iterable[dict[str, np.ndarray]], total: int | None = None) -> None:
    """Run batches (input_ids and token_type_ids, int64 [batch, tokens]) with only the activation quantizers observing.

    Dropout is off: deployed activations have none. The model's mode is as before afterwards.
    """
    training = model.training
    model.eval()
    observers = [layer for layer in model.sublayers() if isinstance(layer, ActivationQuantizer)]
    for observer in observers:
        observer.train()
    for batch in tqdm(batches, total=total, desc="calibrate", disable=None, leave=False):
        model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
    for observer in observers:
        observer.eval()
    if training:
        model.train()


def calibrate_rows(restored: Restored, rows: Split, seed: int) -> None:
    """Set the activation ranges of a quantized model folder from the first batches of shuffled rows (PTQ)."""
    assert restored.quant is not None
    order = epoch_batches([len(ids) for ids in rows.input_ids], BATCH_SIZE, seed, epoch=0)
    order = order[: restored.quant.activation.calibration_batches]
    calibrate(restored.model, (collate(rows, batch, restored.pad_token_id) for batch in order), len(order))
