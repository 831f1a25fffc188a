"""Binary weights, -step or step (BWN, arXiv 1603.05279), alone or as the two halves of a split ternary weight.

Splitting (BinaryBERT, arXiv 2012.15701, section 3.2) begins with u1 + u2 = w whose binary weights sum to the ternary one of w,
so that a binary model begins where a trained ternary one ended; the layer computes x B(u1) + x B(u2).

Differs from the paper: as both halves are multiplied by the same x, and both get the same gradient straight through, one matrix
w = u1 + u2 with twice the learning rate and a constant u1 - u2 is trained in their place. Its quantized values lie on one grid,
(a1, a2) rounded to integers k1 + k2 = 126, so that it deploys as ONE exact int8 weight, not two. Weight decay leaves u1 - u2
alone, and the gradient's global norm counts a split weight once.
"""

from __future__ import annotations

import numpy as np
import paddle

from ..errors import UserError
from . import PassThrough, WeightQuantizer, numeric
from .kernels import ROUND, times

LEVELS = 126  # k1 + k2; even, so that equal halves cancel exactly


class BinaryWeight(WeightQuantizer):
    """One step per output channel or per tensor (the papers': per tensor); two of them where it is split."""

    allowed_bits = (1,)
    nearest = False

    def __init__(self, options, weight: paddle.Tensor):
        super().__init__(options, weight)
        if options.split:
            self.high, self.low = LEVELS, -LEVELS
            self.learning_rate = 2.0  # each half moves by the whole rate
            self.register_buffer("difference", paddle.zeros(weight.shape))  # u1 - u2

    def begin(self, weight):
        if self.options.split:
            try:
                first, second = numeric.split_ternary(weight.numpy(), self.options.granularity)
            except ValueError as error:
                raise UserError(f"Slim.quant: split: {error}; use quantizer: binary without it there") from None
            self.difference.set_value((first - second).astype(np.float32))

    def integers(self, weight):
        parts, multiples, step = self._parts(weight)
        q = sum(numeric.binary_integers(part.numpy()) * multiple.numpy() for part, multiple in zip(parts, multiples))
        return q.astype(np.int8), step.numpy()

    def current_step(self, weight):
        return self._parts(weight)[2]

    def forward(self, weight):
        return PassThrough.apply(weight, self._quantized)

    def _quantized(self, weight):
        parts, multiples, step = self._parts(weight)
        return times(paddle.add_n([times(_signs(part), multiple) for part, multiple in zip(parts, multiples)]), step)

    @paddle.no_grad()
    def _parts(self, weight):
        """The parts [in, out] whose signs are kept, how many steps the sign of each is worth, and the step."""
        if not self.options.split:
            return [weight], [paddle.ones([1])], self._binary_step(weight)
        halves = [(weight + self.difference).scale_(0.5), (weight - self.difference).scale_(0.5)]
        first, second = map(self._binary_step, halves)
        multiple = (first / (first + second)).scale_(LEVELS).scale_(1.0, ROUND).scale_(1.0, -ROUND)
        return halves, [multiple, LEVELS - multiple], (first + second) / LEVELS

    def _binary_step(self, weight):
        """mean|w| (1603.05279, equation 6); 1 where all weights are zero."""
        mean = self.means(weight.abs())
        return paddle.where(mean > 0, mean, paddle.ones_like(mean))


def _signs(values: paddle.Tensor) -> paddle.Tensor:
    """-1 or 1, and 1 for zero."""
    return (values < 0).astype(values.dtype).scale_(-2.0, 1.0)
