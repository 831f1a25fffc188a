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
from .attention import DeployedAttention, QuantizedAttention, stop_rounding
from .embedding import QuantizedEmbedding

KEY = "Slim.quant.layers"
# In the names of what belongs to quantizers: ranges and trained steps; smoothing.
QUANTIZER_STATE = ("._fake_quant_", "_preprocess.")
SMOOTHING = "._act_preprocess.factor"  # at the end of the name of a smoothed Linear's first buffer
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


def fill_slots(model: paddle.nn.Layer, plan: list[LayerPlan], begin: bool = True) -> None:
    """Put the planned quantizers into the two slots of each of PaddleSlim's QuantizedLinears.

    begin: False where a stored state is loaded next (`load_quantizer_buffers`).
    """
    layers = dict(model.named_sublayers())
    siblings: dict[tuple, ActivationQuantizer] = {}
    for entry in plan:
        if entry.weight is not None and entry.activation is not None:
            layer = layers[entry.name]
            layer._fake_quant_weight = find(entry.weight.quantizer, WeightQuantizer)(entry.weight, layer.weight)
            layer.weight.optimize_attr["learning_rate"] *= layer._fake_quant_weight.learning_rate
            layer._fake_quant_input = find(entry.activation.quantizer, ActivationQuantizer)(entry.activation)
            reads = (input_of(entry.name), entry.activation)
            layer._fake_quant_input.share(siblings.setdefault(reads, layer._fake_quant_input))
            if begin:
                layer._fake_quant_weight.begin(layer.weight)


def input_of(name: str) -> str:
    """A name for the tensor that a Linear reads; those of q, k and v are one."""
    same = SAME_INPUT.match(name)
    return same[1] if same else name


def quantized_linears(model: paddle.nn.Layer) -> dict[str, QuantizedLinear]:
    """The quantized layers by name."""
    return {name: layer for name, layer in model.named_sublayers() if isinstance(layer, QuantizedLinear)}


class Smoothing(paddle.nn.Layer):
    """Multiplies by constants; in PaddleSlim's two slots for what comes before a quantizer."""

    def __init__(self, shape: list[int]):
        super().__init__()
        self.register_buffer("factor", paddle.ones(shape))

    def forward(self, x):
        return x * self.factor


def add_smoothing(layer: QuantizedLinear) -> None:
    """Make place for `smooth`; nothing changes yet."""
    features = layer.weight.shape[0]
    layer._act_preprocess, layer._weight_preprocess = Smoothing([features]), Smoothing([features, 1])


def smooth(layer: QuantizedLinear, factors: np.ndarray) -> None:
    """Have a quantized Linear quantize x / s and s W where it quantized x and W (SmoothQuant, arXiv 2211.10438, equation 3).

    factors: s, float32 [in]. The weight stays W, so that it still is the fp32 model's.
    """
    layer._act_preprocess.factor.set_value(np.float32(1) / factors)
    layer._weight_preprocess.factor.set_value(factors.reshape(-1, 1))
    begin_again(layer)


def weight_of(layer: QuantizedLinear) -> paddle.Tensor:
    """What its weight quantizer reads: the weight, or s W where it is smoothed."""
    return layer.weight if layer._weight_preprocess is None else layer._weight_preprocess(layer.weight)


def set_weight(layer: QuantizedLinear, values: np.ndarray) -> None:
    """Have `weight_of` give `values`."""
    smoothing = layer._weight_preprocess
    layer.weight.set_value(values if smoothing is None else values / smoothing.factor.numpy())


def take_smoothing_in(layer: QuantizedLinear) -> None:
    """Make s W the weight of a smoothed Linear; it computes what it did, but its weight is the fp32 model's no longer."""
    if layer._weight_preprocess is not None:
        layer.weight.set_value(weight_of(layer))
        layer._weight_preprocess = None


def begin_again(layer: QuantizedLinear) -> None:
    """Set the weight quantizer's state to what it would be if it were built for the weight of now."""
    quantizer, weight = layer._fake_quant_weight, weight_of(layer)
    new = type(quantizer)(quantizer.options, weight)
    new.begin(weight)
    quantizer.set_state_dict(new.state_dict())


def fp32_copy(model: paddle.nn.Layer) -> paddle.nn.Layer:
    """A copy in eval mode whose quantizers do nothing; smoothing, which changes no values, stays."""
    plain = copy.deepcopy(model)
    for layer in quantized_linears(plain).values():
        layer._fake_quant_weight, layer._fake_quant_input = paddle.nn.Identity(), paddle.nn.Identity()
    stop_rounding(plain)
    plain.eval()
    return plain


@dataclass(frozen=True)
class LayerGrid:
    """What deployment needs of one layer: steps as float32 arrays (weight: [out] or [1]; activation: a number)."""

    weight_step: np.ndarray
    weight_bits: int
    activation_step: float
    activation_bits: int


class FittedInput(paddle.nn.Layer):
    """Fits a tensor to the engine's int8, which knows neither smoothing nor offsets nor fewer bits than 8.

    Linears that read one tensor share it. What it was given last is not fitted again: one tensor, one quantize operator.
    """

    def __init__(self, smoothing: Smoothing | None, offset: float, bounds: tuple[float, float] | None):
        super().__init__()
        self.smoothing, self.offset, self.bounds = smoothing, offset, bounds
        self._last: tuple = (None, None)

    @paddle.jit.not_to_static
    def forward(self, x):
        if x is not self._last[0]:
            self._last = x, self._fit(x)
        return self._last[1]

    def _fit(self, x):
        if self.smoothing is not None:
            x = self.smoothing(x)
        if self.offset:
            x = x - self.offset
        return paddle.clip(x, *self.bounds) if self.bounds else x


class FittedLinear(paddle.nn.Linear):
    """A Linear with a FittedInput before it; `own_bias`: its bias without what an offset adds, [out]."""

    def __init__(self, in_features: int, out_features: int, fit: FittedInput, own_bias: np.ndarray):
        super().__init__(in_features, out_features)
        self.fit, self.own_bias = fit, own_bias

    def forward(self, x):
        return paddle.nn.functional.linear(self.fit(x), self.weight, self.bias)


def deployable(model: paddle.nn.Layer) -> tuple[paddle.nn.Layer, dict[str, LayerGrid]]:
    """A plain copy whose weights lie on their integer grids, and the grids by the new weights' parameter names."""
    plain = copy.deepcopy(model)
    plain.eval()
    grids = {}
    fits: dict[tuple, FittedInput] = {}
    for name, layer in quantized_linears(plain).items():
        q, step = layer._fake_quant_weight.integers(weight_of(layer))
        activation = layer._fake_quant_input
        if not activation.calibrated():
            raise UserError(f"{name}: its activation range was never set; calibrate or train before exporting")
        activation_step, offset = float(activation.step()), activation.offset()
        bounds = (activation.low * activation_step, activation.high * activation_step) if activation.bits < 8 else None
        smoothing = layer._act_preprocess
        rows, columns = layer.weight.shape
        bias = np.zeros(columns, np.float32) if layer.bias is None else layer.bias.numpy()
        if smoothing is None and not offset and bounds is None:
            linear = paddle.nn.Linear(rows, columns)
        else:
            factor = b"" if smoothing is None else smoothing.factor.numpy().tobytes()
            fit = fits.setdefault((input_of(name), factor, offset, bounds), FittedInput(smoothing, offset, bounds))
            linear = FittedLinear(rows, columns, fit, bias)
        sums = q.sum(axis=0, dtype=np.int64) * step.astype(np.float64)  # summed in fp32 they would cost agreement
        linear.weight.set_value(q.astype(np.float32) * step)
        linear.bias.set_value((bias + offset * sums).astype(np.float32))
        _replace(plain, name, linear)
        grids[linear.weight.name] = LayerGrid(step, layer._fake_quant_weight.bits, activation_step, activation.bits)
    for name, layer in dict(plain.named_sublayers()).items():
        if isinstance(layer, QuantizedEmbedding):
            _replace(plain, name, layer.deployed())
        elif isinstance(layer, QuantizedAttention):
            _replace(plain, name, DeployedAttention(layer))
    plain.eval()
    return plain, grids


def is_quantizer_state(name: str) -> bool:
    """Whether a parameter or buffer belongs to quantizers, and so to no fp32 model."""
    return any(part in name for part in QUANTIZER_STATE)


def _replace(model: paddle.nn.Layer, name: str, layer: paddle.nn.Layer) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(dict(model.named_sublayers(include_self=True))[parent], leaf, layer)


def quantizer_buffers(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    """State of the quantizers (ranges, smoothing), which fp32 weight files have no place for."""
    return {name: value.numpy() for name, value in model.state_dict().items() if is_quantizer_state(name)}


def load_quantizer_buffers(model: paddle.nn.Layer, buffers: dict[str, np.ndarray]) -> None:
    """Restore what `quantizer_buffers` gave, smoothing too; UserError if the model's quantizers are others."""
    for name, layer in quantized_linears(model).items():
        if name + SMOOTHING in buffers:
            add_smoothing(layer)
    own = {name: value for name, value in model.state_dict().items() if is_quantizer_state(name)}
    differing = sorted(set(own) ^ set(buffers))
    if differing:
        raise UserError(f"the stored quantizer state is of another plan: {', '.join(differing[:3])}")
    for name, value in own.items():
        value.set_value(buffers[name])
