"""The pure numeric functions, against brute force."""

import numpy as np
import pytest

from ernie_kqat.quantizers import numeric

WEIGHT = (np.random.default_rng(0).standard_normal((48, 20)) * np.logspace(-3, 1, 20)).astype(np.float32)


def brute_force_error(weight: np.ndarray, bits: int) -> float:
    """Least squared error over a fine grid of ranges, for one group of weights."""
    largest, peak = 2 ** (bits - 1) - 1, np.abs(weight).max()
    steps = np.linspace(0.02, 1.0, 2000) * peak / largest
    rounded = np.rint(np.clip(weight[:, None] / steps, -largest, largest)) * steps
    return float(((weight[:, None] - rounded) ** 2).sum(0).min())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_range_is_as_good_as_brute_force(bits):
    ranges = numeric.mse_range(WEIGHT, bits, "channel")
    assert ranges.shape == (20,)
    step = ranges / numeric.qmax(bits)
    error = np.square(WEIGHT - numeric.integers(WEIGHT, step, numeric.qmax(bits)) * step).sum(0)
    best = np.array([brute_force_error(WEIGHT[:, column].astype(np.float64), bits) for column in range(20)])
    assert np.mean(error / best) < 1.05
    assert np.max(error / best) < 1.3  # the 2000 candidates of brute force may fit 48 values by luck


def test_mse_range_per_tensor_survives_an_outlier():
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    weight[3, 5] = 30.0
    absmax, mse = numeric.absmax_range(weight, "tensor"), numeric.mse_range(weight, 4, "tensor")
    assert absmax == pytest.approx([30.0])

    def error_of_the_others(ranges):
        step = ranges / 7
        kept = np.abs(weight) < 10
        return np.square(weight - numeric.integers(weight, step, 7) * step)[kept].mean()

    assert error_of_the_others(mse) < error_of_the_others(absmax) / 5


def test_ranges_take_the_output_channel():
    wide = np.array([[1.0, -20.0, 3.0], [-4.0, 5.0, 0.0]], np.float32)
    assert numeric.absmax_range(wide, "channel").tolist() == [4.0, 20.0, 3.0]
    assert numeric.absmax_range(wide, "tensor").tolist() == [20.0]


def test_percentile_range_is_numpys_percentile():
    found = numeric.percentile_range(WEIGHT, 90.0, "channel")
    np.testing.assert_allclose(found, np.percentile(np.abs(WEIGHT), 90.0, axis=0), rtol=1e-6)
    sparse = np.zeros((1000, 1), np.float32)
    sparse[0] = 5.0
    assert numeric.percentile_range(sparse, 90.0, "channel") == pytest.approx([0.05])  # never zero


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_all_zero_weights_have_a_range(granularity):
    zero = np.zeros((4, 3), np.float32)
    assert (numeric.absmax_range(zero, granularity) == 1).all()
    assert (numeric.mse_range(zero, 4, granularity) > 0).all()
    assert (numeric.percentile_range(zero, 99.0, granularity) > 0).all()


def test_sqnr_is_in_decibels():
    assert numeric.sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20.0)
    assert numeric.sqnr_db(np.ones(3), np.ones(3)) == np.inf


def test_integers_round_half_to_even_and_clip():
    values = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0]], np.float32)
    assert numeric.integers(values, np.float32([1.0]), 7).tolist() == [[0, 2, 2, 0, -2, 7, -7]]
