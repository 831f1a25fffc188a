"""A quantized model -> an explicit quantize/dequantize (QDQ) program, which TensorRT takes as it is.

    Y = dequantize(quantize(X)) @ dequantize(W int8) + bias

for each quantized Linear: X per tensor, W per tensor or per output channel. Nothing else is quantized, because training quantized
nothing else. Both operators round half to even and saturate at -128 and 127, in TensorRT as in Paddle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle.base import core

from ..errors import UserError
from ..quantizers import numeric
from ..quantizers.attach import LayerGrid
from ..quantizers.attention import QuantizedAttention
from . import program

BITS, QMAX = 8, numeric.qmax(8)
PER_TENSOR, COLUMNS = -1, 1  # quant_axis; a matmul's weight is [in, out]
HALF_TO_EVEN = 0  # round_type
QUANTIZE, DEQUANTIZE, MATMUL = "quantize_linear", "dequantize_linear", "matmul_v2"


def save(model: paddle.nn.Layer, path: Path, input_spec: list | None = None) -> None:
    """Write the QDQ program of a quantized model to `path`.pdmodel and .pdiparams.

    Raises UserError for attention on integers, whose weights are in units of each query's largest: a TensorRT quantizer has one
    scale a tensor. Raises RuntimeError if the program breaks a rule of TensorRT's: an internal error.
    """
    if any(isinstance(layer, QuantizedAttention) for layer in model.sublayers()):
        raise UserError("Export.target: tensorrt: Slim.quant.attention is for CPUs; quantize without it, or say onednn")
    grids = program.save_quantized(model, path, compile_qdq, input_spec)
    broken = broken_rules(path, len(grids))
    if broken:
        raise RuntimeError("TensorRT would refuse the program or compute another: " + "; ".join(broken))


def compile_qdq(source: Path, target: Path, grids: dict[str, LayerGrid]) -> None:
    """fp32 program with on-grid weights -> QDQ program. `grids` is keyed by weight parameter name.

    A Linear without a grid stays in fp32. Raises RuntimeError if a grid finds no matmul of its name: an internal error.
    """

    def change(plain: paddle.static.Program, scope: core.Scope) -> paddle.static.Program:
        inserter = _Inserter(plain.global_block(), scope)
        matmuls = {op.input("Y")[0]: op for op in plain.global_block().ops if op.type == MATMUL}
        missing = sorted(set(grids) - set(matmuls))
        if missing:
            raise RuntimeError(f"no {MATMUL} operator for {missing}")
        for weight, grid in grids.items():
            inserter.quantize(matmuls[weight], weight, grid)
        return plain

    program.rewrite(source, target, change)


class _Inserter:
    """Puts quantize and dequantize operators before matmuls; one pair for all that read one tensor with one step."""

    def __init__(self, block: paddle.static.Block, scope: core.Scope):
        self.block, self.scope = block, scope
        self._activations: dict[tuple[str, float], str] = {}

    def quantize(self, matmul, weight: str, grid: LayerGrid) -> None:
        x = matmul.input("X")[0]
        matmul._rename_input(x, self._activation(matmul, x, grid.activation_step))
        matmul._rename_input(weight, self._weight(matmul, weight, grid.weight_step))

    def _activation(self, before, x: str, step: float) -> str:
        known = self._activations.get((x, step))
        if known is None:
            stem = f"{x}.{len(self._activations)}"
            scale = self._scale(stem, np.array([step]))
            quantized = self._apply(QUANTIZE, before, x, f"{stem}.quantized", scale, PER_TENSOR)
            known = self._apply(DEQUANTIZE, before, quantized, f"{stem}.dequantized", scale, PER_TENSOR)
            self._activations[x, step] = known
        return known

    def _weight(self, before, weight: str, step: np.ndarray) -> str:
        """The weight replaced by its integers."""
        values = np.array(self.scope.find_var(weight).get_tensor())
        integers = np.rint(values / step).astype(np.int8)
        stored = self._parameter(f"{weight}.int8", integers)
        self.block._remove_var(weight)
        axis = PER_TENSOR if step.size == 1 else COLUMNS
        return self._apply(DEQUANTIZE, before, stored, f"{weight}.dequantized", self._scale(weight, step), axis)

    def _scale(self, stem: str, step: np.ndarray) -> dict[str, str]:
        """Inputs `Scale`, which these operators divide by 127, and `ZeroPoint`."""
        return {
            "Scale": self._parameter(f"{stem}.range", (step * QMAX).astype(np.float32)),
            "ZeroPoint": self._parameter(f"{stem}.zero_point", np.zeros(step.shape, np.int32)),
        }

    def _parameter(self, name: str, values: np.ndarray) -> str:
        self.block.create_var(
            name=name, shape=values.shape, dtype=str(values.dtype), persistable=True, stop_gradient=True
        )
        self.scope.var(name).get_tensor().set(values, paddle.CPUPlace())
        return name

    def _apply(self, kind: str, before, x: str, y: str, scale: dict[str, str], axis: int) -> str:
        self.block.create_var(name=y, shape=self.block.var(x).shape, dtype="float32")
        self.block._insert_op_without_sync(
            self.block.ops.index(before),
            type=kind,
            inputs={"X": [x], **{name: [var] for name, var in scale.items()}},
            outputs={"Y": [y]},
            attrs={"quant_axis": axis, "bit_length": BITS, "round_type": HALF_TO_EVEN, "is_test": True},
        )
        return y


def broken_rules(path: Path, linears: int) -> list[str]:
    """What in a saved QDQ program TensorRT's rules forbid; `linears`: how many Linears it quantizes.

    The rules (NVIDIA's TensorRT documentation, "Working with quantized types", operators Quantize and Dequantize): scales are
    positive build-time constants, zero points are 0, activations have one scale, weights one or one for each output channel,
    weights are in -127..127, both inputs of a matmul are quantized or none, nothing but matmuls reads what was dequantized, and
    a tensor is written once.
    """
    with program.static_mode():
        scope = core.Scope()
        with paddle.static.scope_guard(scope):
            executor = paddle.static.Executor(paddle.CPUPlace())
            loaded, _, _ = paddle.static.load_inference_model(str(path), executor)
            return list(_Rules(loaded.global_block(), scope).broken(linears))


class _Rules:
    def __init__(self, block: paddle.static.Block, scope: core.Scope):
        self.ops, self.scope = block.ops, scope
        self.stored = {name for name, var in block.vars.items() if var.persistable}
        self.made = {op.output("Y")[0]: op for op in self.ops if op.type in (QUANTIZE, DEQUANTIZE)}

    def broken(self, linears: int) -> Iterator[str]:
        for op in self.made.values():
            yield from (f"{op.type} of {op.input('X')[0]}: {what}" for what in self._of_one(op))
            yield from self._of_readers(op)
        quantized = 0
        for op in self.ops:
            if op.type == MATMUL:
                inputs = [self.made.get(op.input(side)[0]) for side in "XY"]
                quantized += all(inputs)
                if any(inputs) and not all(inputs):
                    yield f"{MATMUL} of {op.input('X')[0]}: one of its inputs is not quantized"
        written = Counter(name for op in self.ops for name in op.output_arg_names if op.type not in ("feed", "fetch"))
        yield from (f"{name} is written {times} times" for name, times in written.items() if times > 1)
        if quantized != linears:
            yield f"{quantized} matmuls are quantized, not {linears}"

    def _of_one(self, op) -> Iterator[str]:
        if (op.attr("bit_length"), op.attr("round_type")) != (BITS, HALF_TO_EVEN):
            yield "not 8 bits, rounded half to even"
        constants = [op.input(name)[0] for name in ("Scale", "ZeroPoint")]
        if not self.stored.issuperset(constants):
            yield "its scale or zero point is no constant"
            return
        scale, zero_point = map(self._values, constants)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            yield "its scale is not positive"
        if zero_point.shape != scale.shape or zero_point.any():
            yield "its zero point is not 0"
        if not self._is_weight(op):
            if scale.size != 1 or op.attr("quant_axis") != PER_TENSOR:
                yield "an activation has one scale"
            return
        weight = self._values(op.input("X")[0])
        if weight.dtype != np.int8 or np.abs(weight.astype(int)).max(initial=0) > QMAX:
            yield "a weight is int8 in -127..127"
        if (scale.shape, op.attr("quant_axis")) not in (((1,), PER_TENSOR), ((weight.shape[-1],), COLUMNS)):
            yield "a weight has one scale, or one for each column"

    def _of_readers(self, op) -> Iterator[str]:
        """Quantized tensors go to a dequantize of the same scale, dequantized ones to their side of a matmul, as they lie."""
        y = op.output("Y")[0]
        for reader in self.ops:
            if y not in reader.input_arg_names:
                continue
            if op.type == QUANTIZE:
                right = reader.type == DEQUANTIZE and reader.input("Scale") == op.input("Scale")
            elif self._is_weight(op):
                right = reader.type == MATMUL and reader.input("Y") == [y] and not reader.attr("trans_y")
            else:
                source = self.made.get(op.input("X")[0])
                right = reader.type == MATMUL and reader.input("X") == [y] and source is not None
            if not right:
                yield f"{reader.type} reads {y}"

    def _is_weight(self, op) -> bool:
        return op.type == DEQUANTIZE and op.input("X")[0] in self.stored

    def _values(self, name: str) -> np.ndarray:
        return np.array(self.scope.find_var(name).get_tensor())
