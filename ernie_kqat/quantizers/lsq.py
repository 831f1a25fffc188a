"""LSQ and LSQ+: the step is a parameter, trained with the task. Papers: arXiv 1902.08153 and 2004.09576.

    Q(v) = step * round(clip((v - offset) / step, low, high)) + offset          offset 0 but for LSQ+'s activations

    dQ/dstep   = round(u) - u inside, low or high outside                       u = (v - offset) / step
    dQ/doffset = 0 inside, 1 outside                                            both times 1 / sqrt(N high)

Differs from the papers: integers are symmetric for weights (±high), which every engine takes, and not high + 1 below; the
step begins at least squares, and at LSQ's 2 mean|v| / sqrt(high) with `init: mean` (docs/decisions/0032); that of an activation
with an offset at (max - min) / (high - low). LSQ+'s integers begin at 0 and so its offset is the lowest value: that is trained
here too, the engine's integers being signed, and offset = lowest - low * step. An activation's step is averaged over the
calibration batches and not taken from the first; a step that training would make negative is kept positive.

Deployment: a weight's step is as any other. An offset costs nothing in the INT8 product: the layer quantizes x - offset, and
offset * (column sums of its weight on the grid) goes into its bias; of the native operator, the offset's whole steps into its
integers (docs/decisions/0011).
"""

from __future__ import annotations

import math

import numpy as np
import paddle
from paddle.autograd import PyLayer

from .. import parallel
from . import ActivationQuantizer, LearnedStep, WeightQuantizer, numeric
from .kernels import learned_step_slopes, on_grid
from .minmax import SAMPLE

SMALLEST = 1e-8  # of a step


def initial_step(values: np.ndarray, high: int, axis: int | None = None) -> np.ndarray:
    """2 mean|v| / sqrt(high) over `axis`, float32 [channels] or [1] (1902.08153, section 2.1)."""
    mean = np.abs(np.asarray(values, np.float64)).mean(axis=axis).reshape(-1)
    return np.maximum(2 * mean / math.sqrt(high), SMALLEST).astype(np.float32)


class LearnedStepAndOffset(PyLayer):
    """LSQ+'s quantizer of a whole tensor: step and offset of shape [1]."""

    @staticmethod
    def forward(ctx, x, step, offset, low, high, copies=1):
        one = paddle.ones([1])
        scaled = (x - offset).scale_(float(1.0 / step))
        integers = on_grid(scaled, one, low, high)
        ctx.save_for_backward(scaled, one, integers)
        ctx.bounds, ctx.frozen, ctx.copies = (low, high), x.stop_gradient, copies
        whole, rest = numeric.whole_steps(float(offset), float(step))
        return integers.scale(float(step), whole, bias_after_scale=False).scale_(1.0, rest)

    @staticmethod
    def backward(ctx, grad):
        scaled, one, integers = ctx.saved_tensor()
        low, high = ctx.bounds
        inside, slope = learned_step_slopes(scaled, one, integers, grad, low, high)
        factor = 1.0 / math.sqrt(ctx.copies * scaled.size * high)
        of_offset = (grad - inside).sum().reshape([1]) * factor
        return None if ctx.frozen else inside, slope.sum().reshape([1]) * factor, of_offset


class LSQWeight(WeightQuantizer):
    """One trained step per output channel or per tensor."""

    def __init__(self, options, weight: paddle.Tensor):
        super().__init__(options, weight)
        if options.init == "mse":
            found = numeric.mse_range(weight.numpy(), options.bits, options.granularity) / self.high
        else:
            found = initial_step(weight.numpy(), self.high, 0 if options.granularity == "channel" else None)
        self.lsq_step = _parameter(self, found, options.step_lr)

    def step(self):
        return self.lsq_step.clip(min=SMALLEST)

    def forward(self, weight):
        return LearnedStep.apply(weight, self.step(), self.low, self.high)


class LSQActivation(ActivationQuantizer):
    """One trained step for the tensor, and with `offset` a trained offset (LSQ+)."""

    def __init__(self, options):
        super().__init__(options)
        self.register_buffer("begun", paddle.zeros([3]))  # calibration batches, and the sums of their steps and minima
        self.lsq_step = _parameter(self, np.ones(1, np.float32), options.step_lr)
        if options.offset:
            # Not the offset: that would have the low end move by -low times what the step does.
            self.lsq_lowest = _parameter(self, np.zeros(1, np.float32), options.step_lr)

    def share(self, other):
        self.lsq_step = other.lsq_step
        if self.options.offset:
            self.lsq_lowest = other.lsq_lowest

    def step(self):
        return self.lsq_step.clip(min=SMALLEST)

    def set_step(self, step):
        self.lsq_step.set_value(np.array([step], np.float32))

    def offset(self):
        return float(self._offset()) if self.options.offset else 0.0

    def _offset(self) -> paddle.Tensor:
        return self.lsq_lowest - self.low * self.step()

    def calibrated(self):
        return float(self.begun[0]) > 0

    def forward(self, x):
        if self.training and float(self.begun[0]) < self.options.calibration_batches:
            self._begin(x.detach().numpy())
        self.check_calibrated()
        if self.options.offset:
            return LearnedStepAndOffset.apply(x, self.step(), self._offset(), self.low, self.high, parallel.size())
        return LearnedStep.apply(x, self.step(), self.low, self.high, parallel.size())

    @paddle.no_grad()
    def _begin(self, x: np.ndarray) -> None:
        if self.options.offset:
            low, high = float(x.min()), float(x.max())
            step, lowest = max((high - low) / (self.high - self.low), SMALLEST), low
        elif self.options.init == "mse":
            values = numeric.sample(x, SAMPLE).reshape(-1, 1)
            step, lowest = float(numeric.mse_range(values, self.bits, "tensor")[0]) / self.high, 0.0
        else:
            step, lowest = float(initial_step(x, self.high)[0]), 0.0
        self.begun.set_value(self.begun.numpy() + np.array([1, step, lowest], np.float32))
        batches, steps, minima = self.begun.numpy()
        self.lsq_step.set_value(np.array([steps / batches], np.float32))
        if self.options.offset:
            self.lsq_lowest.set_value(np.array([minima / batches], np.float32))


def _parameter(layer: paddle.nn.Layer, initial: np.ndarray, learning_rate: float) -> paddle.Tensor:
    attribute = paddle.ParamAttr(initializer=paddle.nn.initializer.Assign(initial), learning_rate=learning_rate)
    return layer.create_parameter([len(initial)], attr=attribute)
