"""I-BERT: GELU, softmax and LayerNorm on integers, simulated only: Paddle has no such operators. Paper: arXiv 2101.01321.

The input of each is rounded to `bits`, in a range averaged over training batches as the paper's; integer.py does the rest, in
the very integers that hardware would have. The gradient is the float function's at the rounded input, straight through.

Differs from the paper: inputs have `bits` of their own where the paper takes the 32-bit sums of the matrix product before
(22 bits for LayerNorm, in the authors' code); attention's two products stay in floating point, as in the INT8 programs that
we deploy; so do LayerNorm's weight and bias, embeddings and the pooler's tanh; the mask is added to the scores as integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from ...config import ActivationQuant
from ...errors import UserError
from ...quantizers import PassThrough
from ...quantizers.attach import quantized_linears
from ...quantizers.attention import QuantizedAttention, SelfAttention
from ...quantizers.minmax import MovingAverageActivation
from ...strict import number, option
from .. import Method
from . import integer

KEY = "Slim.ibert"


class OnIntegers(paddle.nn.Layer):
    """A function of integers: its input, rounded, as a tensor (for the gradient) and as int64 (for the value)."""

    simulated_only = f"{KEY} is simulated only: Paddle Inference has no integer GELU, softmax or LayerNorm"

    def __init__(self, bits: int):
        super().__init__()
        self._fake_quant_input = MovingAverageActivation(ActivationQuant(bits=bits))

    def rounded(self, x: paddle.Tensor) -> tuple[paddle.Tensor, np.ndarray, float]:
        """x on its grid, its integers, and their step."""
        x = self._fake_quant_input(x)
        step = float(self._fake_quant_input.step())
        return x, _integers(x, step), step


class IntegerGELU(OnIntegers):
    """i-GELU in place of `activation`, a function."""

    def forward(self, x):
        x, q, step = self.rounded(x)
        return _in_place_of(F.gelu(x), _reals(integer.gelu, q, step))


class IntegerSoftmax(OnIntegers):
    """i-softmax over the last axis of scores [..., tokens] and an additive mask."""

    def __init__(self, bits: int, out_bits: int):
        super().__init__(bits)
        self.out_bits = out_bits

    def forward(self, scores, mask=None):
        x, q, step = self.rounded(scores)
        if mask is not None:
            x, q = x + mask, q + _integers(mask, step)
        return _in_place_of(F.softmax(x), _reals(integer.softmax, q, step, self.out_bits))


class IntegerLayerNorm(OnIntegers):
    """i-LayerNorm in place of a LayerNorm, whose parameters it keeps."""

    def __init__(self, norm: paddle.nn.LayerNorm, bits: int):
        super().__init__(bits)
        self.weight, self.bias, self._epsilon = norm.weight, norm.bias, norm._epsilon

    def forward(self, x):
        x, q, _ = self.rounded(x)
        out, step = integer.normalize(q)
        value = out * step * self.weight.numpy() + self.bias.numpy()
        exact = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self._epsilon)
        return _in_place_of(exact, value.astype(np.float32))


class AttentionWith(SelfAttention):
    """Paddle's self-attention with `softmax(scores, mask)` in place of its own."""

    def __init__(self, attention: paddle.nn.MultiHeadAttention, softmax: Callable):
        super().__init__(attention)
        self.softmax = softmax

    def weigh(self, scores, mask):
        return self.softmax(scores, mask)


@dataclass
class IBERT(Method):
    """Which functions are computed on integers; with none it is absent."""

    gelu: bool = option(True, "i-GELU")
    softmax: bool = option(True, "i-softmax")
    layernorm: bool = option(True, "i-LayerNorm")
    bits: int = number(16, 12, 16, "of the integers that go in, signed")
    softmax_bits: int = number(8, 8, 16, "of the softmax's output, unsigned")

    def prepare(self, model):
        if not (self.gelu or self.softmax or self.layernorm):
            return
        if not quantized_linears(model):
            raise UserError(f"{KEY}: needs a quantized model; say Slim.quant")
        if self.gelu and model.config.hidden_act != "gelu":
            raise UserError(f"{KEY}.gelu: the model's activation is {model.config.hidden_act}; say gelu: false")
        for layer in model.ernie.encoder.layers:
            if self.gelu:
                layer.activation = IntegerGELU(self.bits)
            if self.softmax and isinstance(layer.self_attn, QuantizedAttention):
                raise UserError(f"{KEY}.softmax: Slim.quant.attention rounds its weights already; say softmax: false")
            if self.softmax:
                layer.self_attn = AttentionWith(layer.self_attn, IntegerSoftmax(self.bits, self.softmax_bits))
        if self.layernorm:
            for parent in model.sublayers():
                for name, norm in list(parent.named_children()):
                    if isinstance(norm, paddle.nn.LayerNorm):
                        setattr(parent, name, IntegerLayerNorm(norm, self.bits))

    def plan(self):
        used = [name for name in ("gelu", "softmax", "layernorm") if getattr(self, name)]
        if not used:
            return []
        return [
            f"I-BERT (simulated only): {', '.join(used)}; {self.bits} bits in, softmax {self.softmax_bits} bits out"
        ]


def _integers(x: paddle.Tensor, step: float) -> np.ndarray:
    q = np.rint(x.numpy().astype(np.float64) / step)
    if not np.isfinite(q).all():  # integers would hide it
        raise UserError(f"{KEY}: an input is not finite: training has diverged; lower Train.learning_rate")
    return q.astype(np.int64)


def _in_place_of(floats: paddle.Tensor, values: np.ndarray) -> paddle.Tensor:
    """`values` forward; backward the gradient of `floats`, which they are near."""
    return PassThrough.apply(floats, lambda _: paddle.to_tensor(values))


def _reals(function: Callable, *arguments) -> np.ndarray:
    try:
        q, step = function(*arguments)
    except ValueError as error:  # a range that the integers cannot bear
        raise UserError(f"{KEY}.bits: {error}") from None
    return (q * step).astype(np.float32)
