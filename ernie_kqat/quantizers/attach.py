"""Put quantizers into a model by layer rules, and take them out again for deployment.

PaddleSlim's QAT does the surgery (each Linear becomes a QuantizedLinear with two slots); this module fills the slots.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn.quant.quant_layers import QuantizedLinear

from .. import config, rules, strict
from ..errors import UserError
from . import ActivationQuantizer, WeightQuantizer, check_bits, find
from .embedding import QuantizedEmbedding

KEY = "Slim.quant.layers"
QUANTIZER_STATE = "._fake_quant_"  # in the name of what belongs to a quantizer: ranges, trained steps
SAME_INPUT = re.compile(r"^(.*\.self_attn)\.[qkv]_proj$")  # they read one tensor, which the engine quantizes once


@dataclass(frozen=True)
class LayerPlan:
    """How one Linear is quantized; both None: left in fp32."""

    name: str
    weight: config.WeightQuant | None
    activation: config.ActivationQuant | None

    def __str__(self) -> str:
        if self.weight is None or self.activation is None:
            return f"{self.name}: fp32"
        w, a = self.weight, self.activation
        weight, activation = (f", range {part.range}" if part.quantizer == "minmax" else "" for part in (w, a))
        offset = " with offset" if a.quantizer == "lsq" and a.offset else ""
        kind = f"{w.quantizer} split" if w.split else w.quantizer
        return f"{self.name}: W{w.bits} {kind} per {w.granularity}{weight}; A{a.bits} {a.quantizer}{activation}{offset}"


def make_plan(model: paddle.nn.Layer, quant: config.Quant) -> list[LayerPlan]:
    """One LayerPlan for each Linear, in model order; UserError for a rule that is wrong or matches nothing."""
    names = [name for name, layer in model.named_sublayers() if type(layer) is paddle.nn.Linear]
    if not names:
        raise UserError("the model has no Linear layer to quantize")
    matched = rules.match(quant.layers or [], names, KEY)
    return [_layer_plan(name, quant, matched.get(name, {})) for name in names]


def _layer_plan(name: str, quant: config.Quant, override) -> LayerPlan:
    if override == "skip":
        return LayerPlan(name, None, None)
    if not isinstance(override, dict) or set(override) - {"weight", "activation"}:
        raise UserError(f"{KEY}: {override!r} is not `skip` or {{weight: {{…}}, activation: {{…}}}}")
    parts = {}
    for part in ("weight", "activation"):
        base = getattr(quant, part)
        merged = {**dataclasses.asdict(base), **(override.get(part) or {})}
        parts[part] = strict.build(type(base), merged, f"{KEY} ({name}).{part}", "config")
    check_bits(parts["weight"], "Slim.quant.weight.bits", name)
    return LayerPlan(name, **parts)


def mark_skipped(model: paddle.nn.Layer, plan: list[LayerPlan]) -> None:
    """Tell PaddleSlim which Linears to leave alone (its `skip_quant` attribute)."""
    layers = dict(model.named_sublayers())
    for entry in plan:
        layers[entry.name].skip_quant = entry.weight is None


def fill_slots(model: paddle.nn.Layer, plan: list[LayerPlan]) -> None:
    """Put the planned quantizers into the two slots of each of PaddleSlim's QuantizedLinears."""
    layers = dict(model.named_sublayers())
    siblings: dict[tuple, ActivationQuantizer] = {}
    for entry in plan:
        if entry.weight is not None and entry.activation is not None:
            layer = layers[entry.name]
            layer._fake_quant_weight = find(entry.weight.quantizer, WeightQuantizer)(entry.weight, layer.weight)
            layer.weight.optimize_attr["learning_rate"] *= layer._fake_quant_weight.learning_rate
            layer._fake_quant_input = find(entry.activation.quantizer, ActivationQuantizer)(entry.activation)
            same = SAME_INPUT.match(entry.name)
            if same:
                layer._fake_quant_input.share(siblings.setdefault((same[1], entry.activation), layer._fake_quant_input))


def quantized_linears(model: paddle.nn.Layer) -> dict[str, QuantizedLinear]:
    """The quantized layers by name."""
    return {name: layer for name, layer in model.named_sublayers() if isinstance(layer, QuantizedLinear)}


@dataclass(frozen=True)
class LayerGrid:
    """What deployment needs of one layer: steps as float32 arrays (weight: [out] or [1]; activation: a number)."""

    weight_step: np.ndarray
    weight_bits: int
    activation_step: float
    activation_bits: int


class FittedLinear(paddle.nn.Linear):
    """A Linear whose input is first fitted to the engine's int8, which knows neither offsets nor fewer bits than 8."""

    def __init__(self, in_features: int, out_features: int, offset: float, bounds: tuple[float, float] | None):
        super().__init__(in_features, out_features)
        self._offset, self._bounds = offset, bounds

    def forward(self, x):
        if self._offset:
            x = x - self._offset
        if self._bounds:
            x = paddle.clip(x, *self._bounds)
        return paddle.nn.functional.linear(x, self.weight, self.bias)


def deployable(model: paddle.nn.Layer) -> tuple[paddle.nn.Layer, dict[str, LayerGrid]]:
    """A plain copy whose weights lie on their integer grids, and the grids by the new weights' parameter names."""
    plain = copy.deepcopy(model)
    plain.eval()
    grids = {}
    for name, layer in quantized_linears(plain).items():
        q, step = layer._fake_quant_weight.integers(layer.weight)
        activation = layer._fake_quant_input
        if not activation.calibrated():
            raise UserError(f"{name}: its activation range was never set; calibrate or train before exporting")
        activation_step, offset = float(activation.step()), activation.offset()
        bounds = (activation.low * activation_step, activation.high * activation_step) if activation.bits < 8 else None
        rows, columns = layer.weight.shape
        fitted = offset or bounds
        linear = FittedLinear(rows, columns, offset, bounds) if fitted else paddle.nn.Linear(rows, columns)
        on_grid = q.astype(np.float32) * step
        bias = np.zeros(columns, np.float32) if layer.bias is None else layer.bias.numpy()
        linear.weight.set_value(on_grid)
        linear.bias.set_value(bias + np.float32(offset) * on_grid.sum(axis=0))
        _replace(plain, name, linear)
        grids[linear.weight.name] = LayerGrid(step, layer._fake_quant_weight.bits, activation_step, activation.bits)
    for name, layer in dict(plain.named_sublayers()).items():
        if isinstance(layer, QuantizedEmbedding):
            _replace(plain, name, layer.deployed())
    plain.eval()
    return plain, grids


def _replace(model: paddle.nn.Layer, name: str, layer: paddle.nn.Layer) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(dict(model.named_sublayers(include_self=True))[parent], leaf, layer)


def quantizer_buffers(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    """State of the quantizers (ranges), which fp32 weight files have no place for."""
    return {name: value.numpy() for name, value in model.state_dict().items() if QUANTIZER_STATE in name}


def load_quantizer_buffers(model: paddle.nn.Layer, buffers: dict[str, np.ndarray]) -> None:
    """Restore what `quantizer_buffers` gave; UserError if the model's quantizers are others."""
    own = {name: value for name, value in model.state_dict().items() if QUANTIZER_STATE in name}
    differing = sorted(set(own) ^ set(buffers))
    if differing:
        raise UserError(f"the stored quantizer state is of another plan: {', '.join(differing[:3])}")
    for name, value in own.items():
        value.set_value(buffers[name])
