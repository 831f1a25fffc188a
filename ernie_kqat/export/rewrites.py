"""Cheaper programs that compute the same: each rewrite leaves out work, none changes a formula. `Export.rewrites` switches them.

`first_token` and `positions` change the model before it becomes a program, `activations` and `context` the compiled program. A
rewrite that does not find its pattern leaves everything as it is.
"""

from __future__ import annotations

import paddle
from paddle.base import core

from .. import config
from ..models.heads import reads_first_token

ACTIVATIONS = {"gelu": ("gelu_tanh", "gelu_erf"), "tanh": ("tanh", "tanh")}  # oneDNN's names: approximate or not
ALL = config.Rewrites()
SWAP = [0, 2, 1, 3]  # heads and tokens


def rewrite_model(model: paddle.nn.Layer, chosen: config.Rewrites) -> None:
    """Rewrite a deployable ERNIE with a head in place; other models have nothing to rewrite."""
    ernie = getattr(model, "ernie", None)
    if ernie is None:
        return
    if chosen.first_token and reads_first_token(model) and not ernie.encoder.layers[-1].normalize_before:
        ernie.encoder.layers[-1] = FirstTokenLayer(ernie.encoder.layers[-1])
    if chosen.positions:
        ernie.embeddings = EmbeddingsInOrder(ernie.embeddings)


def rewrite_program(program: paddle.static.Program, chosen: config.Rewrites) -> None:
    """Rewrite a compiled INT8 program in place."""
    block = program.global_block()
    if chosen.activations:
        _int8_activations(block)
    if chosen.context:
        _context_in_rows(block)


class FirstTokenLayer(paddle.nn.Layer):
    """The last encoder layer where only its first token is looked at: [batch, tokens, hidden] -> [batch, 1, hidden].

    Keys and values are those of all tokens; the query, the output projection and the feed-forward are the first one's.
    """

    def __init__(self, layer: paddle.nn.TransformerEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, src, src_mask=None, **_):
        layer, first = self.layer, src[:, :1]
        attended = layer.norm1(first + layer.self_attn(first, src, src, src_mask))
        return layer.norm2(attended + layer.linear2(layer.activation(layer.linear1(attended))))


class EmbeddingsInOrder(paddle.nn.Layer):
    """ERNIE's embeddings of tokens at positions 0, 1, 2, …: a slice of the table, not a lookup of counted ones."""

    def __init__(self, embeddings: paddle.nn.Layer):
        super().__init__()
        self.embeddings = embeddings

    def forward(self, input_ids=None, token_type_ids=None, **_):
        held = self.embeddings
        found = held.word_embeddings(input_ids)
        found = found + held.position_embeddings.weight[: paddle.shape(input_ids)[1]]
        if held.type_vocab_size > 0:
            found = found + held.token_type_embeddings(token_type_ids)
        if held.use_task_id:
            found = found + held.task_type_embeddings.weight[held.task_id]
        return held.layer_norm(found)


def _int8_activations(block) -> None:
    """fc, activation, quantize -> one fc that writes the very integers. At load Paddle would fuse the first two only."""
    for op in [op for op in block.ops if op.type in ACTIVATIONS]:
        linear, readers = _writer(block, op.input("X")[0]), _readers(block, op.output("Out")[0])
        if linear is None or linear.type != "fc" or "Scale_in" not in linear.attr_names:
            continue
        if [reader.type for reader in readers] != ["quantize"] or len(_readers(block, op.input("X")[0])) != 1:
            continue
        (quantize,) = readers
        exact = not (op.type == "gelu" and op.attr("approximate"))
        linear._set_attr("fuse_activation", ACTIVATIONS[op.type][exact])
        linear._set_attr("fuse_alpha", 0.0)
        linear._set_attr("fuse_beta", 0.0)
        linear._set_attr("Scale_out", quantize.attr("Scale"))
        linear._set_attr("force_fp32_output", False)
        integers = quantize.output("Output")[0]
        linear._rename_output(op.input("X")[0], integers)
        block.var(integers).desc.set_dtype(core.VarDesc.VarType.INT8)
        for gone in (op, quantize):
            block._remove_op(block.ops.index(gone))


def _context_in_rows(block) -> None:
    """matmul, transpose, reshape of the heads' outputs -> one matmul that writes rows of tokens."""
    for transpose in [op for op in block.ops if op.type == "transpose2" and op.attr("axis") == SWAP]:
        product, readers = _writer(block, transpose.input("X")[0]), _readers(block, transpose.output("Out")[0])
        if product is None or product.type != "matmul_v2" or [reader.type for reader in readers] != ["reshape2"]:
            continue
        (reshape,) = readers
        rows = reshape.output("Out")[0]
        attributes = {
            **{name: product.attr(name) for name in ("trans_x", "trans_y")},
            "fused_transpose_Out": SWAP,
            "fused_reshape_Out": [0, 0, block.var(rows).shape[-1]],
            "use_mkldnn": True,
        }
        inputs = {name: product.input(name) for name in ("X", "Y")}
        at = block.ops.index(product)
        for gone in (product, transpose, reshape):
            block._remove_op(block.ops.index(gone))
        block._insert_op(at, type="fused_matmul", inputs=inputs, outputs={"Out": [rows]}, attrs=attributes)


def _writer(block, name: str):
    return next((op for op in block.ops if name in op.output_arg_names), None)


def _readers(block, name: str) -> list:
    return [op for op in block.ops if name in op.input_arg_names]
