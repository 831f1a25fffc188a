"""The loops over every weight and activation: by operators of our own where the native library is built, else by Paddle's.

Which of the two runs changes no bit, only the time: Paddle's operators make four to ten passes over memory, ours one.
"""

from __future__ import annotations

import functools

import paddle
from paddle.base import core

from .. import native

ROUND = 12582912.0  # 1.5 x 2^23: adding and subtracting it rounds float32 half to even, as oneDNN does (paddle.round does not)


@functools.cache
def built() -> bool:
    """Whether the library is there (tools/build_native.py) and training is on the CPU."""
    return paddle.get_device() == "cpu" and native.known()


def rounded(x: paddle.Tensor, step: paddle.Tensor, low: int, high: int) -> paddle.Tensor:
    """round-half-even(clip(x / step, low, high)), as float32; the arithmetic of oneDNN's quantize op, which multiplies by 1/step.

    Of Paddle's operators that could do it, these are vectorized on a CPU: hardtanh and not clip, scale with a number and not
    an operator with a one-element tensor.
    """
    grid = x.scale(float(1.0 / step)) if step.size == 1 else x * (1.0 / step)
    grid = paddle.nn.functional.hardtanh(grid, low, high)
    return grid.scale_(1.0, ROUND).scale_(1.0, -ROUND)


def times(values: paddle.Tensor, factor: paddle.Tensor) -> paddle.Tensor:
    """Values [in, out] x factor [out] or [1], in place."""
    return values.scale_(float(factor)) if factor.size == 1 else values.multiply_(factor)


@paddle.no_grad()
def on_grid(x: paddle.Tensor, step: paddle.Tensor, low: int, high: int) -> paddle.Tensor:
    """step * round-half-even(clip(x / step, low, high)); step [1], or one of each of the last axis. No gradient passes."""
    if built():
        return core.eager._run_custom_op("ernie_kqat_on_grid", x, step, float(low), float(high))[0]
    return times(rounded(x, step, low, high), step)


@paddle.no_grad()
def column_peaks(weight: paddle.Tensor) -> paddle.Tensor:
    """max|w| of each column of [in, out], [out]; without the library by halving the rows: Paddle's max over axis 0 is not
    vectorized."""
    if built():
        return core.eager._run_custom_op("ernie_kqat_peaks", weight)[0]
    rest = weight.detach().abs()
    while rest.shape[0] > 1:
        half, odd = divmod(rest.shape[0], 2)
        folded = paddle.maximum(rest[:half], rest[half : 2 * half])
        rest = paddle.concat([folded, rest[2 * half :]]) if odd else folded
    return rest.reshape([-1])


@paddle.no_grad()
def peak(x: paddle.Tensor) -> paddle.Tensor:
    """max|x| of all values, [1]."""
    return (column_peaks(x).max() if built() else x.detach().abs().max()).reshape([1])


@paddle.no_grad()
def learned_step_slopes(
    x: paddle.Tensor, step: paddle.Tensor, quantized: paddle.Tensor, grad: paddle.Tensor, low: int, high: int
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Of LearnedStep's backward: grad where x is inside the range, and grad * dQ/dstep, whose sum is the step's gradient."""
    if built():
        inputs = (x, step, quantized, grad)
        inside, slope = core.eager._run_custom_op("ernie_kqat_learned_step", *inputs, float(low), float(high))
        return inside, slope
    ratio = x / step
    within = paddle.logical_and(ratio >= low, ratio <= high).astype(x.dtype)
    return grad * within, grad * (quantized / step - ratio * within)
