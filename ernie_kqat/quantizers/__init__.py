"""Quantizers: how a tensor becomes low-bit. One file a quantizer; file name = config key.

A file defines one subclass of `WeightQuantizer` and/or of `ActivationQuantizer`, built from its options dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle.autograd import PyLayer

from .. import plugins
from ..errors import UserError
from . import numeric
from .kernels import learned_step_slopes, on_grid

NO_QUANTIZERS = ("numeric", "kernels", "attach", "attention", "embedding")  # files of this folder that define none
Kind = TypeVar("Kind", bound="Quantizer")


class StraightThrough(PyLayer):
    """`on_grid` forward, identity backward (the straight-through estimator that PaddleSlim's quantizers use)."""

    @staticmethod
    def forward(ctx, x, step, low, high):
        return on_grid(x, step, low, high)

    @staticmethod
    def backward(ctx, grad):
        return grad


class PassThrough(PyLayer):
    """`quantize(x)` forward, identity backward: the straight-through estimator for any rule of quantization."""

    @staticmethod
    def forward(ctx, x, quantize):
        return quantize(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class LearnedStep(PyLayer):
    """`on_grid` forward; backward as in LSQ (arXiv 1902.08153, equations 3 and 5): x passes inside the range only, and

        dQ/dstep = round(x / step) - x / step inside, low or high outside,   times 1 / sqrt(N qmax)

    summed over what shares the step; N: how many values that is, `copies` times x's own (in several processes each sees a share
    of an activation). The factor keeps steps from filling the clipped norm.
    """

    @staticmethod
    def forward(ctx, x, step, low, high, copies=1):
        quantized = on_grid(x, step, low, high)
        ctx.save_for_backward(x, step, quantized)
        ctx.bounds, ctx.frozen, ctx.copies = (low, high), x.stop_gradient, copies
        return quantized

    @staticmethod
    def backward(ctx, grad):
        x, step, quantized = ctx.saved_tensor()
        low, high = ctx.bounds
        inside, slope = learned_step_slopes(x, step, quantized, grad, low, high)
        total = slope.sum(axis=0) if step.size > 1 else slope.sum().reshape([1])
        return None if ctx.frozen else inside, total * (1.0 / math.sqrt(ctx.copies * x.size / step.size * high))


class Quantizer(paddle.nn.Layer):
    """Maps a float tensor to the nearest points of a low-bit grid, step x {low..high}, and passes gradients through."""

    bits: int
    low: int
    high: int

    def step(self) -> paddle.Tensor:
        """Real value of one integer, float32, [channels] or [1]."""
        raise TypeError(f"{type(self).__name__} does not define step()")

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class WeightQuantizer(Quantizer):
    """Symmetric, integers in ±(2^(bits-1) - 1); forward(weight [in, out]) -> the weight on its grid."""

    allowed_bits: Sequence[int] = range(2, 9)
    columns_alone = (
        False  # whether some columns are quantized without the others, and must come out the same bit for bit
    )
    nearest = True  # forward takes the nearest point of the grid, so that its step says all
    learning_rate = 1.0  # of the weight, as a multiple

    def __init__(self, options: Any, weight: paddle.Tensor):
        super().__init__()
        self.options = options
        self.bits = options.bits
        self.high = max(1, numeric.qmax(options.bits))
        self.low = -self.high

    def begin(self, weight: paddle.Tensor) -> None:
        """Set the state that only the start of training gives; not called where a stored state is loaded."""

    def integers(self, weight: paddle.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What is deployed: int8 [in, out] and step float32 ([out] or [1]); integers x step = forward(weight) in eval mode."""
        step = self.current_step(weight).numpy()
        return numeric.integers(weight.numpy(), step, self.high).astype(np.int8), step

    def current_step(self, weight: paddle.Tensor) -> paddle.Tensor:
        """The step for this very weight, without changing any state."""
        return self.step()

    def sums(self, values: paddle.Tensor) -> paddle.Tensor:
        """Of each group of values [in, out]: [out] or [1]. Over axis 0 as a matrix product, which is vectorized where
        Paddle's sum is not; but its last bits depend on the columns beside one."""
        if self.options.granularity == "channel" and self.columns_alone:
            return values.sum(axis=0)
        if self.options.granularity == "channel":
            return paddle.matmul(paddle.ones([1, values.shape[0]]), values).reshape([-1])
        return values.sum().reshape([1])

    def means(self, values: paddle.Tensor) -> paddle.Tensor:
        """Of each group of values [in, out]: [out] or [1]."""
        return self.sums(values) / (values.shape[0] if self.options.granularity == "channel" else values.size)


class ActivationQuantizer(Quantizer):
    """Signed, per tensor, integers in -2^(bits-1)..2^(bits-1) - 1: the engine's int8 saturates at -128, not at -127."""

    def __init__(self, options: Any):
        super().__init__()
        self.options = options
        self.bits = options.bits
        self.high = numeric.qmax(options.bits)
        self.low = -self.high - 1

    def share(self, other: ActivationQuantizer) -> None:
        """Use the trained parameters of `other`, which reads the same tensor by the same rule."""

    def set_step(self, step: float) -> None:
        """Make this the step, until training moves it on."""
        raise TypeError(f"{type(self).__name__} does not define set_step()")

    def offset(self) -> float:
        """What is subtracted before rounding, and added again after it; deployed in the layer's bias."""
        return 0.0

    def calibrated(self) -> bool:
        """Whether the range was ever set."""
        return True

    def check_calibrated(self) -> None:
        """Raise UserError if the range was never set."""
        if not self.calibrated():
            raise UserError("an activation range was never set: calibrate or train before evaluating a quantized model")


def check_bits(options: Any, key: str, name: str) -> None:
    """Raise UserError unless the quantizer of these options of layer `name` has their bits; `key` is for the message."""
    allowed = find(options.quantizer, WeightQuantizer).allowed_bits
    if options.bits not in allowed:
        raise UserError(
            f"{key}: {options.bits} for {name}; quantizer {options.quantizer} has"
            f" {allowed[0]}{f' to {allowed[-1]}' if len(allowed) > 1 else ''}"
        )


def names() -> list[str]:
    """The quantizers there are: files of this folder that define one."""
    return [name for name in plugins.names(__name__) if name not in NO_QUANTIZERS]


def find(name: str, kind: type[Kind]) -> type[Kind]:
    """The subclass of `kind` (WeightQuantizer or ActivationQuantizer) in quantizers/<name>.py; UserError if there is none."""
    cls = plugins.defined(__name__, name, kind) if name in names() else None
    if cls is not None:
        return cls
    raise UserError(f"quantizer: {name!r} is not one of {', '.join(names())}")
