"""Attention whose two matrix products have low-bit inputs: queries, keys, values, and the softmax's weights.

Queries, keys and values get an ActivationQuantizer each. The weights of a query, which are in 0..1, get 8 unsigned bits with no
range to calibrate: in units of the query's own largest weight, and divided by their sum,

    u = round(255 p / max p)        w = u / sum u

so that a row of many small weights keeps its shape, where one step of 1/255 for all would round them away, and sums to 1 as
the softmax's does. Padded tokens weigh exactly 0. Both products are of integers then; all factors are outside the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from .. import config
from ..errors import UserError
from . import ActivationQuantizer, PassThrough, find, numeric
from .kernels import ROUND

KEY = "Slim.quant.attention"
LARGEST = 255  # of the integers of softmax weights


class SelfAttention(paddle.nn.Layer):
    """Paddle's attention with the projections of one that is there, in steps for subclasses to change.

    query [batch, queries, hidden], key and value [batch, keys, hidden], an additive mask -> [batch, queries, hidden].
    """

    def __init__(self, attention: paddle.nn.Layer):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.out_proj = attention.out_proj
        self.num_heads, self.head_dim, self.dropout = attention.num_heads, attention.head_dim, attention.dropout

    def forward(self, query, key=None, value=None, attn_mask=None, cache=None):
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self.projected(query, key, value)
        weights = self.weigh(paddle.matmul(q * self.head_dim**-0.5, k, transpose_y=True), attn_mask)
        weights = F.dropout(weights, self.dropout, training=self.training)
        return self.out_proj(
            paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, self.num_heads * self.head_dim])
        )

    def projected(self, query, key, value):
        """Queries, keys and values by head, [batch, heads, tokens, head_dim]."""
        return self.by_head(self.q_proj(query)), self.by_head(self.k_proj(key)), self.by_head(self.v_proj(value))

    def weigh(self, scores, mask):
        """The weights of scores [batch, heads, queries, keys]."""
        return F.softmax(scores if mask is None else scores + mask)

    def by_head(self, x):
        return x.reshape([0, 0, self.num_heads, self.head_dim]).transpose([0, 2, 1, 3])


def weights_on_grid(weights: paddle.Tensor) -> paddle.Tensor:
    """u / sum u of the softmax's weights [..., keys]: see above.

    In two dimensions: of more, oneDNN divides rows by numbers of their own 30 times as slowly.
    """
    rows = weights.flatten(0, -2)
    u = rows / rows.max(axis=-1, keepdim=True).scale(1 / LARGEST)
    u = u.scale(1.0, ROUND).scale(1.0, -ROUND)
    return (u / u.sum(axis=-1, keepdim=True)).reshape(paddle.shape(weights))


class SoftmaxWeights(paddle.nn.Layer):
    """`weights_on_grid` forward, identity backward."""

    def forward(self, weights):
        return PassThrough.apply(weights, weights_on_grid)


class QuantizedAttention(SelfAttention):
    """Attention in training and simulation: what goes into its two products lies on grids."""

    def __init__(self, attention: paddle.nn.Layer, options: config.AttentionQuant):
        super().__init__(attention)
        kind = find(options.quantizer, ActivationQuantizer)
        self._fake_quant_query, self._fake_quant_key, self._fake_quant_value = (kind(options) for _ in range(3))
        self._fake_quant_weights = SoftmaxWeights()

    def projected(self, query, key, value):
        q, k, v = super().projected(query, key, value)
        return self._fake_quant_query(q), self._fake_quant_key(k), self._fake_quant_value(v)

    def weigh(self, scores, mask):
        return self._fake_quant_weights(super().weigh(scores, mask))

    def stop_rounding(self) -> None:
        """Compute in fp32 from now on."""
        for part in ("query", "key", "value", "weights"):
            setattr(self, f"_fake_quant_{part}", paddle.nn.Identity())

    def grid(self) -> AttentionGrid:
        """What is deployed; UserError if a range was never set."""
        quantizers = self._fake_quant_query, self._fake_quant_key, self._fake_quant_value
        for quantizer in quantizers:
            quantizer.check_calibrated()
        query, key, value = (float(quantizer.step()) for quantizer in quantizers)
        return AttentionGrid(query, key, value, self._fake_quant_query.bits)


@dataclass(frozen=True)
class AttentionGrid:
    """Steps of queries (before they are divided by the root of the head width), keys and values, and their bits."""

    query: float
    key: float
    value: float
    bits: int


class DeployedAttention(SelfAttention):
    """The same without quantizers: plain operators, which every engine has."""

    def __init__(self, attention: QuantizedAttention):
        super().__init__(attention)
        self.grid = attention.grid()

    def projected(self, query, key, value):
        steps = self.grid.query, self.grid.key, self.grid.value
        return tuple(self.on_grid(x, step) for x, step in zip(super().projected(query, key, value), steps))

    def weigh(self, scores, mask):
        return weights_on_grid(super().weigh(scores, mask))

    def on_grid(self, x, step):
        high = numeric.qmax(self.grid.bits)
        grid = F.hardtanh(x.scale(float(np.float32(1) / np.float32(step))), -high - 1, high)
        return grid.scale(1.0, ROUND).scale(1.0, -ROUND).scale(step)


def fill(model: paddle.nn.Layer, options: config.AttentionQuant) -> None:
    """Put a QuantizedAttention in place of each of Paddle's.

    UserError where the model has none, or for options that cannot be deployed.
    """
    if options.offset:
        raise UserError(f"{KEY}.offset: true: the products of attention have no bias that could take it; say false")
    found = 0
    for parent in model.sublayers(include_self=True):
        for name, layer in list(parent.named_children()):
            if type(layer) is paddle.nn.MultiHeadAttention:
                setattr(parent, name, QuantizedAttention(layer, options))
                found += 1
    if not found:
        raise UserError(f"{KEY}: the model has no paddle.nn.MultiHeadAttention")


def stop_rounding(model: paddle.nn.Layer) -> None:
    """Have all attention compute in fp32, in place."""
    for layer in model.sublayers():
        if isinstance(layer, QuantizedAttention):
            layer.stop_rounding()


def described(options: config.AttentionQuant) -> str:
    """A line for plan.txt."""
    range_ = f", range {options.range}" if options.quantizer == "minmax" else ""
    return f"attention: queries, keys and values A{options.bits} {options.quantizer}{range_}; softmax weights 8 bits unsigned"
