"""What arrives at each Linear on real rows: how far it reaches, which range a quantizer gives it, and what 8 bits cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle.nn.quant.quant_layers import QuantizedLinear
from tqdm import tqdm

from .. import config, strict
from ..data.batching import collate, epoch_batches
from ..data.dataset import Split
from ..quantizers import ActivationQuantizer, find, numeric
from ..restore import Restored

BATCH_SIZE = 32
RANGES = ("moving_average", "mse")
KEPT = 2**14  # values kept of each batch, evenly spaced, for percentile and SQNR


@dataclass(frozen=True)
class ActivationStatistics:
    """Of one Linear's input; `ranges` and `sqnr` (dB, at 8 bits) by way of choosing the range.

    `absmax`: one figure a batch. `percentile`: 99.9 % of the |x| kept are under it.
    """

    name: str
    minimum: float
    maximum: float
    absmax: tuple[float, ...]
    percentile: float
    ranges: dict[str, float]
    sqnr: dict[str, float]


@dataclass
class _Observed:
    """One Linear's input while the batches pass."""

    observers: dict[str, ActivationQuantizer]
    minimum: float = float("inf")
    maximum: float = float("-inf")
    absmax: list[float] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)

    def see(self, x: paddle.Tensor) -> None:
        for observer in self.observers.values():
            observer(x)
        values = x.numpy().reshape(-1)
        low, high = float(values.min()), float(values.max())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.absmax.append(max(-low, high))
        self.kept.append(numeric.sample(x.numpy(), KEPT).copy())

    def statistics(self, name: str) -> ActivationStatistics:
        kept = np.concatenate(self.kept)
        ranges, sqnr = {}, {}
        for way, observer in self.observers.items():
            observer.eval()
            ranges[way] = float(observer.step()) * observer.high
            sqnr[way] = numeric.sqnr_db(kept, observer(paddle.to_tensor(kept)).numpy())
        percentile = float(np.percentile(np.abs(kept), 99.9))
        return ActivationStatistics(name, self.minimum, self.maximum, tuple(self.absmax), percentile, ranges, sqnr)


@paddle.no_grad()
def statistics(restored: Restored, split: Split, seed: int = 42, batches: int = 20) -> list[ActivationStatistics]:
    """Of each Linear of `restored`, in model order, on `batches` shuffled batches of 32 rows.

    The ranges are those of the package's own quantizers on the same batches (quantizers/minmax.py). A run's quantizers
    stay in it, so the figures of a run are of its simulation. Padding counts, as it does in calibration.
    """
    order = epoch_batches([len(ids) for ids in split.input_ids], BATCH_SIZE, seed, epoch=0)[:batches]
    found, hooks = {}, []
    for name, layer in restored.model.named_sublayers():
        if isinstance(layer, (paddle.nn.Linear, QuantizedLinear)):
            found[name] = _Observed({way: _observer(way, len(order)) for way in RANGES})
            hooks.append(layer.register_forward_pre_hook(_hook(found[name])))
    restored.model.eval()
    try:
        for rows in tqdm(order, desc="activations", unit="batch", disable=None, leave=False):
            batch = collate(split, rows, restored.pad_token_id)
            restored.model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
    finally:
        for hook in hooks:
            hook.remove()
    return [observed.statistics(name) for name, observed in found.items()]


def _hook(observed: _Observed):
    return lambda layer, inputs: observed.see(inputs[0])


def _observer(way: str, batches: int) -> ActivationQuantizer:
    options = strict.build(config.ActivationQuant, {"range": way, "calibration_batches": batches}, "range", "analysis")
    observer = find("minmax", ActivationQuantizer)(options)
    observer.train()
    return observer
