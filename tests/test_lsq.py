"""LSQ and LSQ+ against NumPy float64, in training and deployed."""

import numpy as np
import paddle
import pytest
from test_program import OneLinear, calibrated, ernie_inputs, run

from ernie_kqat import KurtosisQAT, quantizers
from ernie_kqat.config import ActivationQuant, Quant, WeightQuant
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import ActivationQuantizer, WeightQuantizer, numeric
from ernie_kqat.quantizers.attach import deployable, quantized_linears

CHANNELS = 24
RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((40, CHANNELS)) * np.logspace(-2, 2, CHANNELS)).astype(np.float32)
GELU_LIKE = np.maximum(RNG.standard_normal((6, 8, 32)) * 2, -0.17).astype(np.float32)


def weight_quantizer(**options):
    weight = paddle.to_tensor(WEIGHT, stop_gradient=False)
    return quantizers.find("lsq", WeightQuantizer)(WeightQuant(quantizer="lsq", **options), weight), weight


def activation_quantizer(**options):
    made = quantizers.find("lsq", ActivationQuantizer)(ActivationQuant(quantizer="lsq", **options))
    made.train()
    return made


def oracle(x, step, offset, low, high):
    """Q(x), and dQ/dx, dQ/dstep, dQ/doffset of each element (1902.08153 equations 1 to 3; 2004.09576 equations 2 to 4)."""
    u = (x.astype(np.float64) - offset) / step
    inside = (u >= low) & (u <= high)
    q = np.rint(np.clip(u, low, high))
    return q * step + offset, inside, np.where(inside, np.rint(u) - u, q), ~inside


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("init", ["mean", "mse"])
def test_weight_contract(bits, granularity, init):
    quantizer, weight = weight_quantizer(bits=bits, granularity=granularity, init=init)
    first = quantizer(weight).numpy()
    for _ in range(50):
        again = quantizer(weight).numpy()
    np.testing.assert_array_equal(first, again)
    q, step = quantizer.integers(weight)
    high = numeric.qmax(bits)
    assert np.abs(q).max() <= high
    np.testing.assert_array_equal(first, q.astype(np.float32) * step)  # deployed integers ARE the simulation
    assert all(len(np.unique(first[:, c])) <= 2**bits for c in range(CHANNELS))
    mean = np.abs(WEIGHT.astype(np.float64)).mean(axis=0 if granularity == "channel" else None)
    begins = (
        np.atleast_1d(2 * mean / np.sqrt(high))
        if init == "mean"
        else numeric.mse_range(WEIGHT, bits, granularity) / high
    )
    np.testing.assert_allclose(step, begins, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weight_gradient(granularity):
    quantizer, weight = weight_quantizer(bits=3, granularity=granularity)
    grad = RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    (quantizer(weight) * paddle.to_tensor(grad)).sum().backward()
    step = quantizer.step().numpy().astype(np.float64)
    _, inside, slope, _ = oracle(WEIGHT, step, 0.0, -3, 3)
    groups = CHANNELS if granularity == "channel" else 1
    expected = (slope * grad).reshape(-1, groups).sum(axis=0) / np.sqrt(WEIGHT.size / groups * 3)
    np.testing.assert_allclose(quantizer.lsq_step.grad.numpy(), expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(weight.grad.numpy(), np.where(inside, grad, 0))


def test_a_step_never_becomes_negative():
    quantizer, weight = weight_quantizer(bits=4, granularity="tensor")
    quantizer.lsq_step.set_value(np.float32([-1.0]))
    assert float(quantizer.step()) > 0
    assert np.isfinite(quantizer(weight).numpy()).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [False, True])
def test_activation_gradients(bits, offset):
    quantizer = activation_quantizer(bits=bits, offset=offset, calibration_batches=1)
    x = paddle.to_tensor(GELU_LIKE, stop_gradient=False)
    quantizer(x)
    high = 2 ** (bits - 1) - 1
    widest = quantizer.step().numpy() if offset else np.float32([np.abs(GELU_LIKE).max() / high])
    quantizer.lsq_step.set_value(0.8 * widest)  # so that some values lie outside
    grad = RNG.standard_normal(GELU_LIKE.shape).astype(np.float32)
    quantized = quantizer(x)
    (quantized * paddle.to_tensor(grad)).sum().backward()
    step, low = float(quantizer.step()), -high - 1
    values, inside, to_step, to_offset = oracle(GELU_LIKE, step, quantizer.offset(), low, high)
    factor = 1 / np.sqrt(GELU_LIKE.size * high)
    np.testing.assert_allclose(quantized.numpy(), values, atol=1e-5)
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(x.grad.numpy(), np.where(inside, grad, 0))
    if offset:
        np.testing.assert_allclose(quantizer.lsq_lowest.grad.numpy(), [(to_offset * grad).sum() * factor], rtol=1e-3)
        to_step = to_step - low * to_offset  # integers that begin at 0 (2004.09576, equation 3)
    np.testing.assert_allclose(quantizer.lsq_step.grad.numpy(), [(to_step * grad).sum() * factor], rtol=2e-3)


def test_a_finer_step_does_not_clip_the_lowest_value():
    quantizer = activation_quantizer(offset=True, calibration_batches=1)
    x = paddle.to_tensor(GELU_LIKE)
    lowest = quantizer(x).min()
    np.testing.assert_allclose(float(lowest), GELU_LIKE.min(), rtol=1e-5)
    quantizer.lsq_step.set_value(0.5 * quantizer.lsq_step)
    np.testing.assert_allclose(float(quantizer(x).min()), GELU_LIKE.min(), rtol=1e-5)


def test_small_values_lose_no_digits_to_a_large_offset():
    quantizer = activation_quantizer(offset=True, calibration_batches=1)
    quantizer(paddle.to_tensor(np.float32([-0.17, 9.1])))
    x = RNG.uniform(-0.17, 0.3, 1000).astype(np.float32)
    step, offset = float(quantizer.step()), quantizer.offset()
    assert offset > 4
    expected, *_ = oracle(x, step, offset, -128, 127)
    np.testing.assert_allclose(quantizer(paddle.to_tensor(x)).numpy(), expected, rtol=1e-6, atol=5e-8)


@pytest.mark.parametrize(("lowest", "whole"), [(-0.17, 123), (-9.0, -128), (90.0, 255), (-90.0, -255)])
def test_whole_steps(lowest, whole):
    offset = lowest + 128 * 0.03515625
    found, rest = numeric.whole_steps(offset, 0.03515625)
    assert found == whole
    assert found * 0.03515625 + rest == pytest.approx(offset, abs=1e-12)
    assert abs(rest) <= 0.5 * 0.03515625 or abs(whole) == 255


BEGINS = {
    "mean": 2 * np.abs(GELU_LIKE).mean() / np.sqrt(127),
    "mse": numeric.mse_range(GELU_LIKE.reshape(-1, 1), 8, "tensor")[0] / 127,
}


@pytest.mark.parametrize("init", BEGINS)
def test_an_activation_begins_at_the_mean_over_the_calibration_batches(init):
    quantizer = activation_quantizer(calibration_batches=3, init=init)
    for scale in (1.0, 2.0, 3.0):
        quantizer(paddle.to_tensor(GELU_LIKE * np.float32(scale)))
    quantizer(paddle.to_tensor(GELU_LIKE * np.float32(50)))
    np.testing.assert_allclose(quantizer.step().numpy(), [2 * BEGINS[init]], rtol=1e-5)


def test_with_an_offset_all_levels_serve_a_lopsided_tensor():
    error = {}
    for offset in (False, True):
        quantizer = activation_quantizer(bits=4, offset=offset, calibration_batches=1)
        quantized = quantizer(paddle.to_tensor(GELU_LIKE)).numpy()
        error[offset] = np.square(quantized - GELU_LIKE).mean()
        levels = len(np.unique(quantized))
        assert levels <= 16
    assert levels == 16
    assert error[True] < 0.5 * error[False]


QUANT = {
    "W4A8": Quant(WeightQuant(quantizer="lsq", bits=4), ActivationQuant(quantizer="lsq")),
    "W8A8 with offsets": Quant(WeightQuant(quantizer="lsq"), ActivationQuant(quantizer="lsq", offset=True)),
    "W2A4 with offsets": Quant(
        WeightQuant(quantizer="lsq", bits=2, granularity="tensor"),
        ActivationQuant(quantizer="lsq", bits=4, offset=True),
    ),
}


@pytest.mark.parametrize("quant", QUANT.values(), ids=QUANT)
def test_one_deployed_linear_equals_its_simulation(tmp_path, quant):
    weight, bias = RNG.standard_normal((32, 24)).astype(np.float32), RNG.standard_normal(24).astype(np.float32)
    qat = KurtosisQAT.from_options(quant)
    model = qat.quantize(OneLinear(weight, bias))
    model.eval()
    calibrated(model, paddle.to_tensor(GELU_LIKE))
    x = GELU_LIKE * np.float32(1.7)  # beyond the range, so that saturation is compared too
    qat.save_quantized_model(
        model, str(tmp_path / "m"), [paddle.static.InputSpec([None, None, 32], "float32", name="x")]
    )
    simulated = model(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(run(tmp_path / "m", x), simulated, atol=2e-5 * np.abs(simulated).max())


def test_the_bias_of_an_offset_is_exact():
    weight = RNG.uniform(0, 1, (1536, 24)).astype(np.float32)  # sums that fp32 could not hold
    model = KurtosisQAT.from_options(QUANT["W8A8 with offsets"]).quantize(OneLinear(weight, weight[0]))
    model.eval()
    (layer,) = quantized_linears(model).values()
    calibrated(model, paddle.to_tensor(RNG.uniform(-0.17, 9, (4, 8, 1536)).astype(np.float32)))
    q, step = layer._fake_quant_weight.integers(layer.weight)
    added = layer._fake_quant_input.offset() * (q.astype(np.float64) * step).sum(axis=0)
    (linear,) = (one for one in deployable(model)[0].sublayers() if isinstance(one, paddle.nn.Linear))
    np.testing.assert_allclose(linear.bias.numpy(), (weight[0] + added).astype(np.float32), rtol=1.2e-7)


@pytest.mark.parametrize("quant", QUANT.values(), ids=QUANT)
def test_a_whole_deployed_ernie_equals_its_simulation(tmp_path, tiny_ernie, quant):
    qat = KurtosisQAT.from_options(quant)
    model = qat.quantize(load_classifier(str(tiny_ernie), 2))
    model.eval()
    ids, types = ernie_inputs()
    calibrated(model, paddle.to_tensor(ids), paddle.to_tensor(types))
    simulated = model(paddle.to_tensor(ids), paddle.to_tensor(types)).numpy()
    qat.save_quantized_model(model, str(tmp_path / "m"))
    assert np.abs(run(tmp_path / "m", ids, types) - simulated).max() < 0.02 * simulated.std()


def test_layers_that_read_one_tensor_share_step_and_offset(tiny_ernie):
    model = KurtosisQAT.from_options(QUANT["W8A8 with offsets"]).quantize(load_classifier(str(tiny_ernie), 2))
    attention = model.ernie.encoder.layers[0].self_attn
    q, k = attention.q_proj._fake_quant_input, attention.k_proj._fake_quant_input
    assert q.lsq_step is k.lsq_step
    assert q.lsq_lowest is k.lsq_lowest
