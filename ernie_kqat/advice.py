"""Lines for train.log where a run looks wrong, and what to do about it. Nothing here changes the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from .quantizers import ActivationQuantizer

MOST_CLIPPED = 0.01  # share of a tensor's values
WORST = 3  # layers that a line names


def of_labels(train: Any, dev: Any, names: Sequence[str]) -> list[str]:
    """Of labels that no row of train has, and of a train set that is nearly all one label.

    Ids [rows] of each; targets of another kind (Split.labels) have no such counts.
    """
    if not isinstance(train, np.ndarray) or train.ndim != 1:
        return []
    counts = np.bincount(train, minlength=len(names))
    unseen = [name for name, count in zip(names, counts) if count == 0]
    lines = []
    if unseen:
        there = sum(np.isin(dev, [names.index(name) for name in unseen]))
        lines.append(
            f"warning: no train row has the label {', '.join(unseen)} ({there} dev rows have); the model cannot learn it:"
            " is Data.labels right, or Data.train_rows too small?"
        )
    if counts.max() > 0.95 * counts.sum():
        lines.append(
            f"warning: {counts.max() / counts.sum():.1%} of the train rows have the label {names[int(counts.argmax())]};"
            " accuracy says little then: Train.metric: macro_f1 or matthews"
        )
    return lines


def of_losses(row: Mapping[str, Any]) -> list[str]:
    """Of a logged step whose kurtosis term is larger than the task's loss."""
    task, term = row.get("loss"), row.get("kurtosis")
    if task is None or term is None or term <= task or "kurtosis_grad_norm" not in row:
        return []
    return [
        f"warning: the kurtosis term ({term:.3g}) is larger than the task's loss ({task:.3g}): lower Slim.kurtosis.lambda, or"
        " say balance: 0.3, or apply: decoupled"
    ]


@paddle.no_grad()
def clipped(model: paddle.nn.Layer, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of values outside its range, of each 8-bit activation quantizer, in one batch; the mode is as before.

    With fewer bits clipping is the smaller evil, and no sign of anything.
    """
    shares: dict[str, float] = {}
    hooks = []
    for name, layer in model.named_sublayers():
        if isinstance(layer, ActivationQuantizer) and layer.bits == 8:

            def count(layer, inputs, name=name):
                ratio = (inputs[0] - layer.offset()) / layer.step()
                outside = paddle.logical_or(ratio < layer.low - 0.5, ratio > layer.high + 0.5)
                shares[name.replace("._fake_quant_input", "").replace("_fake_quant_", "")] = float(
                    outside.astype("float32").mean()
                )

            hooks.append(layer.register_forward_pre_hook(count))
    training = model.training
    model.eval()
    model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
    if training:
        model.train()
    for hook in hooks:
        hook.remove()
    return shares


def of_clipping(shares: Mapping[str, float]) -> list[str]:
    """Of layers whose inputs are clipped too much; `shares` of `clipped`."""
    worst = sorted(((share, name) for name, share in shares.items() if share > MOST_CLIPPED), reverse=True)
    if not worst:
        return []
    named = ", ".join(f"{name} {share:.1%}" for share, name in worst[:WORST])
    return [
        f"warning: {len(worst)} layers clip over {MOST_CLIPPED:.0%} of their input ({named}): Slim.quant.activation.range:"
        " mse or learned, or more calibration_batches"
    ]
