"""Activation ranges from a few batches, without training: the start of QAT, and the whole of PTQ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import paddle
from tqdm import tqdm

from .data.batching import collate, epoch_batches
from .data.dataset import Split
from .methods import Batch, Method
from .quantizers import ActivationQuantizer
from .quantizers.attach import fp32_copy
from .restore import Restored
from .strides import dense

BATCH_SIZE = 32


@dense()
def calibrate(model: paddle.nn.Layer, batches: Iterable[Batch], methods: Sequence[Method] = ()) -> None:
    """Set the activation ranges by batches, with what the methods do before and after it, each in their order.

    Dropout is off: deployed activations have none. The model's mode is as before afterwards.
    """
    batches, training = list(batches), model.training
    model.eval()
    for method in methods:
        method.before_calibration(model, batches)
    fp32 = fp32_copy(model) if any(method.calibrates() for method in methods) else None
    _observe(model, batches)
    for method in methods:
        method.after_calibration(model, fp32, batches)
    if training:
        model.train()


@paddle.no_grad()
def _observe(model: paddle.nn.Layer, batches: Sequence[Batch]) -> None:
    """Run the batches with only the activation quantizers observing."""
    observers = [layer for layer in model.sublayers() if isinstance(layer, ActivationQuantizer)]
    for observer in observers:
        observer.train()
    for batch in tqdm(batches, desc="calibrate", disable=None, leave=False):
        model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
    for observer in observers:
        observer.eval()


def calibrate_rows(restored: Restored, rows: Split, seed: int, methods: Sequence[Method] = ()) -> None:
    """Set the activation ranges of a quantized model folder from the first batches of shuffled rows (PTQ)."""
    assert restored.quant is not None
    order = epoch_batches([len(ids) for ids in rows.input_ids], BATCH_SIZE, seed, epoch=0)
    kinds = [restored.quant.activation, *([restored.quant.attention] if restored.quant.attention else [])]
    order = order[: max(kind.calibration_batches for kind in kinds)]
    calibrate(restored.model, (collate(rows, batch, restored.pad_token_id) for batch in order), methods)
