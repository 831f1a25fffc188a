"""Every weight quantizer x bits x granularity x range, and the activations, against NumPy."""

import numpy as np
import paddle
import pytest

from ernie_kqat import UserError, quantizers
from ernie_kqat.config import ActivationQuant, WeightQuant
from ernie_kqat.quantizers import ActivationQuantizer, WeightQuantizer, numeric
from ernie_kqat.quantizers.kernels import on_grid

CHANNELS = 24
VALUES = (np.random.default_rng(0).standard_normal((40, CHANNELS)) * np.logspace(-2, 2, CHANNELS)).astype(np.float32)
WEIGHT_QUANTIZERS = ["minmax"]


def weight_quantizer(name="minmax", **options):
    weight = paddle.to_tensor(VALUES, stop_gradient=False)
    made = quantizers.find(name, WeightQuantizer)(WeightQuant(quantizer=name, **options), weight)
    made.eval()
    return made, weight


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("range_", ["absmax", "mse", "percentile", "learned"])
def test_weight_contract(name, bits, granularity, range_):
    quantizer, weight = weight_quantizer(name, bits=bits, granularity=granularity, range=range_)
    q, step = quantizer.integers(weight)
    assert q.dtype == np.int8
    assert np.abs(q).max() <= numeric.qmax(bits)
    assert step.shape == ((CHANNELS,) if granularity == "channel" else (1,))
    simulated = quantizer(weight).numpy()
    np.testing.assert_array_equal(simulated, q.astype(np.float32) * step)  # deployed integers ARE the simulation
    assert all(len(np.unique(simulated[:, c])) <= 2**bits for c in range(CHANNELS))
    ranges = {
        "absmax": lambda: numeric.absmax_range(VALUES, granularity),
        "percentile": lambda: numeric.percentile_range(VALUES, 99.9, granularity),
        "mse": lambda: numeric.mse_range(VALUES, bits, granularity),
        "learned": lambda: numeric.mse_range(VALUES, bits, granularity),  # where it begins
    }[range_]()
    np.testing.assert_allclose(step * numeric.qmax(bits), ranges, rtol=1e-6)


@pytest.mark.parametrize("range_", ["absmax", "mse", "percentile", "learned"])
def test_stable_after_many_forwards(range_):
    quantizer, weight = weight_quantizer(bits=4, range=range_)
    first = quantizer(weight).numpy()
    for _ in range(50):
        again = quantizer(weight).numpy()
    np.testing.assert_array_equal(first, again)


def test_mse_range_follows_a_moving_weight():
    quantizer, weight = weight_quantizer(bits=4, range="mse")
    quantizer.train()
    weight.stop_gradient = True
    for _ in range(30):
        weight.set_value(weight * 1.03)
        quantizer(weight)
    quantizer.eval()
    error = np.square(quantizer(weight).numpy() - weight.numpy()).sum(0)
    step = numeric.mse_range(weight.numpy(), 4, "channel") / 7
    fresh = np.square(numeric.integers(weight.numpy(), step, 7) * step - weight.numpy()).sum(0)
    assert error.sum() < 1.1 * fresh.sum()


def test_gradient_passes_straight_through():
    quantizer, weight = weight_quantizer(bits=4)
    grad = np.random.default_rng(1).standard_normal(VALUES.shape).astype(np.float32)
    (quantizer(weight) * paddle.to_tensor(grad)).sum().backward()
    np.testing.assert_array_equal(weight.grad.numpy(), grad)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_learned_range_has_the_gradient_of_lsq(granularity):
    quantizer, weight = weight_quantizer(bits=3, granularity=granularity, range="learned")
    grad = np.random.default_rng(1).standard_normal(VALUES.shape)
    (quantizer(weight) * paddle.to_tensor(grad.astype(np.float32))).sum().backward()
    groups = 1 if granularity == "tensor" else CHANNELS
    range_ = numeric.mse_range(VALUES, 3, granularity).astype(np.float64)
    ratio = VALUES / (range_ / 3)
    inside = np.abs(ratio) <= 3
    slope = np.where(inside, np.rint(ratio) - ratio, 3 * np.sign(ratio)) * grad
    by_step = slope.reshape(-1, groups).sum(0) / np.sqrt(VALUES.size / groups * 3)
    np.testing.assert_allclose(quantizer.log_range.grad.numpy(), by_step * range_ / 3, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(weight.grad.numpy(), np.where(inside, grad, 0).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_learned_range_comes_to_minimize_the_loss(bits):
    """Loss: squared error. From a range twice too wide, the trained range comes to the best one's error."""
    quantizer, weight = weight_quantizer(bits=bits, granularity="tensor", range="learned", range_lr=1.0)
    weight.stop_gradient = True
    best = float(((quantizer(weight) - weight) ** 2).sum())
    quantizer.log_range.set_value(quantizer.log_range + np.float32(np.log(2)))
    optimizer = paddle.optimizer.Adam(0.01, parameters=quantizer.parameters())
    for _ in range(150):
        loss = ((quantizer(weight) - weight) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    assert float(loss) < 1.1 * best


def test_on_grid_rounds_half_to_even_and_saturates_like_the_engine():
    x = paddle.to_tensor(np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.6, -127.6, -200.0]))
    got = on_grid(x, paddle.ones([1]), -128, 127).numpy()
    assert got.tolist() == [0, 2, 2, 0, -2, 127, 127, -128, -128]


def activation_quantizer(**options):
    return quantizers.find("minmax", ActivationQuantizer)(ActivationQuant(**options))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_range_is_the_bias_corrected_moving_average(bits):
    quantizer = activation_quantizer(bits=bits, moving_rate=0.9)
    rng, total, weights = np.random.default_rng(2), 0.0, 0.0
    quantizer.train()
    for scale in (1.0, 3.0, 2.0, 5.0):
        x = (rng.standard_normal((3, 5, 7)) * scale).astype(np.float32)
        total, weights = 0.9 * total + np.abs(x).max(), 0.9 * weights + 1
        out = quantizer(paddle.to_tensor(x)).numpy()
    step = total / weights / numeric.qmax(bits)
    np.testing.assert_allclose(quantizer.step().numpy(), [step], rtol=1e-6)
    assert len(np.unique(out)) <= 2**bits
    np.testing.assert_allclose(
        out, np.clip(np.rint(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step, rtol=1e-5
    )
    quantizer.eval()
    quantizer(paddle.to_tensor(x * 100))
    np.testing.assert_allclose(quantizer.step().numpy(), [step], rtol=1e-6)  # evaluation moves nothing


def test_activation_range_of_least_squared_error_is_fixed_after_calibration():
    quantizer = activation_quantizer(range="mse", calibration_batches=3, bits=4)
    quantizer.train()
    rng, found = np.random.default_rng(3), []
    for _ in range(3):
        x = rng.standard_normal((4, 6, 32)).astype(np.float32)
        found.append(numeric.mse_range(x.reshape(-1, 1), 4, "tensor")[0])
        quantizer(paddle.to_tensor(x))
    quantizer(paddle.to_tensor(x * 50))
    np.testing.assert_allclose(quantizer.step().numpy() * 7, [np.mean(found)], rtol=1e-5)


def test_a_percentile_of_the_activation_is_fixed_after_calibration():
    quantizer = activation_quantizer(range="percentile", percentile=99.0, calibration_batches=2)
    quantizer.train()
    rng, found = np.random.default_rng(3), []
    for _ in range(3):
        x = rng.standard_normal((4, 6, 32)).astype(np.float32)
        found.append(np.percentile(np.abs(x), 99.0))
        quantizer(paddle.to_tensor(x))
    np.testing.assert_allclose(quantizer.step().numpy() * 127, [np.mean(found[:2])], rtol=1e-5)


def test_a_learned_activation_range_begins_at_the_calibrated_one_and_is_trained():
    quantizer = activation_quantizer(range="learned", calibration_batches=1, bits=4, range_lr=1.0)
    quantizer.train()
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal((4, 6, 32)).astype(np.float32))
    begin = numeric.mse_range(x.numpy().reshape(-1, 1), 4, "tensor")
    quantizer(x)
    np.testing.assert_allclose(quantizer.step().numpy() * 7, begin, rtol=1e-5)
    optimizer = paddle.optimizer.Adam(0.01, parameters=quantizer.parameters())
    quantizer(x * 4).sum().backward()
    optimizer.step()
    assert quantizer.step().numpy() * 7 != pytest.approx(begin, rel=1e-3)


def test_the_sample_for_a_range_sees_every_feature():
    """384 features, 2^18 values: a stride that divides 384 would never meet the one feature that matters."""
    quantizer = activation_quantizer(range="mse", calibration_batches=1)
    quantizer.train()
    x = np.random.default_rng(4).standard_normal((683, 384)).astype(np.float32) * 0.01
    x[:, 5] = 8.0
    quantizer(paddle.to_tensor(x))
    assert float(quantizer.step()) * 127 > 4


def test_uncalibrated_activation_is_refused():
    quantizer = activation_quantizer()
    quantizer.eval()
    with pytest.raises(UserError, match="never set"):
        quantizer(paddle.ones([2, 3]))


def test_unknown_quantizer_is_named():
    with pytest.raises(UserError, match=r"'lsx' is not one of binary, lsq, minmax, ternary"):
        quantizers.find("lsx", WeightQuantizer)


def test_every_quantizer_file_is_under_contract():
    elsewhere = {"lsq", "ternary", "binary"}  # test_lsq.py, test_ternary.py
    assert set(quantizers.names()) == {*WEIGHT_QUANTIZERS, *elsewhere}
