"""I-BERT against the paper's algorithms in Python's own integers, its bounds, switched off, trained, restored, not exported."""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from test_trainer import QAT, same, settings, weights_of
from tiny_ernie import make_tiny_ernie

from ernie_kqat import KurtosisQAT, UserError, config
from ernie_kqat.evaluate import comparison, logits_of
from ernie_kqat.measure import evaluate_any
from ernie_kqat.methods.ibert import IBERT, AttentionWith, IntegerGELU, IntegerLayerNorm, IntegerSoftmax, integer
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.restore import restore_run
from ernie_kqat.run_folder import RunFolder
from ernie_kqat.trainer import Trainer, train

RNG = np.random.default_rng(0)
LARGE = 2**15


def poly(q, step, a, b, c):
    return (q + math.floor(b / step)) ** 2 + math.floor(c / (a * step**2)), a * step**2


def by_hand_gelu(q, step):
    a, b, c = -0.2888, -1.769, 1
    s = step / math.sqrt(2)
    found, found_step = poly(min(abs(q), -math.floor(b / s)), s, a, b, c)
    erf = found * ((q > 0) - (q < 0))
    return q * (erf + math.floor(1 / found_step)), step * found_step / 2


def by_hand_softmax(row, step, bits):
    a, b, c = 0.35815147, 1.3536624, 0.3437225
    ln2 = math.floor(math.log(2) / step)
    found = []
    for q in row:
        shifted = q - max(row)
        z = -shifted // ln2
        found.append(poly(shifted + z * ln2, step, a, b, c)[0] >> z)
    return [one * (2**bits - 1) // sum(found) for one in found]


def by_hand_normalize(row):
    mean = math.floor(sum(row) / len(row) + 0.5)
    centred = [q - mean for q in row]
    factor = 2**31 // max(1, math.isqrt(sum(q * q for q in centred)))
    return [q * factor // 2 for q in centred]


@pytest.mark.parametrize("step", [1.5e-6, 3e-4, 0.02, 0.9])
def test_gelu_is_algorithm_2_in_integers_of_any_length(step):
    q = np.array([0, 1, -1, 77, -78, 4000, -4001, LARGE - 1, -LARGE])
    found, found_step = integer.gelu(q, step)
    wanted = [by_hand_gelu(int(one), step) for one in q]
    assert found.tolist() == [value for value, _ in wanted]
    assert found_step == wanted[0][1]


@pytest.mark.parametrize(("step", "bits"), [(1.5e-6, 16), (1e-3, 8), (0.02, 8), (0.6, 12)])
def test_softmax_is_algorithm_3_in_integers_of_any_length(step, bits):
    rows = RNG.integers(-LARGE, LARGE, (4, 9))
    rows[1] = rows[1] // 1000
    found, _ = integer.softmax(rows, step, bits)
    assert found.tolist() == [by_hand_softmax([int(q) for q in row], step, bits) for row in rows]


def test_normalize_is_integer_arithmetic_of_any_length():
    rows = np.concatenate([RNG.integers(-LARGE, LARGE, (3, 1024)), np.tile([-LARGE, LARGE - 1], (1, 512))])
    found, _ = integer.normalize(rows)
    assert found.tolist() == [by_hand_normalize([int(q) for q in row]) for row in rows]


def test_gelu_errs_by_what_the_paper_says():
    x = np.arange(-LARGE, LARGE) * 2e-4  # -6.5..6.5
    found, step = integer.gelu(np.arange(-LARGE, LARGE), 2e-4)
    exact = x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    assert 0.0180 < np.abs(found * step - exact).max() < 0.0183  # 1.8e-2: table 1
    near = np.abs(x) <= 4
    assert 0.0081 < np.sqrt(np.mean((found * step - exact)[near] ** 2)) < 0.0083  # 8.2e-3: table 1


def test_exp_errs_by_what_the_paper_says():
    q, step = -np.arange(200_000), 2e-5  # 0..-4
    found, found_step = integer.exp(q, step)
    error = np.abs(found * found_step - np.exp(q * step))
    assert 0.00190 < error[q * step > -math.log(2)].max() < 0.00192  # 1.9e-3: section 3.5
    assert error.max() < 0.00192
    assert integer.exp(np.array([-(10**12)]), step)[0].item() == 0


def test_the_root_is_exact():
    roots = np.array([2, 3, 1000, 2**15 + 1, 2**26 + 3, 2**31 - 1, 3037000499])
    around = np.concatenate([roots**2 - 1, roots**2, roots**2 + 1, RNG.integers(0, 2**63 - 1, 2000)])
    for n in (np.arange(100_000), around, np.array([2**63 - 1])):
        assert integer.sqrt(n).tolist() == [math.isqrt(int(one)) for one in n]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_row_of_softmax_sums_to_one_but_for_what_is_rounded_down(bits):
    q = np.rint(RNG.standard_normal((200, 40)) * 3 / 2e-3).astype(np.int64)
    found, step = integer.softmax(q, 2e-3, bits)
    lost = 1 - found.sum(axis=1) * step
    assert (lost > -1e-12).all()
    assert (lost < 40 * step).all()
    exact = np.exp(q * 2e-3 - (q * 2e-3).max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    assert np.abs(found * step - exact).max() < 0.004 + step
    assert integer.softmax(np.array([0, -(10**6)]), 2e-3, bits)[0].tolist() == [2**bits - 1, 0]


def test_normalize_against_float64():
    q = np.rint(RNG.standard_normal((50, 384)) * 600 + RNG.integers(-900, 900, (50, 1))).astype(np.int64)
    q[:, 5] = 32_000  # an outlier dimension
    found, step = integer.normalize(q)
    deviation = q.std(axis=1, keepdims=True)
    exact = (q - q.mean(axis=1, keepdims=True)) / deviation
    # The mean is half an integer off at most, the root of the squares' sum one of it, the factor one of 2^31 / root.
    bound = 0.5 / deviation + np.abs(exact) * (1.5 / deviation / math.sqrt(384) + 1e-4)
    assert (np.abs(found * step - exact) < bound).all()
    assert not integer.normalize(np.full((2, 8), 77))[0].any()


@pytest.mark.parametrize(
    ("function", "step", "message"),
    [(integer.gelu, 1e-7, "exceed int64"), (integer.exp, 0.7, "needs ln 2 = 0.693 at most")],
)
def test_steps_that_the_integers_cannot_bear(function, step, message):
    with pytest.raises(ValueError, match=message):
        function(np.array([-1]), step)


def made(layer, *shape, spread=2.0):
    """A layer whose range is set, in eval mode, and an input a little beyond that range."""
    layer.train()
    layer(paddle.to_tensor(np.float32([[-5, 5]]).repeat(shape[-1] // 2, axis=1)))
    layer.eval()
    x = paddle.to_tensor((RNG.standard_normal(shape) * spread).astype(np.float32), stop_gradient=False)
    step = 5 / 32767
    return x, np.clip(np.rint(x.numpy().astype(np.float64) / step), -LARGE, LARGE - 1).astype(np.int64), step


def gradients(out, x, weights):
    (out * weights).sum().backward()
    grad = x.grad.numpy()
    x.clear_gradient()
    return grad


def check(layer, x, q, step, value, exact):
    """The layer gives `value`, NumPy's; its gradient is that of `exact`, a Paddle function, at the rounded input."""
    weights = paddle.to_tensor(RNG.standard_normal(x.shape).astype(np.float32))
    out = layer(x)
    np.testing.assert_allclose(out.numpy(), value, rtol=1e-6, atol=1e-9)
    at = paddle.to_tensor((q * step).astype(np.float32), stop_gradient=False)
    np.testing.assert_allclose(
        gradients(out, x, weights), gradients(exact(at), at, weights), rtol=1e-4, atol=1e-5 * float(weights.abs().max())
    )


def test_the_gelu_layer_computes_integers_and_has_gelus_gradient():
    layer = IntegerGELU(16)
    x, q, step = made(layer, 5, 40)
    found, found_step = integer.gelu(q, step)
    check(layer, x, q, step, found * found_step, F.gelu)


def test_the_softmax_layer_computes_integers_and_has_softmaxs_gradient():
    layer = IntegerSoftmax(16, 8)
    x, q, step = made(layer, 2, 3, 6, 6)
    found, found_step = integer.softmax(q, step, 8)
    check(layer, x, q, step, found * found_step, F.softmax)


def test_the_layernorm_layer_computes_integers_and_has_layernorms_gradients():
    norm = paddle.nn.LayerNorm(40, 1e-12)
    norm.weight.set_value(RNG.normal(1, 0.3, 40).astype(np.float32))
    norm.bias.set_value(RNG.normal(0, 0.3, 40).astype(np.float32))
    layer = IntegerLayerNorm(norm, 16)
    x, q, step = made(layer, 5, 40)
    found, found_step = integer.normalize(q)
    value = found * found_step * norm.weight.numpy() + norm.bias.numpy()
    check(layer, x, q, step, value, norm)
    assert layer.weight is norm.weight
    assert layer.weight.grad is not None


def test_a_masked_token_is_as_if_it_were_not_there():
    layer = IntegerSoftmax(16, 8)
    scores, _, _ = made(layer, 3, 2, 4, 8)
    mask = np.zeros((3, 1, 1, 8), np.float32)
    mask[:, :, :, 5:] = -1e4
    weights = layer(scores, paddle.to_tensor(mask)).numpy()
    assert not weights[..., 5:].any()
    np.testing.assert_array_equal(weights[..., :5], layer(scores[:, :, :, :5]).numpy())


def test_attention_is_paddles_but_for_the_softmax():
    attention = paddle.nn.MultiHeadAttention(24, 4)
    x = paddle.to_tensor(RNG.standard_normal((3, 7, 24)).astype(np.float32))
    mask = paddle.to_tensor(np.where(RNG.random((3, 1, 1, 7)) < 0.3, -1e4, 0).astype(np.float32))
    ours = AttentionWith(attention, lambda scores, mask: F.softmax(scores + mask))
    np.testing.assert_array_equal(ours(x, x, x, mask).numpy(), attention(x, x, x, mask).numpy())


def quantized(folder, **switches):
    model = KurtosisQAT().quantize(load_classifier(str(folder), 2))
    IBERT(**switches).prepare(model)
    return model


def test_every_function_of_the_encoder_is_swapped_and_every_parameter_keeps_its_name(tiny_ernie):
    plain, swapped = quantized(tiny_ernie, gelu=False, softmax=False, layernorm=False), quantized(tiny_ernie)
    counts = dict.fromkeys((IntegerGELU, IntegerSoftmax, IntegerLayerNorm, paddle.nn.LayerNorm), 0)
    for layer in swapped.sublayers():
        if type(layer) in counts:
            counts[type(layer)] += 1
    assert list(counts.values()) == [2, 2, 5, 0]
    assert [name for name, _ in swapped.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize(
    ("switches", "rms"),
    [({"gelu": True}, 0.1), ({"softmax": True, "softmax_bits": 16}, 0.01), ({"layernorm": True}, 0.005)],
    ids=["gelu", "softmax", "layernorm"],
)
def test_a_model_of_integers_is_near_the_model_of_floats(tiny_ernie, tiny_task, tmp_path, switches, rms):
    only = {"gelu": False, "softmax": False, "layernorm": False, **switches}
    quant = {"quant": {"layers": [["encoder|pooler", "skip"]]}}  # 8 bits elsewhere would drown the difference
    logits = {}
    for name, slim in (("float", quant), ("integer", {**quant, "ibert": only})):
        made = settings(tmp_path, tiny_ernie, tiny_task, name, Slim=slim, Train={"epochs": 0})
        one = Trainer(made, RunFolder(tmp_path / name, made))
        one.folder.open()
        one.run(False)
        logits[name] = logits_of(one.model, one.data.dev, 0)
    found = comparison(logits["integer"], logits["float"])
    assert 0 < found["rms_over_std"] < rms


def test_switched_off_is_bit_identical_to_its_absence(tmp_path, tiny_ernie, tiny_task):
    off = {"ibert": {"gelu": False, "softmax": False, "layernorm": False}}
    train(settings(tmp_path, tiny_ernie, tiny_task, "absent", Slim=QAT, Train={"max_steps": 4}))
    train(settings(tmp_path, tiny_ernie, tiny_task, "off", Slim={**QAT, **off}, Train={"max_steps": 4}))
    same(weights_of(tmp_path / "absent"), weights_of(tmp_path / "off"))


def test_it_trains_and_is_restored_exactly_and_is_not_exported(tmp_path, tiny_ernie, tiny_task):
    from ernie_kqat.export.exporter import export_run

    made = settings(tmp_path, tiny_ernie, tiny_task, Slim={**QAT, "ibert": {}}, Train={"epochs": 3, "select": "last"})
    one = Trainer(made, RunFolder(tmp_path / "run", made))
    one.folder.open()
    summary = one.run(False)
    assert summary["accuracy"] > summary["fp32_start_accuracy"] + 0.2
    restored = restore_run(tmp_path / "run")
    assert not any(layer.training for layer in restored.model.sublayers())
    wanted = logits_of(one.model, one.data.dev, 0)
    np.testing.assert_array_equal(logits_of(restored.model, one.data.dev, 0), wanted)
    assert evaluate_any(tmp_path / "run", tiny_task, config.Data())["accuracy"] == summary["accuracy"]
    with pytest.raises(UserError, match=r"layer_norm: Slim.ibert is simulated only.*nothing is exported"):
        export_run(str(tmp_path / "run"), str(tmp_path / "out"), config.Export())
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_resumed_run_goes_on_exactly(tmp_path, tiny_ernie, tiny_task):
    slim = {**QAT, "ibert": {}}
    train(settings(tmp_path, tiny_ernie, tiny_task, "whole", Slim=slim, Train={"max_steps": 4}))
    made = settings(tmp_path, tiny_ernie, tiny_task, "cut", Slim=slim, Train={"max_steps": 4, "save_steps": 2})
    one = Trainer(made, RunFolder(tmp_path / "cut", made))
    one.folder.open()
    save = one._save
    one._save = lambda: save() if one.progress.step == 2 else None
    one.run(False)
    train(made, resume=True)
    same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))


def test_mistakes_are_named(tmp_path, tiny_ernie):
    with pytest.raises(UserError, match="Slim.ibert: needs a quantized model; say Slim.quant"):
        IBERT().prepare(load_classifier(str(tiny_ernie), 2))
    with pytest.raises(UserError, match="Slim.ibert.gelu: the model's activation is relu; say gelu: false"):
        quantized(make_tiny_ernie(tmp_path / "relu", hidden_act="relu"))


def test_inputs_of_a_model_that_has_diverged_are_named():
    for value, message in ((3000.0, "Slim.ibert.bits: step 1.46.*more bits"), (float("nan"), "training has diverged")):
        layer = IntegerSoftmax(12, 8)
        layer.train()
        with pytest.raises(UserError, match=message):
            layer(paddle.to_tensor([[value, 1.0]]))
