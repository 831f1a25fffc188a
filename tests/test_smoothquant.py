"""SmoothQuant against NumPy, in fp32, quantized, stored and deployed; the chain of blocks that other methods walk."""

import numpy as np
import paddle
import pytest
from test_program import run
from test_trainer import QAT, same, settings, weights_of

from ernie_kqat import KurtosisQAT, UserError, config
from ernie_kqat.analysis.workbench import Workbench
from ernie_kqat.blocks import Stream, blocks_of
from ernie_kqat.calibration import calibrate
from ernie_kqat.data.dataset import load_eval_split
from ernie_kqat.evaluate import logits_of
from ernie_kqat.export import program
from ernie_kqat.methods.smoothquant import SmoothQuant, activation_peaks, smoothing
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import numeric
from ernie_kqat.quantizers.attach import add_smoothing, fp32_copy, quantized_linears, smooth, weight_of
from ernie_kqat.restore import restore_folder, restore_run
from ernie_kqat.tokenizer import load_tokenizer
from ernie_kqat.trainer import train

RNG = np.random.default_rng(0)
LAYER = "ernie.encoder.layers.0"


def batches(count=3, rows=8, tokens=11):
    """Random ids; the last rows of a batch are padded."""
    found = []
    for _ in range(count):
        ids = RNG.integers(5, 90, (rows, tokens))
        ids[rows // 2 :, tokens - 4 :] = 0
        found.append({"input_ids": ids, "token_type_ids": np.zeros_like(ids)})
    return found


BATCHES = batches()


def outliers(tiny_ernie):
    """The tiny ERNIE with a few features that are far larger than the others, as real ones have."""
    model = load_classifier(str(tiny_ernie), 2, dropout=0.0)
    for layer in model.ernie.encoder.layers:
        for norm in (layer.norm1, layer.norm2):
            norm.weight.set_value(
                norm.weight * paddle.to_tensor(np.where(np.arange(32) % 16 == 3, 30, 1).astype("float32"))
            )
    model.eval()
    return model


def quantized(model, *methods, **quant):
    """It, quantized and calibrated on BATCHES with methods."""
    KurtosisQAT.from_options(config.from_tree({"Slim": {"quant": quant}}, "test").Slim.quant).quantize(model)
    for method in methods:
        method.attach(model, dict)
    calibrate(model, BATCHES, methods)
    model.eval()
    return model


def logits(model, batch=BATCHES[0]):
    return model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"])).numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equation_4(alpha):
    x, w = np.exp(RNG.normal(0, 3, (2, 50)))
    np.testing.assert_allclose(smoothing(x, w, alpha), x**alpha / w ** (1 - alpha), rtol=1e-6)
    assert np.isfinite(smoothing(np.zeros(3), np.ones(3), alpha)).all()


def test_the_chain_of_blocks_is_the_model(tiny_ernie):
    model = outliers(tiny_ernie)
    stream = Stream(model, BATCHES)
    for block in blocks_of(model):
        stream.through(block)
    for batch, found in zip(BATCHES, stream.hidden):
        np.testing.assert_array_equal(found.numpy(), logits(model, batch))


def test_s_is_from_real_tokens_and_shared_by_q_k_v(tiny_ernie):
    model = outliers(tiny_ernie)
    hidden = Stream(model, BATCHES)
    x = np.concatenate([one.numpy()[real] for one, real in zip(hidden.hidden, hidden.real)])
    attention = model.ernie.encoder.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    w = np.max([np.abs(layer.weight.numpy()).max(axis=1) for layer in projections], axis=0)
    expected = np.abs(x).max(axis=0).astype(np.float64) ** 0.7 / w.astype(np.float64) ** 0.3
    layers = quantized_linears(quantized(model, SmoothQuant(alpha=0.7), weight={"bits": 4, "range": "mse"}))
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = layers[f"{LAYER}.self_attn.{name}"]
        np.testing.assert_allclose(layer._weight_preprocess.factor.numpy()[:, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(layer._act_preprocess.factor.numpy(), 1 / expected, rtol=1e-5)
    assert layers[f"{LAYER}.self_attn.out_proj"]._act_preprocess is None  # taken into v_proj
    assert layers["classifier"]._act_preprocess is None
    for layer in layers.values():  # the ranges are those of s W
        expected = numeric.mse_range(weight_of(layer).numpy(), 4, "channel")
        np.testing.assert_array_equal(layer._fake_quant_weight.range.numpy(), expected)


def test_padding_has_no_say(tiny_ernie):
    model = quantized(outliers(tiny_ernie))
    table = model.ernie.embeddings.position_embeddings.weight
    far = (
        np.where(np.arange(table.shape[0]) >= 11, np.float32(50), np.float32(0))[:, None]
        * np.eye(32, dtype="float32")[5]
    )
    table.set_value(table.numpy() + far)
    wider = [{name: np.pad(ids, ((0, 0), (0, 5))) for name, ids in batch.items()} for batch in BATCHES]
    names = [f"{LAYER}.self_attn.q_proj", f"{LAYER}.linear1", "ernie.pooler.dense"]
    peaks, same = (activation_peaks(model, names, rows) for rows in (BATCHES, wider))
    for name in names:
        np.testing.assert_allclose(peaks[name], same[name], rtol=1e-5)


def test_the_fp32_function_stays_and_the_quantized_one_comes_nearer(tiny_ernie):
    before = logits(outliers(tiny_ernie))
    weights = dict(outliers(tiny_ernie).named_parameters())
    plain, smoothed = quantized(outliers(tiny_ernie)), quantized(outliers(tiny_ernie), SmoothQuant())
    np.testing.assert_allclose(logits(fp32_copy(smoothed)), before, atol=2e-6 * np.abs(before).max() + 2e-6)
    errors = [np.square(logits(model) - before).mean() for model in (plain, smoothed)]
    assert errors[1] < 0.5 * errors[0]
    moved = {name for name, value in smoothed.named_parameters() if (value != weights[name]).any()}
    touched = ("v_proj.weight", "v_proj.bias", "out_proj.weight")
    assert moved == {f"ernie.encoder.layers.{index}.self_attn.{name}" for index in (0, 1) for name in touched}


@pytest.mark.parametrize("quant", [{}, {"weight": {"bits": 4, "range": "mse"}, "activation": {"bits": 4}}])
def test_deployed_it_equals_its_simulation_with_one_quantize_operator_for_q_k_v(tmp_path, tiny_ernie, quant):
    model = quantized(outliers(tiny_ernie), SmoothQuant(), **quant)
    ids, types = BATCHES[0]["input_ids"], BATCHES[0]["token_type_ids"]
    program.save_int8(model, tmp_path / "m", rewrites=config.Rewrites(first_token=False, activations=False))
    simulated = logits(model)
    assert np.abs(run(tmp_path / "m", ids, types) - simulated).max() < 0.02 * simulated.std()
    with program.static_mode():
        block = paddle.static.deserialize_program((tmp_path / "m.pdmodel").read_bytes()).global_block()
    kinds = [op.type for op in block.ops if not any(name.endswith(".step") for name in op.input_arg_names)]
    assert kinds.count("quantize") == 2 * 4 + 2  # q k v, out, linear1, linear2; pooler, classifier
    assert kinds.count("elementwise_mul") == 2 * 3  # q k v, linear1, linear2


def test_a_smoothed_weight_is_split_anew(tiny_ernie):
    model = quantized(outliers(tiny_ernie), weight={"quantizer": "binary", "bits": 1, "split": True})
    layer = quantized_linears(model)[f"{LAYER}.linear1"]
    add_smoothing(layer)
    smooth(layer, np.linspace(0.5, 2, layer.weight.shape[0]).astype(np.float32))
    halves = numeric.split_ternary(weight_of(layer).numpy(), "channel")
    difference = layer._fake_quant_weight.difference.numpy()
    np.testing.assert_allclose(difference, halves[0] - halves[1], rtol=1e-5, atol=1e-7)


def test_it_is_stored_and_restored_with_the_quantizers(tmp_path, tiny_ernie, tiny_task):
    slim = {**QAT, "smoothquant": {"alpha": 0.4}, "bias_correction": {}}
    summary = train(settings(tmp_path, tiny_ernie, tiny_task, Slim=slim, Train={"epochs": 0}))
    restored = restore_run(tmp_path / "run")
    split = load_eval_split(tiny_task / "dev.tsv", load_tokenizer(restored.vocabulary), restored.labels, 32)
    found = logits_of(restored.model, split, restored.pad_token_id)
    assert np.mean(found.argmax(axis=1) == split.labels) == summary["accuracy"]
    layer = restored.model.ernie.encoder.layers[1].linear2
    np.testing.assert_allclose(layer._act_preprocess.factor * layer._weight_preprocess.factor[:, 0], 1, rtol=1e-6)
    assert np.ptp(layer._act_preprocess.factor.numpy()) > 0
    plain = restore_folder(tmp_path / "run/best_model")  # still the fp32 model, but for the biases
    before = logits_of(restore_folder(tiny_ernie).model, split, 0)
    assert np.abs(logits_of(plain.model, split, 0) - before).max() < 0.1 * before.std()
    deployed = {}
    for name, one in quantized_linears(restored.model).items():
        q, step = one._fake_quant_weight.integers(weight_of(one))
        deployed[name] = q.astype(np.float32) * step
    bench = Workbench(restored, split)
    for name, weight in bench.on_own_grid().items():
        np.testing.assert_array_equal(weight, deployed[name])
    assert bench.measure(deployed, bench.layers).accuracy == summary["accuracy"]


def test_switched_off_it_is_bit_identical_to_its_absence(tmp_path, tiny_ernie, tiny_task):
    brief = {"max_steps": 3}
    train(settings(tmp_path, tiny_ernie, tiny_task, "absent", Slim=QAT, Train=brief))
    train(settings(tmp_path, tiny_ernie, tiny_task, "off", Slim={**QAT, "smoothquant": {"alpha": None}}, Train=brief))
    same(weights_of(tmp_path / "absent"), weights_of(tmp_path / "off"))


def test_rules_choose_layers(tiny_ernie):
    rules = [["linear2", "skip"], [r"layers\.1", 0.6], ["linear1|pooler", 0.5]]
    method = SmoothQuant(alpha=rules)
    layers = quantized_linears(quantized(outliers(tiny_ernie), method))
    smoothed = {name for name, layer in layers.items() if layer._act_preprocess}
    inner = {
        f"ernie.encoder.layers.1.{name}"
        for name in ("linear1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    }
    assert smoothed == {*inner, f"{LAYER}.linear1", "ernie.pooler.dense"}
    assert method.plan() == ["SmoothQuant: 7 layers, alpha 0.5, 0.6"]


@pytest.mark.parametrize(
    ("slim", "message"),
    [
        ({"smoothquant": {}}, "Slim.smoothquant: needs quantized layers; say Slim.quant"),
        ({**QAT, "smoothquant": {"alpha": 1.5}}, "Slim.smoothquant.alpha: 1.5 is not a number in 0..1"),
        ({**QAT, "smoothquant": {"alpha": True}}, "Slim.smoothquant.alpha: True is not a number in 0..1"),
        ({**QAT, "smoothquant": {"alpha": [["conv", 0.5]]}}, "Slim.smoothquant.alpha.0.: rule 'conv' has no effect"),
        (
            {**QAT, "smoothquant": {"alpha": [["q_proj", 0.5]]}},
            "q_proj, .*k_proj, .*v_proj read one tensor; give them one alpha",
        ),
        (
            {"quant": {"weight": {"quantizer": "binary", "bits": 1, "split": True}}, "smoothquant": {}},
            "q_proj: a split weight is not smoothed",
        ),
        ({"bias_correction": {}}, "Slim.bias_correction: needs quantized layers"),
        ({"brecq": {}}, "Slim.brecq: needs quantized layers"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_ernie, tiny_task, slim, message):
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path, tiny_ernie, tiny_task, Slim=slim))
