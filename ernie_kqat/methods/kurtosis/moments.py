"""Kurtosis of weights and its gradient in closed form: pure functions of one weight.

    K(W) = mean(((w - mean)/std)^4)                           population kurtosis: uniform 1.8, Gaussian 3, Laplace 6
    dK/dw_i = 4/(n std) * (z_i^3 - mean(z^3) - K z_i),  z = (w - mean)/std

A group is what shares one kurtosis: the whole weight, or one output channel (axis 1 of [in, out]). Every sum is a matrix
product, which is vectorized on this stack where paddle.dot and a sum over axis 0 are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle

UNIFORM = 1.8


@dataclass(frozen=True)
class Moments:
    """Of each group, float64 [groups]: kurtosis, std, mean, skewness (mean of z^3); and (w - mean), its square, for later."""

    kurtosis: np.ndarray
    std: np.ndarray
    mean: np.ndarray
    skewness: np.ndarray
    centred: paddle.Tensor
    squared: paddle.Tensor


def kurtosis(weight: np.ndarray) -> float:
    """K of all elements of an array, in float64."""
    return float(group_kurtosis(weight, per_channel=False)[0])


def group_kurtosis(weight: np.ndarray, per_channel: bool) -> np.ndarray:
    """K of each group of [in, out], in float64: [1] or [out]; a constant group counts as uniform."""
    w = np.asarray(weight, np.float64)
    w = w if per_channel else w.reshape(-1, 1)
    squared = np.square(w - w.mean(axis=0))
    second = squared.mean(axis=0)
    return np.where(second > 0, np.square(squared).mean(axis=0) / np.where(second > 0, second, 1) ** 2, UNIFORM)


@paddle.no_grad()
def moments_of(weight: paddle.Tensor, per_channel: bool = False) -> Moments:
    """Population moments of `weight` (float32, [in, out]), in one pass each for mean, centring, square and sums."""
    weight = weight.detach()
    count = weight.shape[0] if per_channel else weight.size
    if per_channel:
        mean = _column_sums(weight) / count
        centred = weight - paddle.to_tensor(mean.astype(np.float32))
    else:
        mean = np.array([float(weight.mean())])
        centred = weight.scale(1.0, -float(mean[0]))
    squared = centred * centred
    second, third, fourth = (
        _inner(a, b, per_channel) / count for a, b in ((centred, centred), (centred, squared), (squared, squared))
    )
    varies = second > 0  # a constant group has no kurtosis; it needs no step either
    scale = np.where(varies, second, 1.0)
    return Moments(
        kurtosis=np.where(varies, fourth / scale**2, UNIFORM),
        std=np.sqrt(second),
        mean=mean,
        skewness=np.where(varies, third / scale**1.5, 0.0),
        centred=centred,
        squared=squared,
    )


@paddle.no_grad()
def gradient(of: Moments, factor: np.ndarray | float = 1.0) -> paddle.Tensor:
    """factor x dK/dW, the shape of W; factor: a number for each group. It takes the memory of `of.squared`.

    4/(n std) (z^3 - skewness - K z) = (a3 c^2 + a1) c + a0 in the centred weight c: three passes.
    """
    count = of.centred.size // len(of.std)
    std = np.where(of.std > 0, of.std, 1.0)
    unit = np.where(of.std > 0, 4.0 * factor / (count * std), 0.0)
    a3, a1, a0 = unit / std**3, -unit * of.kurtosis / std, -unit * of.skewness
    found = of.squared
    if len(a3) == 1:
        return found.scale_(float(a3[0]), float(a1[0])).multiply_(of.centred).scale_(1.0, float(a0[0]))
    row3, row1, row0 = (paddle.to_tensor(a.astype(np.float32)) for a in (a3, a1, a0))
    return found.multiply_(row3).add_(row1).multiply_(of.centred).add_(row0)


@paddle.no_grad()
def step(of: Moments, target: np.ndarray, rate: float) -> paddle.Tensor | None:
    """The decoupled step: what to subtract from the weight; None where every group rests.

    s * g with g = dK/dW and, for each group, s = sign(K - T) min(rate max|w| / max|g|, |K - T| / |g|^2): no weight moves by
    more than `rate` of the largest, and no further than the first-order step to the target. A group within 1e-6 of its
    target, or with no target (NaN), rests. max|g| is bounded by the cubic's values at the extremes of w and at its own
    turning points z = +-sqrt(K/3), which saves a pass over g.
    """
    distance = of.kurtosis - target
    moves = np.isfinite(target) & (of.std > 0)
    moves &= np.abs(np.where(moves, distance, 0.0)) > 1e-6 * np.where(moves, target, 1.0)
    if rate == 0 or not moves.any():
        return None
    per_channel = len(target) > 1
    low, high = _extremes(of.centred, per_channel)
    count = of.centred.size // len(of.std)
    std = np.where(of.std > 0, of.std, 1.0)
    turning = np.sqrt(of.kurtosis / 3)
    z = np.stack(
        [low / std, high / std, np.clip(turning, low / std, high / std), np.clip(-turning, low / std, high / std)]
    )
    peak = 4 / (count * std) * np.abs(z**3 - of.skewness - of.kurtosis * z).max(axis=0)
    largest = np.maximum(np.abs(low + of.mean), np.abs(high + of.mean))
    g = gradient(of)
    power = _inner(g, g, per_channel)
    moves &= (peak > 0) & (power > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.minimum(rate * largest / peak, np.abs(distance) / power)
    size = np.where(moves, np.copysign(size, distance), 0.0)
    return g.multiply_(paddle.to_tensor(size.astype(np.float32))) if per_channel else g.scale_(float(size[0]))


def norm(tensors: list[paddle.Tensor]) -> float:
    """The Euclidean norm of all elements of all tensors."""
    return math.sqrt(sum(float(_inner(tensor, tensor, False)[0]) for tensor in tensors))


def _inner(a: paddle.Tensor, b: paddle.Tensor, per_channel: bool) -> np.ndarray:
    """Sum of a * b in each group, float64 [groups]."""
    if per_channel:
        return _column_sums(a * b)
    return paddle.matmul(a.reshape([1, -1]), b.reshape([-1, 1])).numpy().reshape(-1).astype(np.float64)


def _column_sums(a: paddle.Tensor) -> np.ndarray:
    return paddle.matmul(paddle.ones([1, a.shape[0]], a.dtype), a).numpy().reshape(-1).astype(np.float64)


def _extremes(centred: paddle.Tensor, per_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    if per_channel:
        values = centred.numpy()
        return values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
    return np.array([float(centred.min())]), np.array([float(centred.max())])
