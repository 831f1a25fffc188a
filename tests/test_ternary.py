"""Ternary, binary and split weights against their papers' equations in float64, in training and deployed."""

import json
import shutil

import numpy as np
import paddle
import pytest
import yaml
from test_program import OneLinear, calibrated, run
from test_trainer import settings

from ernie_kqat import KurtosisQAT, UserError, config, quantizers
from ernie_kqat.config import ActivationQuant, Quant, WeightQuant
from ernie_kqat.measure import evaluate_any
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import WeightQuantizer, numeric
from ernie_kqat.quantizers.attach import quantized_linears
from ernie_kqat.restore import restore_run
from ernie_kqat.run_folder import RunFolder
from ernie_kqat.trainer import Trainer, train

CHANNELS = 24
RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((40, CHANNELS)) * np.logspace(-2, 2, CHANNELS)).astype(np.float32)
OPTIONS = {
    "ternary": {"quantizer": "ternary", "bits": 2},
    "binary": {"quantizer": "binary", "bits": 1},
    "split": {"quantizer": "binary", "bits": 1, "split": True},
}


def groups(weight, granularity):
    """The groups that share a step, as rows."""
    return weight.T if granularity == "channel" else weight.reshape(1, -1)


def ternary(group):
    """Equations 5 and 6 of 1605.04711, one group, by their letter."""
    group = group.astype(np.float64)
    threshold = 0.7 * np.abs(group).mean()
    step = np.abs(group)[np.abs(group) > threshold].mean()
    return step * np.sign(group) * (np.abs(group) > threshold)


def binary(group):
    group = group.astype(np.float64)
    return np.abs(group).mean() * np.where(group < 0, -1.0, 1.0)


def quantizer(kind, granularity="channel", weight=WEIGHT):
    tensor = paddle.create_parameter(weight.shape, "float32", attr=_assigned(weight))
    options = WeightQuant(granularity=granularity, **OPTIONS[kind])
    made = quantizers.find(options.quantizer, WeightQuantizer)(options, tensor)
    made.begin(tensor)
    return made, tensor


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("kind", "oracle"), [("ternary", ternary), ("binary", binary), ("split", ternary)])
def test_values_and_gradient(kind, oracle, granularity):
    made, weight = quantizer(kind, granularity)
    grad = RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    quantized = made(weight)
    (quantized * paddle.to_tensor(grad)).sum().backward()
    expected = np.stack([oracle(group) for group in groups(WEIGHT, granularity)])
    np.testing.assert_allclose(groups(quantized.numpy(), granularity), expected, rtol=1e-6)
    np.testing.assert_array_equal(weight.grad.numpy(), grad)
    q, step = made.integers(weight)
    np.testing.assert_array_equal(q.astype(np.float32) * step, quantized.numpy())  # what is deployed IS the simulation
    np.testing.assert_array_equal(made.current_step(weight).numpy(), step)
    assert q.dtype == np.int8


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("kind", "oracle"), [("ternary", ternary), ("binary", binary), ("split", ternary)])
def test_a_real_layers_size_in_float32(kind, oracle, granularity):
    """Sums over 1536 rows in float32 give the papers' values, and the very integers that are deployed, bit for bit."""
    weight = (np.random.default_rng(2).standard_t(4, (1536, 384)) * 0.05).astype(np.float32)
    weight[5] = 0.0
    made, tensor = quantizer(kind, granularity, weight)
    q, step = made.integers(tensor)
    quantized = made(tensor).numpy()
    np.testing.assert_array_equal(quantized, q.astype(np.float32) * step)
    expected = np.stack([oracle(group) for group in groups(weight, granularity)])
    np.testing.assert_allclose(groups(quantized, granularity), expected, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("power", [1, 3])  # 3: long tails, as of pretrained weights
def test_the_two_invariants_of_splitting(granularity, power):
    weight = WEIGHT.astype(np.float64) ** power
    first, second = numeric.split_ternary(weight, granularity)
    for w, u1, u2 in zip(*(groups(values, granularity) for values in (weight, first, second))):
        np.testing.assert_allclose(u1 + u2, w, rtol=0, atol=1e-12 * np.abs(w).max())
        np.testing.assert_allclose(binary(u1) + binary(u2), ternary(w), rtol=0, atol=1e-12 * np.abs(w).max())
        np.testing.assert_allclose(np.abs(u1).mean(), np.abs(u2).mean(), rtol=1e-12)


def test_a_group_with_no_small_weights_is_halved():
    weight = np.array([[1.0], [-1.0], [1.1]])
    first, second = numeric.split_ternary(weight, "channel")
    np.testing.assert_allclose(first, weight / 2)
    np.testing.assert_allclose(second, weight / 2)


def test_a_group_that_cannot_be_split_is_refused():
    weight = np.float32([[0.69]] * 10 + [[4.1]])  # the threshold is 0.7
    with pytest.raises(UserError, match=r"Slim\.quant: split: the small weights of a group are nearly all of one sign"):
        quantizer("split", weight=weight)


def test_an_all_zero_channel_stays_zero_or_small():
    weight = WEIGHT.copy()
    weight[:, 3] = 0
    for kind in ("ternary", "binary"):
        made, tensor = quantizer(kind, weight=weight)
        assert np.isfinite(made(tensor).numpy()).all()
    made, tensor = quantizer("ternary", weight=weight)
    assert (made(tensor).numpy()[:, 3] == 0).all()


def test_a_split_weight_trains_as_two_binary_ones():
    """Against BinaryBERT's own way: two matrices, each with its own AdamW and straight-through gradient."""
    made, _ = quantizer("split")
    first, second = (half.astype(np.float32) for half in numeric.split_ternary(WEIGHT, "channel"))
    halves = [paddle.create_parameter(half.shape, "float32", attr=_assigned(half)) for half in (first, second)]
    whole = paddle.create_parameter(WEIGHT.shape, "float32", attr=_assigned(WEIGHT))
    whole.optimize_attr["learning_rate"] = made.learning_rate
    for parameters in ([whole], halves):
        optimizer = paddle.optimizer.AdamW(1e-2, parameters=parameters, weight_decay=0.0)
        rng = np.random.default_rng(1)
        for _ in range(5):
            grad = paddle.to_tensor(rng.standard_normal(WEIGHT.shape).astype(np.float32))
            sum((parameter * grad).sum() for parameter in parameters).backward()
            optimizer.step()
            optimizer.clear_grad()
    both = sum(np.stack([binary(column) for column in half.numpy().T]).T for half in halves)
    scale = np.abs(both).max(axis=0)
    np.testing.assert_allclose(made(whole).numpy() / scale, both / scale, atol=1 / 126)


def _assigned(values):
    return paddle.ParamAttr(initializer=paddle.nn.initializer.Assign(values))


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_one_deployed_linear_equals_its_simulation(tmp_path, kind, granularity):
    quant = Quant(WeightQuant(granularity=granularity, **OPTIONS[kind]), ActivationQuant())
    qat = KurtosisQAT.from_options(quant)
    model = qat.quantize(OneLinear(WEIGHT, RNG.standard_normal(CHANNELS).astype(np.float32)))
    if kind == "split":  # trained since: unequal halves
        noise = RNG.standard_normal(WEIGHT.shape) * np.abs(WEIGHT).mean(axis=0) / 4
        model.linear.weight.set_value(WEIGHT + noise.astype(np.float32))
    x = RNG.standard_normal((6, 8, 40)).astype(np.float32)
    model.eval()
    calibrated(model, paddle.to_tensor(x))
    qat.save_quantized_model(
        model, str(tmp_path / "m"), [paddle.static.InputSpec([None, None, 40], "float32", name="x")]
    )
    simulated = model(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(run(tmp_path / "m", x), simulated, atol=2e-5 * np.abs(simulated).max())


def test_a_split_run_begins_where_the_ternary_one_ended_and_is_restored_exactly(tmp_path, tiny_ernie, tiny_task):
    trained(tmp_path, tiny_task, "ternary", tiny_ernie, "ternary")
    ended = restore_run(tmp_path / "ternary").model
    started = load_classifier(str(tmp_path / "ternary/best_model"), 2)
    KurtosisQAT.from_options(Quant(WeightQuant(granularity="tensor", **OPTIONS["split"]))).quantize(started)
    halves = quantized_linears(started)
    for name, layer in quantized_linears(ended).items():
        of_ternary, of_halves = (one._fake_quant_weight(one.weight).numpy() for one in (layer, halves[name]))
        np.testing.assert_allclose(of_halves, of_ternary, rtol=1e-6)
    summary = trained(tmp_path, tiny_task, "split", tmp_path / "ternary/best_model", "split")
    assert evaluate_any(tmp_path / "split", tiny_task, config.Data())["accuracy"] == summary["accuracy"]


def trained(tmp_path, task, name, start, kind, **slim):
    quant = {"weight": {"granularity": "tensor", **OPTIONS[kind]}}
    brief = {"max_steps": 6, "learning_rate": 1e-3, "select": "last"}
    return train(settings(tmp_path, start, task, name, Slim={"quant": quant, **slim}, Train=brief))


def test_a_split_run_goes_on_from_a_split_run_as_it_was_left(tmp_path, tiny_ernie, tiny_task):
    """u1 - u2 of the first run, and its activation ranges, are those that the second one begins with."""
    trained(tmp_path, tiny_task, "first", tiny_ernie, "split")
    best = tmp_path / "first/best_model"
    second = settings(
        tmp_path, best, tiny_task, "second", Slim={"quant": {"weight": {"granularity": "tensor", **OPTIONS["split"]}}}
    )
    one = Trainer(second, RunFolder(tmp_path / "second", second))
    assert one.remarks == [f"quantizers go on as they are in {best}"]
    ended = restore_run(tmp_path / "first").model.state_dict()
    begun = one.model.state_dict()
    assert set(ended) == set(begun)
    for name, value in ended.items():
        np.testing.assert_array_equal(begun[name].numpy(), value.numpy(), err_msg=name)
    summary = train(second)
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_accuracy"] == json.loads((tmp_path / "first/summary.json").read_text())["accuracy"]
    assert summary["fp32_start_accuracy"] != rows[0]["eval_accuracy"]  # else this shows nothing
    assert one.remarks[0] in (tmp_path / "second/plan.txt").read_text()


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"kind": "binary"}, "weight.split was True, is False"),
        ({"bits": 4}, "activation.bits was 8, is 4"),
        ({"layers": [["classifier", "skip"]]}, "classifier: weight.quantizer was binary, is None"),
        ({"embedding": {}}, "embedding was None"),
        ({"alone": True}, "its run, which says their plan, is not around it"),
    ],
)
def test_quantizers_of_another_plan_are_not_taken_over(tmp_path, tiny_ernie, tiny_task, change, remark):
    trained(tmp_path, tiny_task, "first", tiny_ernie, "split")
    best = tmp_path / "first/best_model"
    if change.get("alone"):
        best = shutil.copytree(best, tmp_path / "elsewhere")
    quant = {
        "weight": {"granularity": "tensor", **OPTIONS[change.get("kind", "split")]},
        "activation": {"bits": change.get("bits", 8)},
        "layers": change.get("layers"),
        "embedding": change.get("embedding"),
    }
    train(settings(tmp_path, best, tiny_task, "second", Slim={"quant": quant}, Train={"epochs": 0}))
    log = (tmp_path / "second/train.log").read_text()
    assert "quantizers begin anew: " in log
    assert remark in log


def test_a_run_is_restored_whose_weights_could_no_longer_be_split(tmp_path, tiny_ernie, tiny_task):
    trained(tmp_path, tiny_task, "first", tiny_ernie, "split")
    path = tmp_path / "first/best_model/model_state.pdparams"
    state = paddle.load(str(path))
    name = "ernie.pooler.dense.weight"
    small = paddle.full(state[name].shape, 0.69)
    small[:3] = 4.1  # as test_a_group_that_cannot_be_split_is_refused
    paddle.save({**state, name: small}, str(path))
    with pytest.raises(ValueError, match="one sign"):
        numeric.split_ternary(small.numpy(), "tensor")
    restored = restore_run(tmp_path / "first").model
    np.testing.assert_array_equal(restored.state_dict()[name].numpy(), small.numpy())


def test_a_chain_of_quantized_runs_is_compared_with_the_fp32_model_it_began_from(tmp_path, tiny_ernie, tiny_task):
    trained(tmp_path, tiny_task, "first", tiny_ernie, "ternary")
    trained(tmp_path, tiny_task, "second", tmp_path / "first/best_model", "split")
    labels = {"negative": "0", "positive": "1"}  # the tiny ERNIE's labels have no names
    described = json.loads((tiny_ernie / "config.json").read_text())
    named = shutil.copytree(tiny_ernie, tmp_path / "named")
    described["id2label"] = {index: label for label, index in labels.items()}
    (named / "config.json").write_text(json.dumps(described))
    for name, start in (("first", named), ("second", tmp_path / "first/best_model")):
        path = tmp_path / name / "resolved.yaml"
        tree = yaml.safe_load(path.read_text())
        tree["Model"]["name_or_path"] = str(start)
        path.write_text(yaml.safe_dump(tree))
    assert restore_run(tmp_path / "second").fp32 == str(named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "ternary", "bits": 4}, "Slim.quant.weight.bits: 4 for linear; quantizer ternary has 2$"),
        ({"quantizer": "binary", "bits": 2}, "bits: 2 for linear; quantizer binary has 1$"),
        ({"quantizer": "minmax", "bits": 1}, "bits: 1 for linear; quantizer minmax has 2 to 8$"),
        ({"quantizer": "lsq", "bits": 1}, "bits: 1 for linear; quantizer lsq has 2 to 8$"),
    ],
)
def test_bits_that_a_quantizer_does_not_have(options, message):
    with pytest.raises(UserError, match=message):
        KurtosisQAT.from_options(Quant(WeightQuant(**options))).quantize(OneLinear(WEIGHT, None))
