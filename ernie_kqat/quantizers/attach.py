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

from .. import config, rules
from ..errors import UserError
from . import ActivationQuantizer, WeightQuantizer, find

KEY = "Slim.quant.layers"
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
        return f"{self.name}: W{w.bits} {w.quantizer} per {w.granularity}, range {w.range}; A{a.bits} range {a.range}"


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
        parts[part] = config.build(type(base), merged, f"{KEY} ({name}).{part}", "config")
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
        if entry.weight is not None:
            layer = layers[entry.name]
            layer._fake_quant_weight = find(entry.weight.quantizer, WeightQuantizer)(entry.weight, layer.weight)
            layer._fake_quant_input = find("minmax", ActivationQuantizer)(entry.activation)
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


class ClippedLinear(paddle.nn.Linear):
    """A Linear whose input saturates at the bounds of fewer than 8 bits, which the engine's int8 would not do."""

    def __init__(self, in_features: int, out_features: int, low: float, high: float):
        super().__init__(in_features, out_features)
        self._low, self._high = low, high

    def forward(self, x):
        return paddle.nn.functional.linear(paddle.clip(x, self._low, self._high), self.weight, self.bias)


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
        activation_step = float(activation.step())
        size = layer.weight.shape
        linear: paddle.nn.Linear
        if activation.bits < 8:
            linear = ClippedLinear(
                size[0], size[1], activation.low * activation_step, activation.high * activation_step
            )
        else:
            linear = paddle.nn.Linear(*size)
        linear.weight.set_value(q.astype(np.float32) * step)
        linear.bias.set_value(np.zeros(size[1], "float32") if layer.bias is None else layer.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(dict(plain.named_sublayers(include_self=True))[parent], leaf, linear)
        grids[linear.weight.name] = LayerGrid(step, layer._fake_quant_weight.bits, activation_step, activation.bits)
    plain.eval()
    return plain, grids


def quantizer_buffers(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    """State of the quantizers (ranges), which fp32 weight files have no place for."""
    return {name: value.numpy() for name, value in model.state_dict().items() if "._fake_quant_" in name}


def load_quantizer_buffers(model: paddle.nn.Layer, buffers: dict[str, np.ndarray]) -> None:
    """Restore what `quantizer_buffers` gave; UserError if the model's quantizers are others."""
    own = {name: value for name, value in model.state_dict().items() if "._fake_quant_" in name}
    differing = sorted(set(own) ^ set(buffers))
    if differing:
        raise UserError(f"the stored quantizer state is of another plan: {', '.join(differing[:3])}")
    for name, value in own.items():
        value.set_value(buffers[name])
