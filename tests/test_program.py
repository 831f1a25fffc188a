"""The exported program computes what the simulation computes: bits x granularity x range, in Paddle Inference."""

import numpy as np
import paddle
import paddle.inference as inference
import pytest

from ernie_kqat import KurtosisQAT, UserError
from ernie_kqat.export import program
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import ActivationQuantizer


def run(path, *arrays):
    config = inference.Config(f"{path}.pdmodel", f"{path}.pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    predictor = inference.create_predictor(config)
    for name, array in zip(predictor.get_input_names(), arrays):
        predictor.get_input_handle(name).copy_from_cpu(array)
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()


class OneLinear(paddle.nn.Layer):
    """Not square, and its channels differ by four decades: a wrong axis cannot hide."""

    def __init__(self, weight, bias):
        super().__init__()
        self.linear = paddle.nn.Linear(*weight.shape)
        self.linear.weight.set_value(weight)
        if bias is None:
            self.linear.bias = None
        else:
            self.linear.bias.set_value(bias)

    def forward(self, x):
        return self.linear(x)


def calibrated(model, *inputs):
    for layer in model.sublayers():
        if isinstance(layer, ActivationQuantizer):
            layer.train()
    model(*inputs)
    model.eval()
    return model


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("kind", ["channel_wise_abs_max", "abs_max"])
@pytest.mark.parametrize("range_", ["absmax", "mse"])
def test_one_linear_equals_integer_arithmetic(tmp_path, bits, activation_bits, kind, range_):
    rng = np.random.default_rng(3)
    spread = np.logspace(-2, 2, 96) if kind == "channel_wise_abs_max" else np.exp(0.3 * rng.standard_normal(96))
    weight = (rng.standard_normal((64, 96)) * spread).astype(np.float32)
    bias = rng.standard_normal(96).astype(np.float32)
    x = (rng.standard_normal((3, 5, 64)) * 2).astype(np.float32)
    options = {
        "weight_bits": bits,
        "activation_bits": activation_bits,
        "weight_quantize_type": kind,
        "weight_range": range_,
    }
    qat = KurtosisQAT(options)
    model = qat.quantize(OneLinear(weight, bias))
    model.eval()
    calibrated(model, paddle.to_tensor(x))
    x = x * 1.7  # beyond the calibrated range, so that saturation is compared too
    layer = model.linear
    w_int, w_step = layer._fake_quant_weight.integers(layer.weight)
    x_step = float(layer._fake_quant_input.step())
    low, high = -(2 ** (activation_bits - 1)), 2 ** (activation_bits - 1) - 1
    x_int = np.clip(np.rint(x * np.float32(1 / np.float32(x_step))), low, high).astype(np.float64)
    exact = (x_int @ w_int.astype(np.float64)) * (x_step * w_step.astype(np.float64)) + bias
    qat.save_quantized_model(
        model, str(tmp_path / "m"), [paddle.static.InputSpec([None, None, 64], "float32", name="x")]
    )
    deployed = run(tmp_path / "m", x)
    scale = np.abs(exact).max(axis=(0, 1))
    assert (np.abs(deployed - exact) / scale).max() < 1e-5
    assert (np.abs(model(paddle.to_tensor(x)).numpy() - exact) / scale).max() < 1e-5


def ernie_inputs():
    """input_ids and token_type_ids of eight rows, five of them padded."""
    ids = np.random.default_rng(0).integers(5, 90, (8, 11))
    ids[3:, 8:] = 0
    return ids, np.zeros_like(ids)


def ernie(tiny_ernie, **options):
    model = load_classifier(str(tiny_ernie), 2)
    qat = KurtosisQAT(options)
    qat.quantize(model)
    model.eval()
    ids, types = ernie_inputs()
    calibrated(model, paddle.to_tensor(ids), paddle.to_tensor(types))
    return qat, model, ids


@pytest.mark.parametrize("options", [{}, {"weight_bits": 4, "weight_quantize_type": "abs_max"}, {"activation_bits": 4}])
def test_a_whole_ernie_equals_its_simulation(tmp_path, tiny_ernie, options):
    qat, model, ids = ernie(tiny_ernie, **options)
    simulated = model(paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))).numpy()
    qat.save_quantized_model(model, str(tmp_path / "m"))
    deployed = run(tmp_path / "m", ids, np.zeros_like(ids))
    assert np.abs(deployed - simulated).max() < 0.02 * simulated.std()
    assert program.names(tmp_path / "m") == (["input_ids", "token_type_ids"], program.names(tmp_path / "m")[1])


def test_skipped_layers_stay_in_fp32(tmp_path, tiny_ernie):
    qat, model, ids = ernie(tiny_ernie, layers=[["linear2|classifier", "skip"]])
    simulated = model(paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))).numpy()
    qat.save_quantized_model(model, str(tmp_path / "m"))
    assert np.abs(run(tmp_path / "m", ids, np.zeros_like(ids)) - simulated).max() < 0.02 * simulated.std()


def test_a_linear_without_bias_is_exported(tmp_path):
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    qat = KurtosisQAT()
    model = qat.quantize(OneLinear(weight, None))
    model.eval()
    x = np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32)
    calibrated(model, paddle.to_tensor(x))
    qat.save_quantized_model(
        model, str(tmp_path / "m"), [paddle.static.InputSpec([None, None, 16], "float32", name="x")]
    )
    np.testing.assert_allclose(run(tmp_path / "m", x), model(paddle.to_tensor(x)).numpy(), atol=1e-5)


def test_exporting_changes_neither_the_model_nor_the_mode(tmp_path, tiny_ernie):
    qat, model, ids = ernie(tiny_ernie)
    inputs = paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))
    before = model(*inputs).numpy()
    qat.save_quantized_model(model, str(tmp_path / "m"))
    assert paddle.in_dynamic_mode()
    np.testing.assert_array_equal(model(*inputs).numpy(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pdiparams", "m.pdmodel"]


def test_uncalibrated_export_names_the_layer(tmp_path, tiny_ernie):
    model = load_classifier(str(tiny_ernie), 2)
    qat = KurtosisQAT()
    qat.quantize(model)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj: its activation range was never set"):
        qat.save_quantized_model(model, str(tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []


def test_layers_that_read_one_tensor_must_agree_on_its_range(tmp_path, tiny_ernie):
    """q, k and v share one quantize operator in the program; two ranges for it would be silently one."""
    rules = [["k_proj", {"activation": {"moving_rate": 0.5}}]]
    model = load_classifier(str(tiny_ernie), 2)
    qat = KurtosisQAT({"layers": rules})
    qat.quantize(model)
    model.eval()
    for seed in (0, 1):
        ids = np.random.default_rng(seed).integers(5, 90, (8, 11))
        calibrated(model, paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids)))
    with pytest.raises(UserError, match="read the same tensor have different activation ranges"):
        qat.save_quantized_model(model, str(tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []
