"""Min-max quantizers: weights by absmax or by least squares, activations by a moving average of absmax."""

from __future__ import annotations

import math

import paddle

from ..errors import UserError
from . import ActivationQuantizer, StraightThrough, WeightQuantizer, numeric

SAMPLE = 2**15  # activations of a batch that the search for the least squared error looks at
TINY = 1e-30  # an all-zero channel: any step stands for it


class MinMaxWeight(WeightQuantizer):
    """range = max|w| (`absmax`), or the range of least squared error (`mse`), per output channel or per tensor.

    `absmax` is a pure function of the weight. `mse` searches once, when it is built, and then follows the weight by one
    step of Lloyd's alternation a training forward (numeric.mse_range says why that cannot do harm).
    """

    def __init__(self, options, weight: paddle.Tensor):
        super().__init__(options, weight)
        self._axis = 0 if options.granularity == "channel" else None
        if options.range == "mse":
            found = numeric.mse_range(weight.numpy(), options.bits, options.granularity)
            self.register_buffer("range", paddle.to_tensor(found))

    @paddle.no_grad()
    def current_step(self, weight):
        if self.options.range == "mse":
            return self.step()
        peak = weight.abs().max(axis=self._axis).reshape([-1])
        return paddle.where(peak > TINY, peak, paddle.ones_like(peak)) / self.high

    def step(self):
        return self.range / self.high

    def forward(self, weight):
        step = self.current_step(weight)
        quantized = StraightThrough.apply(weight, step, self.low, self.high)
        if self.training and self.options.range == "mse":
            self._follow(weight, quantized, step)
        return quantized

    @paddle.no_grad()
    def _follow(self, weight, quantized, step):
        q = quantized.detach() / step
        power = (q * q).sum(axis=self._axis).reshape([-1])
        better = (weight.detach() * q).sum(axis=self._axis).reshape([-1]) / power.clip(min=1.0)
        self.range.set_value(paddle.where(power > 0, better, step) * self.high)


class MovingAverageActivation(ActivationQuantizer):
    """range = bias-corrected moving average over training batches of max|x| (PaddleSlim's moving_average_abs_max).

    With `range: mse`, plain mean over the first `calibration_batches` batches of the range of least squared error; it is
    fixed after them, because the search is too slow for every step.
    """

    def __init__(self, options):
        super().__init__(options)
        self.register_buffer("total", paddle.zeros([1]))
        self.register_buffer("weight_sum", paddle.zeros([1]))

    def step(self):
        return (self.total / self.weight_sum).clip(min=TINY) / self.high

    def calibrated(self):
        return float(self.weight_sum) > 0

    def forward(self, x):
        if self.training:
            self._observe(x)
        elif not self.calibrated():
            raise UserError("an activation range was never set: calibrate or train before evaluating a quantized model")
        return StraightThrough.apply(x, self.step(), self.low, self.high)

    @paddle.no_grad()
    def _observe(self, x):
        if self.options.range == "moving_average":
            rate, found = self.options.moving_rate, x.detach().abs().max().reshape([1])
        elif float(self.weight_sum) < self.options.calibration_batches:
            rate, found = 1.0, self._least_squares_range(x)
        else:
            return
        self.total.set_value(self.total * rate + found)
        self.weight_sum.set_value(self.weight_sum * rate + 1.0)

    def _least_squares_range(self, x):
        values = x.detach().numpy().reshape(-1, 1)
        stride = max(1, values.size // SAMPLE)
        while math.gcd(stride, x.shape[-1]) > 1:  # else the sample would see some features only, and miss outlier ones
            stride += 1
        return paddle.to_tensor(numeric.mse_range(values[::stride], self.bits, "tensor"))
