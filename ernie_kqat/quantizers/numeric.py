"""Pure numeric functions of quantization, in NumPy. Weights are [in_features, out_features]; the output channel is axis 1.

`step` is the real value of one integer; `range` = step x qmax, with qmax = 2^(bits-1) - 1.
"""

from __future__ import annotations

import math

import numpy as np


def qmax(bits: int) -> int:
    """Largest integer of a signed `bits`-bit quantity: 127 at 8 bits."""
    return 2 ** (bits - 1) - 1


def absmax_range(weight: np.ndarray, granularity: str) -> np.ndarray:
    """max|w|, float32 [out_features] for `channel`, [1] for `tensor`; 1 where all weights are zero."""
    peak = np.abs(weight).max(axis=0 if granularity == "channel" else None).reshape(-1).astype(np.float32)
    return np.where(peak > 0, peak, np.float32(1))


def percentile_range(weight: np.ndarray, percentile: float, granularity: str) -> np.ndarray:
    """The `percentile` (0 to 100) of |w|, shapes as `absmax_range`; never under a hundredth of max|w|."""
    peak = absmax_range(weight, granularity)
    found = np.percentile(np.abs(weight), percentile, axis=0 if granularity == "channel" else None)
    return np.maximum(np.atleast_1d(found).astype(np.float32), peak / 100)


def mse_range(
    weight: np.ndarray, bits: int, granularity: str, candidates: int = 40, refinements: int = 4
) -> np.ndarray:
    """The range that minimizes sum (w - step * round(clip(w / step)))^2, shapes as `absmax_range`.

    A grid search over fractions of absmax, then Lloyd's alternation: for fixed integers q the best step is
    <w, q> / <q, q>, for a fixed step the best integers are the rounded ones; neither can raise the error.
    """
    weight = np.asarray(weight, np.float32)
    axis = 0 if granularity == "channel" else None
    largest = qmax(bits)
    peak = absmax_range(weight, granularity)
    best, best_error = peak / largest, _squared_error(weight, peak / largest, largest, axis)
    for fraction in np.linspace(0.05 if largest > 1 else 0.01, 1, candidates, endpoint=False, dtype=np.float32):
        best, best_error = _better(weight, peak * fraction / largest, best, best_error, largest, axis)
    for _ in range(refinements):
        q = integers(weight, best, largest)
        power = np.atleast_1d((q * q).sum(axis=axis))
        refined = np.where(power > 0, np.atleast_1d((weight * q).sum(axis=axis)) / np.maximum(power, 1), best)
        best, best_error = _better(weight, refined.astype(np.float32), best, best_error, largest, axis)
    return (best * largest).astype(np.float32)


def whole_steps(offset: float, step: float) -> tuple[int, float]:
    """An offset as n * step + rest, with |n| at most 255: in fp32, step * (q + n) + rest keeps the digits of small values that
    step * q + offset, a difference of large numbers, loses."""
    whole = int(np.clip(np.rint(offset / step), -255, 255))
    return whole, offset - whole * step


def ternary_step(weight: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Threshold and step of ternary weights, shapes as `absmax_range` (TWN, arXiv 1605.04711, equations 5 and 6):

    0.7 mean|w|, and the mean of the |w| beyond it. An all-zero group: 0 and 1.
    """
    magnitude = np.abs(np.asarray(weight, np.float64))
    axis = 0 if granularity == "channel" else None
    threshold = 0.7 * magnitude.mean(axis=axis)
    beyond = magnitude > threshold
    count = beyond.sum(axis=axis)
    step = np.where(count > 0, (magnitude * beyond).sum(axis=axis) / np.maximum(count, 1), 1.0)
    return np.atleast_1d(threshold), np.atleast_1d(step)


def binary_integers(weight: np.ndarray) -> np.ndarray:
    """-1 or 1, and 1 for zero, float32."""
    return np.where(weight < 0, np.float32(-1), np.float32(1))


def split_ternary(weight: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Two weights u1 + u2 = w whose binary ones sum to the ternary one of w, in float64 (BinaryBERT, arXiv 2012.15701, eq. 5
    to 8). Both halves then have the same step, half the ternary one.

    Raises ValueError for a group whose small weights are nearly all of one sign and outweigh the large ones, which the
    paper's equations cannot split.
    """
    weight = np.asarray(weight, np.float64)
    axis = 0 if granularity == "channel" else None
    threshold, step = ternary_step(weight, granularity)
    large = np.abs(weight) > threshold
    zeros = (~large).sum(axis=axis)
    count = weight.shape[0] if granularity == "channel" else weight.size
    shift = (step * count - np.abs(weight).sum(axis=axis)) / (2 * np.maximum(zeros, 1))
    positive = weight > 0
    first = np.where(positive, weight + shift, shift)
    of_large = (np.abs(weight) * large).sum(axis=axis)
    excess = ((np.abs(first) - np.abs(weight - first)) * ~large).sum(axis=axis)
    share = np.atleast_1d(0.5 - 0.5 * excess / np.where(of_large > 0, of_large, 1.0))
    if not ((share > 0) & (share < 1)).all():
        raise ValueError("the small weights of a group are nearly all of one sign; no ternary weight splitting for it")
    first = np.where(large, share * weight, first)
    return first, weight - first


def sample(values: np.ndarray, size: int) -> np.ndarray:
    """About `size` values of [..., features], evenly spaced, [n]; every feature is met (no stride shares a divisor with it)."""
    flat = values.reshape(-1)
    stride = max(1, flat.size // size)
    while math.gcd(stride, values.shape[-1]) > 1:  # else some features would never be seen, outlier ones among them
        stride += 1
    return flat[::stride]


def integers(weight: np.ndarray, step: np.ndarray, largest: int) -> np.ndarray:
    """round-half-even(clip(w / step)) in [-largest, largest], as float32."""
    return np.rint(np.clip(np.asarray(weight, np.float32) * (np.float32(1) / step), -largest, largest))


def on_grid(weight: np.ndarray, step: np.ndarray, largest: int) -> np.ndarray:
    """The weight on its grid: step x integers, float32."""
    return integers(weight, step, largest) * np.asarray(step, np.float32)


def sqnr_db(weight: np.ndarray, quantized: np.ndarray) -> float:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - q)^2), in dB; inf where nothing was lost."""
    weight = np.asarray(weight, np.float64)
    noise = np.square(weight - quantized).sum()
    return float(10 * np.log10(np.square(weight).sum() / noise)) if noise > 0 else float("inf")


def _squared_error(weight: np.ndarray, step: np.ndarray, largest: int, axis: int | None) -> np.ndarray:
    return np.atleast_1d(np.square(weight - integers(weight, step, largest) * step).sum(axis=axis, dtype=np.float64))


def _better(weight, step, best, best_error, largest, axis):
    error = _squared_error(weight, step, largest, axis)
    wins = error < best_error
    return np.where(wins, step, best), np.where(wins, error, best_error)
