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
from . import IntegersWeight, numeric

LEVELS = 126  # k1 + k2; even, so that equal halves cancel exactly


class BinaryWeight(IntegersWeight):
    """One step per output channel or per tensor (the papers': per tensor); two of them where it is split."""

    allowed_bits = (1,)

    def __init__(self, options, weight: paddle.Tensor):
        super().__init__(options, weight)
        if options.split:
            self.high, self.low = LEVELS, -LEVELS
            self.learning_rate = 2.0  # each half moves by the whole rate
            try:
                first, second = numeric.split_ternary(weight.numpy(), options.granularity)
            except ValueError as error:
                raise UserError(f"Slim.quant: split: {error}; use quantizer: binary without it there") from None
            self.register_buffer("difference", paddle.to_tensor((first - second).astype(np.float32)))

    def integers(self, weight):
        values = weight.numpy()
        if not self.options.split:
            step = numeric.binary_step(values, self.options.granularity)
            return numeric.binary_integers(values).astype(np.int8), step.astype(np.float32)
        difference = self.difference.numpy()
        halves = (values + difference) / 2, (values - difference) / 2
        first, second = (numeric.binary_step(half, self.options.granularity) for half in halves)
        of_first = np.rint(LEVELS * first / (first + second))
        q = numeric.binary_integers(halves[0]) * of_first + numeric.binary_integers(halves[1]) * (LEVELS - of_first)
        return q.astype(np.int8), ((first + second) / LEVELS).astype(np.float32)
