"""Ternary weights, -step, 0 or step (TWN, arXiv 1605.04711, as TernaryBERT uses it, arXiv 2009.12812, section 3.1).

Threshold and step follow the weight at each forward; the gradient passes straight through.
"""

from __future__ import annotations

import numpy as np

from . import IntegersWeight, numeric


class TernaryWeight(IntegersWeight):
    """One threshold and step per output channel or per tensor (the paper's: per tensor)."""

    allowed_bits = (2,)

    def integers(self, weight):
        values = weight.numpy()
        threshold, step = numeric.ternary_step(values, self.options.granularity)
        return numeric.ternary_integers(values, threshold).astype(np.int8), step.astype(np.float32)
