"""Ternary weights, -step, 0 or step (TWN, arXiv 1605.04711, as TernaryBERT uses it, arXiv 2009.12812, section 3.1).

    threshold = 0.7 mean|w|      step = mean of the |w| beyond it      (1605.04711, equations 5 and 6)

Both follow the weight at each forward, in float32 on the device; the gradient passes straight through.
"""

from __future__ import annotations

import numpy as np
import paddle

from . import PassThrough, WeightQuantizer, numeric
from .kernels import rounded, times


class TernaryWeight(WeightQuantizer):
    """One threshold and step per output channel or per tensor (the paper's: per tensor)."""

    allowed_bits = (2,)
    nearest = False

    def integers(self, weight):
        q = numeric.integers(weight.numpy(), self._spacing(weight).numpy(), 1)
        return q.astype(np.int8), self.current_step(weight).numpy()

    def current_step(self, weight):
        return self._step(weight, self._rounded(weight))

    def forward(self, weight):
        return PassThrough.apply(weight, self._quantized)

    def _quantized(self, weight):
        q = self._rounded(weight)
        return times(q, self._step(weight, q))

    @paddle.no_grad()
    def _spacing(self, weight):
        """Twice the threshold: rounding to -1, 0 or 1 times it keeps what is beyond the threshold. 1 where all are zero."""
        twice = self.means(weight.abs()) * 1.4
        return paddle.where(twice > 0, twice, paddle.ones_like(twice))

    @paddle.no_grad()
    def _rounded(self, weight):
        return rounded(weight, self._spacing(weight), -1, 1)

    @paddle.no_grad()
    def _step(self, weight, q):
        """Mean of the |w| whose integer is not 0; 1 where there are none."""
        count = self.sums(q * q)
        return paddle.where(count > 0, self.sums(weight * q) / count.clip(min=1.0), paddle.ones_like(count))
