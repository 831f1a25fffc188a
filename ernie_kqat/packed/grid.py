"""The integers and steps of a float matrix that lies on a grid, found from its values alone. NumPy only."""

from __future__ import annotations

import numpy as np

QMAX = 127
SAMPLE = 64  # values of a group that are looked at before all are
NEAR = 1e-4  # from an integer; a float32 product of step and integer is at most 127 x 2^-23 away


def recover(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """q int8 [groups, n] and step float32 [groups] with q * step = `groups`, float32 [groups, n], in every bit; None if
    there are none in ±127.

    The smallest value is some small multiple of the step: 1, 2, … are tried until the largest value would be beyond 127.
    An all-zero group gets step 1.
    """
    size = np.abs(groups)
    if not np.isfinite(size).all():
        return None
    largest = size.max(axis=1, initial=0).astype(np.float64)
    smallest = np.where(size > 0, size, np.float32(np.inf)).min(axis=1, initial=np.inf).astype(np.float64)
    smallest = np.where(np.isfinite(smallest), smallest, 1.0)
    q = np.zeros(groups.shape, np.int8)
    step = np.ones(len(groups), np.float32)
    left = np.arange(len(groups))
    for multiple in range(1, QMAX + 1):
        if (largest[left] * multiple > smallest[left] * (QMAX + 0.4)).any():
            return None
        left = left[~_fitted(groups, left, smallest / multiple, q, step)]
        if not left.size:
            return q, step
    return None


def _fitted(groups: np.ndarray, which: np.ndarray, about: np.ndarray, q: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Whether each group of `which` lies on a grid of about that step; if so, its rows of `q` and `step` are set."""
    stride = max(1, groups.shape[1] // SAMPLE)
    ratio = groups[which, ::stride] / about[which, None]
    fits = (np.abs(ratio - np.rint(ratio)) < NEAR).all(axis=1)
    for place in np.flatnonzero(fits):
        group = which[place]
        values = groups[group]
        integers = np.rint(values / about[group])
        peak = np.abs(integers).argmax()
        first = np.float32(values[peak] / integers[peak]) if integers[peak] else np.float32(1)
        fits[place] = False
        for exact in _neighbours(first):
            if np.array_equal(
                (integers.astype(np.int8).astype(np.float32) * exact).view(np.uint32), values.view(np.uint32)
            ):
                q[group], step[group], fits[place] = integers, exact, True
                break
    return fits


def _neighbours(value: np.float32) -> list[np.float32]:
    """The float, and two on either side: a rounded product says its factor to within one."""
    up, down = np.float32(np.inf), np.float32(0)
    above, below = np.nextafter(value, up), np.nextafter(value, down)
    return [value, above, below, np.nextafter(above, up), np.nextafter(below, down)]
