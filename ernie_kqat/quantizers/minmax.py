"""Min-max quantizers: one range a group of weights, one for each activation; by what rule, the `range` key says."""

from __future__ import annotations

import numpy as np
import paddle

from .. import parallel
from . import ActivationQuantizer, LearnedStep, StraightThrough, WeightQuantizer, numeric
from .kernels import column_peaks, peak

SAMPLE = 2**15  # activations of a batch that the search for a range looks at
TINY = 1e-30  # an all-zero channel: any step stands for it


class MinMaxWeight(WeightQuantizer):
    """One range per output channel or per tensor, by `range`:

    - `absmax`: max|w|; `percentile`: that percentile of |w|. Both are pure functions of the weight.
    - `mse`: of least squared error; searched once, when it is built, and then following the weight by one step of Lloyd's
      alternation a training forward (numeric.mse_range says why that cannot do harm).
    - `learned`: from the `mse` range on, log(range) is a parameter with LSQ's gradient; in the logarithm, as in TQT
      (arXiv 1903.08066), so that one learning rate suits ranges of every size.
    """

    def __init__(self, options, weight: paddle.Tensor):
        super().__init__(options, weight)
        if options.range in ("mse", "learned"):
            found = numeric.mse_range(weight.numpy(), options.bits, options.granularity)
            if options.range == "mse":
                self.register_buffer("range", paddle.to_tensor(found))
            else:
                self.log_range = _log_range(self, found, options.range_lr)

    @paddle.no_grad()
    def current_step(self, weight):
        if self.options.range == "absmax":
            found = column_peaks(weight) if self.options.granularity == "channel" else peak(weight)
            return paddle.where(found > TINY, found, paddle.ones_like(found)) / self.high
        if self.options.range == "percentile":
            found = numeric.percentile_range(weight.numpy(), self.options.percentile, self.options.granularity)
            return paddle.to_tensor(found) / self.high
        return self.step()

    def step(self):
        return (self.log_range.exp() if self.options.range == "learned" else self.range) / self.high

    def forward(self, weight):
        if self.options.range == "learned":
            return LearnedStep.apply(weight, self.step(), self.low, self.high)
        step = self.current_step(weight)
        quantized = StraightThrough.apply(weight, step, self.low, self.high)
        if self.training and self.options.range == "mse":
            self._follow(weight, quantized, step)
        return quantized

    @paddle.no_grad()
    def _follow(self, weight, quantized, step):
        q = quantized.detach() / step
        power = self.sums(q * q)
        better = self.sums(weight.detach() * q) / power.clip(min=1.0)
        self.range.set_value(paddle.where(power > 0, better, step) * self.high)


class MovingAverageActivation(ActivationQuantizer):
    """One range for the tensor, by `range`:

    - `moving_average`: bias-corrected moving average over training batches of max|x| (PaddleSlim's moving_average_abs_max);
    - `mse`, `percentile`: plain mean over the first `calibration_batches` batches of the batch's range of least squared
      error, or percentile of |x|; fixed after them, because the search is too slow for every step;
    - `learned`: from the calibrated `mse` range on, as MinMaxWeight's.
    """

    def __init__(self, options):
        super().__init__(options)
        self.register_buffer("total", paddle.zeros([1]))
        self.register_buffer("weight_sum", paddle.zeros([1]))
        if options.range == "learned":
            self.log_range = _log_range(self, np.ones(1, np.float32), options.range_lr)

    def share(self, other):
        if self.options.range == "learned":
            self.log_range = other.log_range

    def step(self):
        found = self.log_range.exp() if self.options.range == "learned" else self.total / self.weight_sum
        return found.clip(min=TINY) / self.high

    def set_step(self, step):
        self.total.set_value(self.weight_sum * (step * self.high))
        if self.options.range == "learned":
            self.log_range.set_value(np.log(np.array([step * self.high], np.float32)))

    def calibrated(self):
        return float(self.weight_sum) > 0

    def forward(self, x):
        if self.training:
            self._observe(x)
        self.check_calibrated()
        if self.options.range == "learned":
            return LearnedStep.apply(x, self.step(), self.low, self.high, parallel.size())
        return StraightThrough.apply(x, self.step(), self.low, self.high)

    @paddle.no_grad()
    def _observe(self, x):
        if self.options.range == "moving_average":
            rate, found = self.options.moving_rate, parallel.maximum(peak(x))
        elif float(self.weight_sum) < self.options.calibration_batches:
            rate, found = 1.0, paddle.to_tensor(self._range_of(x))
        else:
            return
        self.total.set_value(self.total * rate + found)
        self.weight_sum.set_value(self.weight_sum * rate + 1.0)
        if self.options.range == "learned":
            self.log_range.set_value((self.total / self.weight_sum).clip(min=TINY).log())

    def _range_of(self, x):
        values = numeric.sample(x.detach().numpy(), SAMPLE).reshape(-1, 1)
        if self.options.range == "percentile":
            return numeric.percentile_range(values, self.options.percentile, "tensor")
        return numeric.mse_range(values, self.bits, "tensor")


def _log_range(layer: paddle.nn.Layer, found: np.ndarray, range_lr: float) -> paddle.Tensor:
    initial = paddle.nn.initializer.Assign(np.log(found))
    attribute = paddle.ParamAttr(initializer=initial, learning_rate=range_lr)
    return layer.create_parameter([len(found)], attr=attribute)
