"""Activation ranges from a few batches, without training: the start of QAT, and the whole of PTQ."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle
from tqdm import tqdm

from .quantizers import ActivationQuantizer


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
