"""Attention on integers: NumPy's integers, simulated = deployed in both programs, absent = off, and what is refused."""

import json

import numpy as np
import paddle
import pytest
from artifacts import random_rows
from native_core import Core, batch_of
from test_native import case_of, close, simulated
from test_program import calibrated, run
from tiny_ernie import make_tiny_ernie

from ernie_kqat import KurtosisQAT, UserError, config
from ernie_kqat.analysis.workbench import open_workbench
from ernie_kqat.evaluate import logits_of
from ernie_kqat.export import program, qdq
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers.attach import (
    deployable,
    fp32_copy,
    load_quantizer_buffers,
    quantized_linears,
    quantizer_buffers,
)
from ernie_kqat.quantizers.attention import weights_on_grid
from ernie_kqat.restore import stored_quantizers

LENGTHS = (1, 3, 5, 17, 65)
SHAPES = {
    "plain": {},
    "odd head width": {"hidden": 60, "heads": 6, "intermediate": 100},
    "wide heads": {"hidden": 144, "heads": 2, "intermediate": 64},
}


def quantized(folder, options=None, **shape):
    """A calibrated tiny ERNIE in eval mode, with attention on integers."""
    model = load_classifier(str(make_tiny_ernie(folder, **shape)), 2)
    KurtosisQAT({"attention": {}, **(options or {})}).quantize(model)
    model.eval()
    ids, types = batch_of(random_rows(16, model.config.vocab_size, seed=1))
    return calibrated(model, paddle.to_tensor(ids), paddle.to_tensor(types))


def padded_batch(seed=4):
    rng = np.random.default_rng(seed)
    return batch_of([(rng.integers(5, 150, length).tolist(), [0] * length) for length in LENGTHS])


def oracle(q, k, v, steps, mask, bits=8):
    """Scores and context in int64 sums and float64 factors, of float [heads, tokens, width]."""
    high = 2 ** (bits - 1) - 1
    q, k, v = (
        np.clip(np.rint(x * (np.float32(1) / np.float32(s))), -high - 1, high).astype(np.int64)
        for x, s in zip((q, k, v), steps)
    )
    sums = np.einsum("hqd,hkd->hqk", q, k)
    scores = sums * (float(steps[0]) * float(steps[1]) / np.sqrt(q.shape[-1])) + mask
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    u = np.rint(255 * e).astype(np.int64)
    return sums, u, np.einsum("hqk,hkd->hqd", u, v) * float(steps[2]) / u.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_simulation_is_integer_arithmetic(tmp_path, bits):
    model = quantized(tmp_path / "m", {"attention": {"bits": bits}})
    attention = model.ernie.encoder.layers[0].self_attn
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.standard_normal((1, 65, 32)).astype(np.float32))
    mask = np.where(np.arange(65) < 49, 0, -1e4).astype(np.float32)
    seen = {}
    attention.out_proj.register_forward_pre_hook(lambda layer, given: seen.update(context=given[0].numpy()))
    with paddle.no_grad():
        attention(x, x, x, paddle.to_tensor(mask).reshape([1, 1, 1, 65]))
        q, k, v = (
            attention.by_head(linear(x)).numpy()[0] for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
    grid = attention.grid()
    _, u, context = oracle(q, k, v, (grid.query, grid.key, grid.value), mask, bits)
    assert u[..., 49:].max() == 0
    assert u.max(axis=-1).min() == 255
    found = seen["context"][0].reshape(65, 4, 8).transpose(1, 0, 2)
    # where u lies on the border between two integers, float32 may take the other one
    assert np.abs(found - context).max() < 0.01 * context.std()
    assert np.median(np.abs(found - context)) < 1e-6 * context.std()


def test_weights_keep_their_shape_and_sum():
    rng = np.random.default_rng(0)
    few = np.exp(rng.standard_normal((3, 5, 128)) * 0.1)
    few /= few.sum(axis=-1, keepdims=True)  # all near 1/128, which steps of 1/255 would round to 2/255
    found = weights_on_grid(paddle.to_tensor(few.astype(np.float32))).numpy()
    assert np.abs(found / few - 1).max() < 0.01
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    peaked = np.zeros((1, 4), np.float32)
    peaked[0, 2] = 1
    np.testing.assert_array_equal(weights_on_grid(paddle.to_tensor(peaked)).numpy(), peaked)


def test_gradients_pass_straight_through(tmp_path):
    model = quantized(tmp_path / "m")
    model.train()
    ids, types = map(paddle.to_tensor, padded_batch())
    model(ids, types).sum().backward()
    for part in ("q_proj", "k_proj", "v_proj"):
        gradient = getattr(model.ernie.encoder.layers[0].self_attn, part).weight.grad.numpy()
        assert np.isfinite(gradient).all(), part
        assert np.abs(gradient).max() > 0, part


@pytest.mark.parametrize("quantizer", [{"quantizer": "lsq"}, {"range": "learned"}])
def test_learned_steps_are_trained(tmp_path, quantizer):
    model = quantized(tmp_path / "m", {"attention": quantizer})
    model.train()
    ids, types = map(paddle.to_tensor, padded_batch())
    model(ids, types).sum().backward()
    attention = model.ernie.encoder.layers[1].self_attn
    for part in (attention._fake_quant_query, attention._fake_quant_key, attention._fake_quant_value):
        (step,) = part.parameters()
        assert float(step.grad.abs()) > 0


PLAIN = [("plain", {}), ("odd head width", {"attention": {"bits": 4, "quantizer": "lsq"}})]


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_the_plain_program_computes_the_simulation(tmp_path, name, options):
    model = quantized(tmp_path / "m", options, **SHAPES[name])
    program.save_int8(model, tmp_path / "p")
    ids, types = padded_batch()
    assert close(run(tmp_path / "p", ids, types), simulated(model, ids, types))
    for row, length in enumerate(LENGTHS):
        alone = ids[row : row + 1, :length], types[row : row + 1, :length]
        assert close(run(tmp_path / "p", *alone), simulated(model, *alone)), length


OPTIONS = {"8 bits": {}, "4 bits": {"attention": {"bits": 4}}, "float projections": {"layers": [["self_attn", "skip"]]}}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_instruction_set_computes_the_simulation(core, tmp_path, name, options):
    model = quantized(tmp_path / "m", OPTIONS[options], **SHAPES[name])
    encoder = Core(core, case_of(model))
    ids, types = padded_batch()
    expected = simulated(model, ids, types)
    for isa in encoder.isas:
        found = encoder.logits(ids, types, isa)
        assert close(found, expected), isa
        np.testing.assert_allclose(encoder.logits(ids, types, isa, threads=3), found, atol=1e-6)
        for row, length in enumerate(LENGTHS):
            alone = encoder.logits(ids[row : row + 1, :length], types[row : row + 1, :length], isa)
            np.testing.assert_allclose(alone[0], found[row], atol=1e-6)


def test_padding_before_and_between_tokens(core, tmp_path):
    model = quantized(tmp_path / "m")
    ids = np.array([[5, 0, 9, 0, 7], [0, 8, 9, 0, 0], [5, 6, 7, 8, 9]])
    types = np.array([[0, 1, 0, 1, 1]] * 3)
    encoder = Core(core, case_of(model))
    for isa in encoder.isas:
        np.testing.assert_allclose(encoder.logits(ids, types, isa), simulated(model, ids, types), atol=1e-5)


def test_steps_of_dead_heads_mask_padding_all_the_same(core, tmp_path):
    """Queries that are all zero have a step of 1e-30, under which no score is far from any other."""
    model = quantized(tmp_path / "m")
    for layer in model.ernie.encoder.layers:
        layer.self_attn.q_proj.weight.set_value(layer.self_attn.q_proj.weight * 0)
        layer.self_attn.q_proj.bias.set_value(layer.self_attn.q_proj.bias * 0)
        layer.self_attn._fake_quant_query.total.set_value(np.zeros(1, np.float32))
    ids, types = padded_batch()
    encoder = Core(core, case_of(model))
    for isa in encoder.isas:
        assert close(encoder.logits(ids, types, isa), simulated(model, ids, types)), isa


def test_broken_steps_and_bits_are_refused(core, tmp_path):
    case = case_of(quantized(tmp_path / "m"))
    one = np.ones((2, 4), np.int64)
    for bits in (1, 9):
        with pytest.raises(ValueError, match="has not 2 to 8 bits"):
            Core(core, {**case, "shape": np.append(case["shape"][:8], bits)}).logits(one, one)
    with pytest.raises(ValueError, match="the program holds more than its shape needs"):
        Core(core, {**case, "shape": case["shape"][:8]}).logits(one, one)
    at = 2 * 64  # behind the first LayerNorm
    with pytest.raises(ValueError, match="a step of attention is not positive"):
        Core(core, {**case, "floats": np.concatenate([case["floats"][:at], [0], case["floats"][at + 1 :]])}).logits(
            one, one
        )


def test_absent_is_off_in_every_bit(tmp_path):
    """And off is what Paddle's own attention computes."""
    folder, ids, types = make_tiny_ernie(tmp_path / "m"), *padded_batch()
    found = []
    for options in ({}, {"attention": None}):
        model = load_classifier(str(folder), 2)
        KurtosisQAT(options).quantize(model)
        model.eval()
        assert type(model.ernie.encoder.layers[0].self_attn) is paddle.nn.MultiHeadAttention
        found.append(simulated(calibrated(model, *map(paddle.to_tensor, (ids, types))), ids, types))
    np.testing.assert_array_equal(*found)
    plain = load_classifier(str(folder), 2)
    plain.eval()
    model = quantized(tmp_path / "q")
    np.testing.assert_allclose(simulated(fp32_copy(model), ids, types), simulated(plain, ids, types), atol=1e-6)
    assert not np.allclose(simulated(model, ids, types), simulated(plain, ids, types), atol=1e-4)


def test_its_state_is_stored_and_restored(tmp_path):
    model = quantized(tmp_path / "m")
    stored = quantizer_buffers(model)
    assert sum("self_attn._fake_quant_" in name for name in stored) == 2 * 3 * 2  # layers, tensors, buffers
    again = load_classifier(str(tmp_path / "m"), 2)
    KurtosisQAT({"attention": {}}).quantize(again, begin=False)
    again.eval()
    load_quantizer_buffers(again, stored)
    ids, types = padded_batch()
    np.testing.assert_array_equal(simulated(again, ids, types), simulated(model, ids, types))
    without = load_classifier(str(tmp_path / "m"), 2)
    KurtosisQAT({}).quantize(without, begin=False)
    with pytest.raises(UserError, match="of another plan"):
        load_quantizer_buffers(without, stored)
    assert not any("self_attn" in name and "_fake" not in name and "proj" not in name for name in model.state_dict())
    assert len(quantized_linears(model)) == len(quantized_linears(without))


def test_mistakes_are_named(tmp_path):
    model = load_classifier(str(make_tiny_ernie(tmp_path / "m")), 2)
    with pytest.raises(UserError, match=r"attention.bits: 9 is not in 2..8"):
        KurtosisQAT({"attention": {"bits": 9}})
    with pytest.raises(UserError, match="'absmax' is not one of moving_average | mse"):
        config.from_overrides(["Slim.quant.attention={range: absmax}"])
    with pytest.raises(UserError, match="Slim.quant.attention.offset: true"):
        KurtosisQAT({"attention": {"quantizer": "lsq", "offset": True}}).quantize(model)
    with pytest.raises(UserError, match="Slim.quant.attention: the model has no"):
        KurtosisQAT({"attention": {}}).quantize(paddle.nn.Sequential(paddle.nn.Linear(4, 4)))
    model = load_classifier(str(tmp_path / "m"), 2)
    KurtosisQAT({"attention": {}}).quantize(model)
    for layer in quantized_linears(model).values():
        layer._fake_quant_input.train()
        layer._fake_quant_input(paddle.ones([1, 4]))
    with pytest.raises(UserError, match="an activation range was never set"):
        deployable(model)
    with pytest.raises(UserError, match="Export.target: tensorrt: Slim.quant.attention is for CPUs"):
        qdq.save(quantized(tmp_path / "m"), tmp_path / "t")
    settings = config.from_overrides(["Slim.quant.attention={}", "Slim.ibert={}"])
    with pytest.raises(UserError, match="Slim.ibert.softmax: Slim.quant.attention rounds"):
        settings.Slim.methods["ibert"].prepare(model)


def test_a_run_with_it_is_exported_and_gone_on_from(tool, tiny_ernie, tiny_task, tmp_path):
    def options(output, *more):
        names = {
            "Global.output_dir": output,
            "Model.name_or_path": tiny_ernie,
            "Data.path": tiny_task,
            "Train.max_steps": 4,
        }
        names |= {"Train.save_steps": 2, "Train.batch_size": 16, "Slim.quant.attention": "{bits: 8, range: learned}"}
        return ["-o", *[f"{name}={value}" for name, value in names.items()], *more]

    (tmp_path / "c.yaml").write_text("Slim: {quant: {activation: {calibration_batches: 2}}}\n")
    code, _, err = tool("train", "-c", tmp_path / "c.yaml", *options(tmp_path / "run"))
    assert code == 0, err
    plan = (tmp_path / "run/plan.txt").read_text()
    assert "attention: queries, keys and values A8 minmax, range learned; softmax weights 8 bits unsigned" in plan
    code, _, err = tool("export", "-c", tmp_path / "c.yaml", *options(tmp_path / "run"))
    assert code == 0, err
    found = json.loads((tmp_path / "run/summary.json").read_text())["deployed"]
    assert found["passed"]
    assert found["rms_over_std"] < 0.03
    model = load_classifier(str(tmp_path / "run/best_model"), 2)
    quant = config.from_overrides(options("x", "Slim.quant.activation.calibration_batches=2")[1:]).Slim.quant
    kept, remarks = stored_quantizers(str(tmp_path / "run/best_model"), model, quant)
    assert kept is not None, remarks
    other = config.from_overrides(
        ["Slim.quant.attention={range: mse}", "Slim.quant.activation.calibration_batches=2"]
    ).Slim.quant
    kept, remarks = stored_quantizers(str(tmp_path / "run/best_model"), model, other)
    assert kept is None
    assert "attention.range was learned, is mse" in remarks[0]
    bench = open_workbench(
        tmp_path / "run", tiny_task, config.Quant()
    )  # what it measures are Linears; all else is fp32
    model.eval()
    np.testing.assert_allclose(bench.logits, logits_of(model, bench.split, 0), atol=1e-5)
