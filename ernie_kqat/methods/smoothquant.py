"""SmoothQuant: move outliers of activations into weights, which are easier to quantize. Paper: arXiv 2211.10438.

    Y = (X diag(s)^-1) (diag(s) W)          s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)          (equations 3 and 4)

Differs from the paper: an ERNIE's LayerNorm comes last in its block and the residual reads it too, so s cannot be taken into
it; the deployed layer divides its input by s, in one elementwise operator before the quantize operator (q, k and v, which read
one tensor, share s and the operator). Of out_proj s is taken into the output channels of v_proj, exactly, because attention is
linear in the values. max|X_j| is over real tokens; padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle.nn.quant.quant_layers import QuantizedLinear

from .. import rules
from ..errors import UserError
from ..quantizers.attach import add_smoothing, begin_again, fp32_copy, input_of, quantized_linears, smooth
from ..strict import option
from . import Batch, Method

KEY = "Slim.smoothquant"
ENCODER = r"\.encoder\.|^encoder\."
SMALLEST = 1e-5  # of a peak: features that are always zero, rows of zero weights
OUT, VALUES = ".self_attn.out_proj", ".self_attn.v_proj"


def smoothing(activation_peaks: np.ndarray, weight_peaks: np.ndarray, alpha: float) -> np.ndarray:
    """s of equation 4, float32 [in], from max|X_j| and max|W_j|, both [in]."""
    x, w = (np.maximum(np.asarray(peaks, np.float64), SMALLEST) for peaks in (activation_peaks, weight_peaks))
    return (x**alpha / w ** (1 - alpha)).astype(np.float32)


@dataclass
class SmoothQuant(Method):
    """Smooth once, before the ranges are calibrated; s belongs to the quantizers and is stored with them."""

    alpha: Any = option(
        0.5,
        "how much of the difficulty moves to the weights, 0..1, for all encoder Linears; or (regex, alpha or `skip`) rules;"
        " null: off",
    )

    alphas: dict[str, float] = field(default_factory=dict, init=False, repr=False)  # by Linear

    def attach(self, model, pretrained):
        layers = quantized_linears(model)
        if not layers:
            raise UserError(f"{KEY}: needs quantized layers; say Slim.quant")
        given = (
            self.alpha if isinstance(self.alpha, list) else [[ENCODER, "skip" if self.alpha is None else self.alpha]]
        )
        for name, alpha in rules.match(given, list(layers), f"{KEY}.alpha").items():
            if alpha != "skip":
                self.alphas[name] = _checked(alpha)
        for name, alpha in self.alphas.items():
            same = [other for other in layers if input_of(other) == input_of(name)]
            if {self.alphas.get(other) for other in same} != {alpha}:
                raise UserError(f"{KEY}.alpha: {', '.join(same)} read one tensor; give them one alpha")
            if layers[name]._fake_quant_weight.options.split:
                raise UserError(f"{KEY}.alpha: {name}: a split weight is not smoothed; `skip` it")
            if not name.endswith(OUT):
                add_smoothing(layers[name])

    def before_calibration(self, model, batches):
        if not self.alphas:
            return
        layers = quantized_linears(model)
        peaks = activation_peaks(model, list(self.alphas), batches)
        groups: dict[str, list[str]] = {}
        for name in self.alphas:
            groups.setdefault(input_of(name), []).append(name)
        for names in groups.values():
            of_weights = np.max([np.abs(layers[name].weight.numpy()).max(axis=1) for name in names], axis=0)
            factors = smoothing(peaks[names[0]], of_weights, self.alphas[names[0]])
            for name in names:
                if name.endswith(OUT):
                    values = dict(model.named_sublayers())[name[: -len(OUT)] + VALUES]
                    take_in(values, layers[name], factors)
                else:
                    smooth(layers[name], factors)

    def plan(self):
        said = ", ".join(f"{alpha:g}" for alpha in sorted(set(self.alphas.values())))
        return [f"SmoothQuant: {len(self.alphas)} layers, alpha {said}"] if self.alphas else []


def _checked(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise UserError(f"{KEY}.alpha: {alpha!r} is not a number in 0..1, nor (regex, alpha or `skip`) rules, nor null")
    return float(alpha)


@paddle.no_grad()
def activation_peaks(model: paddle.nn.Layer, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """max|X_j| of each named Linear's input over the real tokens of the batches, in fp32: float32 [in]."""
    plain = fp32_copy(model)
    inputs: dict[str, paddle.Tensor] = {}

    def into(name: str):
        def hook(layer, given):
            inputs[name] = given[0]

        return hook

    layers = quantized_linears(plain)
    for name in names:
        layers[name].register_forward_pre_hook(into(name))
    peaks: dict[str, np.ndarray] = {}
    for batch in batches:
        real = batch["input_ids"] != plain.ernie.pad_token_id
        plain(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
        for name, x in inputs.items():
            values = x.numpy()[real] if x.ndim == 3 else x.numpy()  # the head's are one row a sentence
            found = np.abs(values).max(axis=0)
            peaks[name] = np.maximum(peaks.get(name, found), found)
    return peaks


def take_in(values: paddle.nn.Layer, out: paddle.nn.Layer, factors: np.ndarray) -> None:
    """Divide v_proj's outputs by s and multiply out_proj's rows by it; what lies between them is linear in the values."""
    values.weight.set_value(values.weight.numpy() / factors)
    values.bias.set_value(values.bias.numpy() / factors)
    out.weight.set_value(out.weight.numpy() * factors[:, None])
    for layer in (values, out):
        if isinstance(layer, QuantizedLinear):
            begin_again(layer)
