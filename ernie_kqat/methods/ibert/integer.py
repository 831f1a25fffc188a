"""I-BERT's functions on integers alone, in NumPy int64. Paper: arXiv 2101.01321, algorithms 1 to 4.

A pair (q, step) stands for the real numbers q x step. Each function takes one and gives another; nothing but steps, which are
constants of a deployed model, is ever a fraction.

Differs from the paper: int64 in place of int32, whose 31 bits q x (erf + 1) exceeds where inputs have 16 bits (the authors'
code drops 14 bits there); exp's coefficients are the authors' code's (with the four digits that are printed, 0.3585, 1.353 and
0.344, it errs by 2.1e-3 and not by 1.9e-3); the softmax's step is 1 / (2^bits - 1) and not 2^-bits, so that a weight of 1 still
has `bits`; LayerNorm, for which the paper prints no algorithm, is as in the authors' code.
"""

from __future__ import annotations

import math

import numpy as np

ERF = (-0.2888, -1.769, 1.0)  # a, b, c of a (x + b)^2 + c: erf(x) for x in 0..-b (equation 8)
EXP = (0.35815147, 1.3536624, 0.3437225)  # exp(p) for p in -ln 2..0 (equation 13)
LONGEST_SHIFT = 62  # int64 has no more; nothing is left of the number long before
LEAST_STEP = 1e-6  # of an input up to 2^15: int64 holds every product below


def polynomial(q: np.ndarray, step: float, a: float, b: float, c: float) -> tuple[np.ndarray, float]:
    """a (x + b)^2 + c at x = q x step (algorithm 1, I-POLY). The step it gives has the sign of a."""
    if step < LEAST_STEP:
        raise ValueError(f"step {step:g}: under {LEAST_STEP:g} the squares exceed int64")
    return (q + math.floor(b / step)) ** 2 + math.floor(c / (a * step**2)), a * step**2


def erf(q: np.ndarray, step: float) -> tuple[np.ndarray, float]:
    """erf(x) (algorithm 2, I-ERF): the polynomial of min(|x|, -b), with the sign of x."""
    a, b, c = ERF
    clipped = np.minimum(np.abs(q), -math.floor(b / step))
    found, found_step = polynomial(clipped, step, a, b, c)
    return np.sign(q) * found, found_step


def gelu(q: np.ndarray, step: float) -> tuple[np.ndarray, float]:
    """x / 2 (1 + erf(x / sqrt 2)) (algorithm 2, I-GELU); |q| up to 2^15."""
    found, found_step = erf(q, step / math.sqrt(2))
    one = math.floor(1 / found_step)
    return q * (found + one), step * found_step / 2


def exp(q: np.ndarray, step: float) -> tuple[np.ndarray, float]:
    """exp(x) for x <= 0 (algorithm 3, I-EXP): x = p - z ln 2, the polynomial of p, shifted right by z; step up to ln 2."""
    ln2 = math.floor(math.log(2) / step)
    if ln2 < 1:
        raise ValueError(f"step {step:g}: i-exp needs ln 2 = 0.693 at most; give its input more bits")
    z = -q // ln2
    found, found_step = polynomial(q + z * ln2, step, *EXP)
    return found >> np.minimum(z, LONGEST_SHIFT), found_step


def softmax(q: np.ndarray, step: float, bits: int) -> tuple[np.ndarray, float]:
    """Softmax over the last axis (algorithm 3, I-SOFTMAX), in integers 0..2^bits - 1; bits up to 16.

    Each is rounded down, so a row of n sums to 1 or less, by less than n of the steps given.
    """
    found, _ = exp(q - q.max(axis=-1, keepdims=True), step)
    largest = 2**bits - 1
    return found * largest // found.sum(axis=-1, keepdims=True), 1 / largest


def sqrt(n: np.ndarray) -> np.ndarray:
    """floor(sqrt(n)) for integers n >= 0, exactly, by Newton's iteration (algorithm 4, I-SQRT)."""
    positive = np.maximum(np.asarray(n, np.int64), 1)
    length = np.frexp(positive.astype(np.float64))[1].astype(np.int64)  # in bits
    root = np.int64(1) << (length + 1) // 2  # >= sqrt(n): from there on it falls, until it is there
    while True:
        better = (root + positive // root) // 2
        if (better >= root).all():
            return np.where(np.asarray(n) > 0, root, 0)
        root = np.minimum(root, better)


def normalize(q: np.ndarray) -> tuple[np.ndarray, float]:
    """(x - mean) / standard deviation over the last axis (section 3.6), whatever the step of x; a constant row gives zeros.

    The root is of the sum of n squares and not of their mean, which would have fewer bits; hence the sqrt(n) in the step.
    """
    width = q.shape[-1]
    mean = (2 * q.sum(axis=-1, keepdims=True) + width) // (2 * width)  # rounded
    centred = q - mean
    deviation = sqrt((centred**2).sum(axis=-1, keepdims=True))
    factor = 2**31 // np.maximum(deviation, 1)
    return centred * factor // 2, math.sqrt(width) / 2**30
