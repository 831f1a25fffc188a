"""Low-bit embeddings: what is looked up lies on the grid of its row. Papers: TernaryBERT (arXiv 2009.12812, section 3.1) and
BinaryBERT (arXiv 2012.15701) quantize the word embedding row by row, with the quantizer of their weights.

A row of a table is to a quantizer what an output channel of a weight is, so every WeightQuantizer serves: it is given the
rows of one lookup, transposed, with their share of its state. The table is never rounded whole, unless one step is for all
of it. Differs from the papers: the padding token's row is zero, as Paddle's lookup makes it, at one bit, too.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from .. import config, rules, strict
from ..errors import UserError
from . import WeightQuantizer, check_bits, find

KEY = "Slim.quant.embedding"
WORDS = "word_embeddings"  # the table that is quantized without a rule


@dataclass(frozen=True)
class TablePlan:
    """How one Embedding is quantized; None: left in fp32."""

    name: str
    table: config.TableQuant | None

    def __str__(self) -> str:
        if self.table is None:
            return f"{self.name}: fp32"
        kind = f"{self.table.quantizer} split" if self.table.split else self.table.quantizer
        range_ = f", range {self.table.range}" if self.table.quantizer == "minmax" else ""
        return f"{self.name}: {self.table.bits} bits, {kind} per {self.table.granularity}{range_}"


class QuantizedEmbedding(paddle.nn.Layer):
    """An Embedding of `weight` [rows, features] whose lookups are on their grids; gradients pass as the quantizer says."""

    def __init__(self, embedding: paddle.nn.Embedding, options: config.TableQuant, begin: bool = True):
        super().__init__()
        self.weight = embedding.weight
        self._padding = embedding._padding_idx
        self._by_row = options.granularity == "row"
        values = {item.name: getattr(options, item.name) for item in dataclasses.fields(config.WeightQuant)}
        of_weight = config.WeightQuant(**{**values, "granularity": "channel" if self._by_row else "tensor"})
        self._fake_quant_weight = find(options.quantizer, WeightQuantizer)(of_weight, self.weight.T)
        self.weight.optimize_attr["learning_rate"] *= self._fake_quant_weight.learning_rate
        self._fake_quant_weight.columns_alone = True
        if begin:
            self._fake_quant_weight.begin(self.weight.T)

    def forward(self, ids):
        if not self._by_row:
            return F.embedding(ids, self._fake_quant_weight(self.weight.T).T, padding_idx=self._padding)
        wanted = ids.numpy()
        rows = np.unique(wanted)
        quantized = self._quantized(paddle.to_tensor(rows))
        padding = np.flatnonzero(rows == self._padding)
        places = paddle.to_tensor(np.searchsorted(rows, wanted))
        return F.embedding(places, quantized, padding_idx=int(padding[0]) if padding.size else None)

    def _quantized(self, rows: paddle.Tensor) -> paddle.Tensor:
        """These rows on their grids, [n, features], by a quantizer that has their share of the table's state."""
        quantizer = self._fake_quant_weight
        state = {**quantizer._parameters, **quantizer._buffers}
        state = {name: paddle.gather(value, rows, axis=value.ndim - 1) for name, value in state.items()}
        part = copy.copy(quantizer)
        part.__dict__.update(_parameters={}, _buffers={name: value.clone() for name, value in state.items()})
        quantized = part(F.embedding(rows, self.weight).T).T
        for name, whole in quantizer._buffers.items():  # a range that follows its weight has moved: keep that
            if self.training and not paddle.equal_all(part._buffers[name], state[name]):
                values = whole.numpy()
                values[..., rows.numpy()] = part._buffers[name].numpy()
                whole.set_value(values)
        return quantized

    def deployed(self) -> paddle.nn.Embedding:
        """A plain Embedding of the same lookups."""
        q, step = self._fake_quant_weight.integers(self.weight.T)
        plain = paddle.nn.Embedding(*self.weight.shape, padding_idx=self._padding)
        plain.weight.set_value((q.astype(np.float32) * step).T)
        return plain

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


def make_plan(model: paddle.nn.Layer, options: config.EmbeddingQuant) -> list[TablePlan]:
    """One TablePlan for each Embedding, in model order; UserError for a rule that is wrong or matches nothing."""
    names = [name for name, layer in model.named_sublayers() if type(layer) is paddle.nn.Embedding]
    matched = rules.match(options.tables or [], names, f"{KEY}.tables")
    for name in names:
        if name.rpartition(".")[2] == WORDS:
            matched.setdefault(name, {})
    if not matched:
        raise UserError(f"{KEY}: the model has no Embedding named {WORDS}; name its tables in {KEY}.tables")
    return [TablePlan(name, _table(name, options, matched.get(name, "skip"))) for name in names]


def _table(name: str, options: config.EmbeddingQuant, override) -> config.TableQuant | None:
    if override == "skip":
        return None
    if not isinstance(override, dict):
        raise UserError(f"{KEY}.tables: {override!r} is not `skip` or {{…}}")
    base = {item.name: getattr(options, item.name) for item in dataclasses.fields(config.TableQuant)}
    table = strict.build(config.TableQuant, {**base, **override}, f"{KEY}.tables ({name})", "config")
    check_bits(table, f"{KEY}.bits", name)
    return table


def fill(model: paddle.nn.Layer, plan: list[TablePlan], begin: bool = True) -> None:
    """Put a QuantizedEmbedding in place of each Embedding that is to be quantized.

    begin: False where a stored state is loaded next.
    """
    layers = dict(model.named_sublayers(include_self=True))
    for entry in plan:
        if entry.table is not None:
            parent, _, leaf = entry.name.rpartition(".")
            setattr(layers[parent], leaf, QuantizedEmbedding(layers[entry.name], entry.table, begin))
