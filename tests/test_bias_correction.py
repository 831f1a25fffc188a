"""Bias correction against NumPy, and what it promises: no layer's mean output is moved by quantization."""

import numpy as np
import pytest
from test_smoothquant import BATCHES, LAYER, logits, outliers, quantized

from ernie_kqat.blocks import Stream, blocks_of
from ernie_kqat.calibration import calibrate
from ernie_kqat.methods.bias_correction import BiasCorrection, mean_outputs
from ernie_kqat.methods.brecq import BRECQ
from ernie_kqat.methods.smoothquant import SmoothQuant
from ernie_kqat.quantizers.attach import fp32_copy, quantized_linears

W3 = {"weight": {"bits": 3, "range": "mse"}}


def means(model):
    stream, found = Stream(model, BATCHES), {}
    for block in blocks_of(model):
        found.update(mean_outputs(stream, block, list(block.linears)))
        stream.through(block)
    return found


def test_the_first_layer_is_corrected_by_its_mean_error_over_real_tokens(tiny_ernie):
    model, corrected = outliers(tiny_ernie), quantized(outliers(tiny_ernie), BiasCorrection(), **W3)
    stream = Stream(model, BATCHES)
    x = np.concatenate([one.numpy()[real] for one, real in zip(stream.hidden, stream.real)]).astype(np.float64)
    plain = model.ernie.encoder.layers[0].self_attn.k_proj
    layer = corrected.ernie.encoder.layers[0].self_attn.k_proj
    q, step = layer._fake_quant_weight.integers(layer.weight)
    x_step = float(layer._fake_quant_input.step())
    on_grid = np.clip(np.rint(x / x_step), -128, 127) * x_step
    error = on_grid @ (q * step.astype(np.float64)) - x @ plain.weight.numpy().astype(np.float64)
    np.testing.assert_allclose(layer.bias.numpy(), plain.bias.numpy() - error.mean(axis=0), atol=2e-5)


@pytest.mark.parametrize("first", [[], [SmoothQuant()], [BRECQ(iterations=3, step_iterations=3)]], ids=str)
def test_no_mean_output_is_moved_afterwards(tiny_ernie, first):
    smoothing = [method for method in first if isinstance(method, SmoothQuant)]  # it moves the outputs of v_proj
    before = means(fp32_copy(quantized(outliers(tiny_ernie), *smoothing, **W3)))
    rounded, corrected = (quantized(outliers(tiny_ernie), *first, *last, **W3) for last in ((), (BiasCorrection(),)))
    moved, left = means(rounded), means(corrected)
    for name, mean in before.items():
        assert np.abs(left[name] - mean).max() < 2e-5 * max(1, np.abs(mean).max()), name
        assert np.abs(moved[name] - mean).max() > 1e-3, name


def test_padding_and_everything_but_biases_is_left_alone(tiny_ernie):
    rounded, corrected, padded = (quantized(outliers(tiny_ernie), **W3) for _ in range(3))
    wider = [{name: np.pad(ids, ((0, 0), (0, 5))) for name, ids in batch.items()} for batch in BATCHES]
    fp32 = fp32_copy(rounded)
    BiasCorrection().after_calibration(corrected, fp32, BATCHES)
    BiasCorrection().after_calibration(padded, fp32, wider)
    before, after, other = (model.state_dict() for model in (rounded, corrected, padded))
    names = {f"{name}.bias" for name in quantized_linears(rounded)}
    assert {name for name in before if (before[name] != after[name]).any()} == names
    for name in names:
        np.testing.assert_allclose(after[name].numpy(), other[name].numpy(), rtol=1e-4, atol=1e-4)


def test_the_mode_and_the_fp32_model_stay_as_they_were(tiny_ernie):
    model = quantized(outliers(tiny_ernie), **W3)
    model.train()
    expected = logits(fp32_copy(model))
    calibrate(model, BATCHES, [BiasCorrection()])
    assert model.training
    assert model.ernie.encoder.layers[0].linear1._fake_quant_weight.training
    assert f"{LAYER}.linear1" in quantized_linears(model)
    assert np.abs(logits(fp32_copy(model)) - expected).max() > 0
