"""BRECQ: AdaRound's functions in float64, where it begins, what it leaves behind, and that it helps."""

import numpy as np
import paddle
import pytest
from test_smoothquant import BATCHES, LAYER, logits, quantized
from test_trainer import settings

from ernie_kqat import UserError
from ernie_kqat.blocks import Stream, blocks_of
from ernie_kqat.methods import brecq
from ernie_kqat.methods.brecq import BRECQ, importance, logit_of, rectified_sigmoid, regularizer
from ernie_kqat.methods.smoothquant import SmoothQuant
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import numeric
from ernie_kqat.quantizers.attach import fp32_copy, quantized_linears, weight_of
from ernie_kqat.trainer import train

RNG = np.random.default_rng(0)
W2 = {"weight": {"bits": 2, "range": "mse"}, "activation": {"range": "mse"}}
QUICK = {"iterations": 60, "learning_rate": 0.05, "step_iterations": 20}


def fp32(tiny_ernie):
    model = load_classifier(str(tiny_ernie), 2, dropout=0.0)
    model.eval()
    return model


def error(model, tiny_ernie):
    """Mean squared difference of the logits from fp32's."""
    exact = fp32(tiny_ernie)
    return np.mean([np.square(logits(model, batch) - logits(exact, batch)).mean() for batch in BATCHES])


def h_of(v):
    """Equation 23 of 2004.10568 by its letter, float64."""
    return np.clip(1 / (1 + np.exp(-v.astype(np.float64))) * (1.1 - -0.1) + -0.1, 0, 1)


def test_the_rectified_sigmoid_and_its_inverse():
    v = RNG.normal(0, 3, (40, 7)).astype(np.float32)
    np.testing.assert_allclose(rectified_sigmoid(paddle.to_tensor(v)).numpy(), h_of(v), atol=3e-7)
    share = RNG.uniform(0, 1, 100)
    np.testing.assert_allclose(h_of(logit_of(share)), share, atol=1e-6)
    assert np.isfinite(logit_of(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("beta", [20.0, 5.5, 2.0])
def test_the_regularizer_and_its_gradient(beta):
    h = paddle.to_tensor(RNG.uniform(0, 1, (30, 4)), stop_gradient=False)
    values = h.numpy()
    found = regularizer(h, beta)
    found.backward()
    np.testing.assert_allclose(float(found), (1 - np.abs(2 * values - 1) ** beta).sum(), rtol=1e-9)
    slope = -2 * beta * np.sign(2 * values - 1) * np.abs(2 * values - 1) ** (beta - 1)
    np.testing.assert_allclose(h.grad.numpy(), slope, rtol=1e-7, atol=1e-12)
    assert float(regularizer(paddle.to_tensor([0.0, 1.0, 1.0]), beta)) == 0


def test_beta_falls_after_the_warm_up():
    method = BRECQ(iterations=100, warmup=0.2)
    assert [method.beta(index) for index in (0, 19)] == [None, None]
    assert [method.beta(index) for index in (20, 60)] == [20.0, 11.0]
    assert method.beta(99) == pytest.approx(2 + 18 / 80)


def test_it_begins_where_rounding_to_nearest_is(tiny_ernie):
    for layer in quantized_linears(quantized(fp32(tiny_ernie), **W2)).values():
        weight, step = layer.weight.numpy(), layer._fake_quant_weight.step().numpy()
        rounding = brecq.Rounding(layer)
        np.testing.assert_array_equal(rounding.rounded(), numeric.on_grid(weight, step, 1))
        inside = np.abs(weight / step) < 1
        soft = rounding(None).numpy()
        assert np.abs(soft - weight)[inside].max() < 1e-6 * np.abs(weight).max()
        assert np.abs(soft / step)[~inside].min() > 1 - 1e-5


def test_without_iterations_nothing_changes(tiny_ernie):
    off = BRECQ(iterations=0, step_iterations=0)
    plain, same = quantized(fp32(tiny_ernie), **W2), quantized(fp32(tiny_ernie), off, **W2)
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), same.state_dict()[name].numpy(), err_msg=name)


@pytest.mark.parametrize("smooth", [False, True])
def test_weights_are_left_on_their_grid_and_the_error_falls(tiny_ernie, smooth):
    before = [SmoothQuant()] if smooth else []
    nearest = quantized(fp32(tiny_ernie), *before, **W2)
    learned = quantized(fp32(tiny_ernie), *before, BRECQ(**{**QUICK, "step_iterations": 0}), **W2)
    moved = 0
    others = quantized_linears(learned)
    for name, layer in quantized_linears(nearest).items():
        original, other = weight_of(layer).numpy(), others[name]
        q, step = other._fake_quant_weight.integers(weight_of(other))
        np.testing.assert_array_equal(step, layer._fake_quant_weight.step().numpy())
        np.testing.assert_allclose(weight_of(other).numpy(), q * step, rtol=1e-5, atol=1e-9)
        ratio = np.clip(original / step, -1, 1)
        assert (np.abs(q - ratio) < 1 + 1e-5).all()  # up or down, no further
        moved += (q != layer._fake_quant_weight.integers(weight_of(layer))[0]).mean()
    assert moved > 0.02
    assert error(learned, tiny_ernie) < 0.4 * error(nearest, tiny_ernie)


@pytest.mark.parametrize("how", [{}, {"quantizer": "lsq", "offset": True}])
def test_activation_steps_are_learned_and_shared(tiny_ernie, how):
    four = {"activation": {"bits": 4, **how}}  # by max|x|: far too wide for outliers
    method = BRECQ(iterations=0, step_iterations=100, step_learning_rate=0.02)
    plain, learned = quantized(fp32(tiny_ernie), **four), quantized(fp32(tiny_ernie), method, **four)
    assert error(learned, tiny_ernie) < 0.8 * error(plain, tiny_ernie)
    layers = quantized_linears(learned)
    steps = {
        float(layers[f"{LAYER}.self_attn.{name}"]._fake_quant_input.step()) for name in ("q_proj", "k_proj", "v_proj")
    }
    assert len(steps) == 1
    assert steps != {float(plain.ernie.encoder.layers[0].self_attn.q_proj._fake_quant_input.step())}
    assert not [value for value in learned.parameters() if value.stop_gradient or value.grad is not None]


@pytest.mark.parametrize(
    "activation",
    [{"range": "percentile"}, {"range": "learned"}, {"quantizer": "lsq"}, {"quantizer": "lsq", "offset": True}],
)
def test_every_activation_quantizer_takes_its_step(tiny_ernie, activation):
    model = quantized(fp32(tiny_ernie), activation={"bits": 4, **activation})
    quantizer = model.classifier._fake_quant_input
    x = paddle.to_tensor(RNG.standard_normal((5, 32)).astype(np.float32))
    learned = brecq.LearnedInput(quantizer)
    np.testing.assert_allclose(learned(x).numpy(), quantizer(x).numpy(), atol=1e-6)
    quantizer.set_step(0.125)
    np.testing.assert_allclose(quantizer.step().numpy(), [0.125], rtol=1e-6)
    assert quantizer.calibrated()
    learned.log_step.set_value(np.log([0.125]).astype(np.float32))
    np.testing.assert_allclose(learned(x).numpy(), quantizer(x).numpy(), atol=1e-6)  # so with an offset, too


def test_importance_is_the_squared_slope_of_the_margin(tiny_ernie):
    model = fp32_copy(quantized(fp32(tiny_ernie)))
    stream, blocks = Stream(model, BATCHES), blocks_of(model)
    outputs = stream.outputs(blocks[0])
    with brecq._frozen(model):
        found = [one.numpy() for one in importance(blocks[1:], outputs, stream)]
    real = np.concatenate([real.reshape(-1) for real in stream.real])
    flat = np.concatenate([one.reshape(-1, 32) for one in found])
    assert not flat[~real].any()
    np.testing.assert_allclose(flat[real].mean(), 1, rtol=1e-5)

    def margin(change):
        hidden = outputs[0] + paddle.to_tensor(change)
        for block in blocks[1:]:
            hidden = block.run(hidden, stream.masks[0])
        ordered = np.sort(hidden.numpy().astype(np.float64), axis=1)
        return (ordered[:, -1] - ordered[:, -2])[0]

    squares = []
    largest = np.argsort(-found[0][0].reshape(-1))[:6]
    for place in largest:
        change = np.zeros(outputs[0].shape, np.float32)
        change[0].reshape(-1)[place] = 0.02
        squares.append(((margin(change) - margin(-change)) / 0.04) ** 2)
    ratios = np.array(squares) / found[0][0].reshape(-1)[largest]
    np.testing.assert_allclose(ratios, ratios.mean(), rtol=0.05)


def test_only_the_first_token_counts_before_the_head(tiny_ernie):
    model = fp32_copy(quantized(fp32(tiny_ernie)))
    stream, (*_, last, head) = Stream(model, BATCHES), blocks_of(model)
    found = importance([head], stream.outputs(last), stream)
    assert not found[0][:, 1:].numpy().any()
    assert (importance([], [paddle.ones([2, 3])], stream)[0].numpy() == 1).all()


@pytest.mark.parametrize("weight", [{}, {"range": "percentile"}, {"quantizer": "ternary", "bits": 2}])
def test_a_step_that_follows_the_weight_is_refused(tmp_path, tiny_ernie, tiny_task, weight):
    with pytest.raises(
        UserError, match=r"Slim.brecq: the step of ernie.*q_proj follows its weight.*needs range: mse or learned"
    ):
        train(settings(tmp_path, tiny_ernie, tiny_task, Slim={"quant": {"weight": weight}, "brecq": {}}))


@pytest.mark.parametrize("weight", [{"range": "learned"}, {"quantizer": "lsq"}])
def test_trained_steps_are_taken(tiny_ernie, weight):
    model = quantized(fp32(tiny_ernie), BRECQ(iterations=2, step_iterations=1), weight={"bits": 3, **weight})
    layer = model.ernie.encoder.layers[0].linear1
    np.testing.assert_allclose(layer._fake_quant_weight(layer.weight).numpy(), layer.weight.numpy(), rtol=1e-5)
