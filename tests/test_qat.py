"""KurtosisQAT as a drop-in: PaddleSlim's keys, our arithmetic, nothing that training does not need."""

import numpy as np
import paddle
import paddleslim
import pytest
from paddle.nn.quant.quant_layers import QuantizedLinear

from ernie_kqat import KurtosisQAT, UserError
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import ActivationQuantizer, attach


def batch(rows=4, tokens=9, seed=0):
    ids = np.random.default_rng(seed).integers(5, 90, (rows, tokens))
    return paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))


@pytest.fixture
def model(tiny_ernie):
    return load_classifier(str(tiny_ernie), 2, dropout=0.0)


def test_is_a_paddleslim_qat_and_quantizes_every_linear(model):
    qat = KurtosisQAT({"weight_bits": 4, "weight_quantize_type": "abs_max", "activation_bits": 8, "moving_rate": 0.9})
    assert isinstance(qat, paddleslim.QAT)
    quantized = qat.quantize(model)
    layers = attach.quantized_linears(quantized)
    assert len(layers) == 2 * 6 + 2  # q, k, v, out, linear1, linear2 a layer; pooler and classifier
    assert {layer._fake_quant_weight.bits for layer in layers.values()} == {4}
    assert not [layer for layer in quantized.sublayers() if "OutputScale" in type(layer).__name__]


def test_works_without_an_attention_mask(model):
    KurtosisQAT().quantize(model)
    assert model(*batch()).shape == [4, 2]  # PaddleSlim's own wrapper raises here


def test_forward_equals_integer_arithmetic(model):
    """One layer in NumPy float64: (x_int @ w_int) * steps + bias."""
    KurtosisQAT().quantize(model)
    model.train()
    model(*batch())
    model.eval()
    layer = model.ernie.pooler.dense
    assert isinstance(layer, QuantizedLinear)
    x = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    w_int, w_step = layer._fake_quant_weight.integers(layer.weight)
    x_step = float(layer._fake_quant_input.step())
    x_int = np.clip(np.rint(x / x_step), -128, 127)
    exact = (x_int.astype(np.float64) @ w_int) * (x_step * w_step) + layer.bias.numpy()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), exact, atol=2e-6)


def test_inplace_false_leaves_the_model_alone(model):
    before = model(*batch()).numpy()
    other = KurtosisQAT().quantize(model, inplace=False)
    assert attach.quantized_linears(other)
    assert not attach.quantized_linears(model)
    np.testing.assert_array_equal(model(*batch()).numpy(), before)


def test_layer_rules(model):
    rules = [["classifier|pooler", "skip"], ["linear2", {"weight": {"bits": 4, "range": "mse"}}]]
    qat = KurtosisQAT({"layers": rules})
    qat.quantize(model)
    layers = attach.quantized_linears(model)
    assert len(layers) == 12
    assert {name: layer._fake_quant_weight.bits for name, layer in layers.items()}[
        "ernie.encoder.layers.1.linear2"
    ] == 4
    assert "classifier: fp32" in [str(entry) for entry in qat.plan]


def test_regularization_adds_gradients(model):
    qat = KurtosisQAT({"kurtosis": {"targets": {"fixed": 1.8}, "lambda": 1.0}})
    qat.quantize(model)
    qat.regularization().backward()
    assert float(model.ernie.encoder.layers[0].linear1.weight.grad.abs().sum()) > 0
    assert model.classifier.weight.grad is None
    with pytest.raises(UserError, match="kurtosis.apply is 'loss'"):
        qat.decoupled_step()


def test_decoupled_steps_move_weights_to_the_target(model):
    qat = KurtosisQAT({"kurtosis": {"targets": {"fixed": 2.0}, "apply": "decoupled"}})
    qat.quantize(model)
    for _ in range(200):
        qat.decoupled_step()
    assert all(row["kurtosis"] == pytest.approx(2.0, rel=1e-3) for row in qat.kurtosis_report().values())


def test_targets_come_from_the_given_pretrained_weights(model, tiny_ernie):
    original = {name: value.numpy() * 1.0 for name, value in model.named_parameters() if value.ndim == 2}
    original["ernie.encoder.layers.0.linear1.weight"][0, 0] = 50.0
    for source in (original, str(tiny_ernie)):
        qat = KurtosisQAT({"kurtosis": {}}, pretrained=source)
        qat.quantize(load_classifier(str(tiny_ernie), 2))
        heavy = qat.kurtosis_report()["ernie.encoder.layers.0.linear1"]["target"] > 100
        assert heavy == isinstance(source, dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 9}, "9 is not in 1..8"),
        ({"weight_quantize_type": "range_abs_max"}, "'range_abs_max' is not one of"),
        ({"activation_quantize_type": "abs_max"}, "is not moving_average_abs_max"),
        ({"weight_preprocess_type": "PACT"}, "not part of the deployed program"),
        ({"quantizable_layer_type": ["Embedding"]}, "cannot be deployed"),
        ({"bits": 8}, "unknown keys: bits"),
        ({"kurtosis": {"lamda": 1}}, "did you mean lambda"),
        ({"layers": [["nothing", "skip"]]}, "'nothing' has no effect: no layer matches"),
        ({"layers": [["linear1", "fp32"]]}, "'fp32' is not `skip`"),
        (
            {"layers": [["linear1", {"weight": {"bits": 1}}]]},
            "1 for ernie.encoder.layers.0.linear1; quantizer minmax has 2",
        ),
    ],
)
def test_wrong_options_are_named(model, options, message):
    with pytest.raises(UserError) as error:
        KurtosisQAT(options).quantize(model)
    assert message in str(error.value)


def test_without_a_kurtosis_section_its_calls_say_so(model):
    qat = KurtosisQAT()
    qat.quantize(model)
    with pytest.raises(UserError, match="no `kurtosis` section"):
        qat.kurtosis_report()


def test_eval_before_calibration_is_refused(model):
    KurtosisQAT().quantize(model)
    model.eval()
    assert any(isinstance(layer, ActivationQuantizer) for layer in model.sublayers())
    with pytest.raises(UserError, match="never set"):
        model(*batch())
