"""A program's matrices as int8 integers and steps: a quarter of the file, the same floats.

What is written is q and step with float32(q) * step = matrix in every bit, found from the values (packed/grid.py). A weight
gets the two operators that multiply them in front of the program; Paddle's constant folding runs them once, when the program
is loaded. A table of embeddings stays int8 in memory, too: its rows are multiplied where they are looked up.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle.base import core

from ..packed.grid import recover

LOOKUP = "lookup_table_v2"


def integers_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """q int8 [rows, columns] and step float32 [1], [columns] or [rows, 1] of a float32 [rows, columns]; None: on no grid."""
    if not matrix.size:
        return None
    for axis in (None, 0, 1):  # what shares a step: all, a column, a row
        groups = matrix.reshape(1, -1) if axis is None else matrix.T if axis == 0 else matrix
        found = recover(np.ascontiguousarray(groups))
        if found is not None:
            q, step = found
            q = q.T if axis == 0 else q.reshape(matrix.shape)
            return np.ascontiguousarray(q), step[:, None] if axis == 1 else step
    return None


def store_integers(program: paddle.static.Program, scope: core.Scope) -> None:
    """Have a program keep its matrices on grids as int8, in place; those on none stay as they are."""
    block = program.global_block()
    lookups = {op.input("W")[0] for op in block.ops if op.type == LOOKUP}
    read = {name for op in block.ops if op.type not in ("feed", "fetch") for name in op.input_arg_names}
    for name in sorted(read):
        var = block.var(name)
        if not (var.persistable and var.dtype == paddle.float32 and len(var.shape) == 2):
            continue
        found = integers_of(np.array(scope.find_var(name).get_tensor()))
        if found is None:
            continue
        q, step = (_stored(block, scope, f"{name}.{what}", array) for what, array in zip(("integers", "step"), found))
        if name in lookups:
            _look_up_integers(block, name, q, step)
        else:
            _multiply_first(block, var, q, step)


def _stored(block, scope: core.Scope, name: str, array: np.ndarray):
    var = block.create_var(name=name, shape=array.shape, dtype=str(array.dtype), persistable=True, stop_gradient=True)
    scope.var(name).get_tensor().set(array, core.CPUPlace())
    return var


def _multiply_first(block, weight, q, step) -> None:
    weight.persistable = False
    _multiply(block, 0, q, step, weight)


def _look_up_integers(block, table: str, q, step) -> None:
    """Have each lookup of `table` look up integers and, where each row has its own, steps."""
    for op in [op for op in block.ops if op.type == LOOKUP and op.input("W")[0] == table]:
        at, ids, out = block.ops.index(op), op.input("Ids"), block.var(op.output("Out")[0])
        integers = block.create_var(name=f"{out.name}.integers", shape=out.shape, dtype=q.dtype)
        op._rename_input(table, q.name)
        op._rename_output(out.name, integers.name)
        steps = step
        if len(step.shape) == 2:
            steps = block.create_var(name=f"{out.name}.step", shape=[*out.shape[:-1], 1], dtype=step.dtype)
            found = {"outputs": {"Out": [steps]}, "attrs": {"padding_idx": op.attr("padding_idx")}}
            block._insert_op(at, type=LOOKUP, inputs={"Ids": ids, "W": [step]}, **found)
            at += 1
        _multiply(block, at + 1, integers, steps, out)


def _multiply(block, at: int, q, step, product) -> None:
    """Insert product = float32(q) * step."""
    floats = block.create_var(name=f"{q.name}.floats", shape=q.shape, dtype=step.dtype)
    types = {"in_dtype": q.dtype, "out_dtype": floats.dtype}
    block._insert_op(at, type="cast", inputs={"X": [q]}, outputs={"Out": [floats]}, attrs=types)
    factors = {"X": [floats], "Y": [step]}
    block._insert_op(at + 1, type="elementwise_mul", inputs=factors, outputs={"Out": [product]}, attrs={"axis": -1})
