"""Adaptive splitting: the knapsack against all subsets, gains against plain arithmetic, and plans that train and export."""

import itertools
import json

import numpy as np
import paddle
import pytest
from test_ternary import binary, ternary, trained
from test_trainer import settings

from ernie_kqat import UserError, config
from ernie_kqat.analysis import splitting
from ernie_kqat.analysis.splitting import Options, knapsack, search
from ernie_kqat.data.dataset import load_eval_split
from ernie_kqat.evaluate import cross_entropy, logits_of
from ernie_kqat.export.exporter import export_run
from ernie_kqat.quantizers.attach import quantized_linears
from ernie_kqat.restore import restore_run
from ernie_kqat.tokenizer import load_tokenizer
from ernie_kqat.trainer import train

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_the_best_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    gains = rng.standard_normal(11) + 0.5
    costs = rng.choice([3, 7, 7, 20], 11).tolist()
    budget = int(rng.integers(0, sum(costs) + 5))
    best = max(
        sum(gains[list(chosen)])
        for count in range(12)
        for chosen in itertools.combinations(range(11), count)
        if sum(costs[place] for place in chosen) <= budget
    )
    found = knapsack(gains.tolist(), costs, budget)
    assert sum(costs[place] for place in found) <= budget
    assert sum(gains[found]) == pytest.approx(best)
    assert all(gains[place] > 0 for place in found)


def test_a_knapsack_of_many_equal_layers_is_quick():
    gains = RNG.random(200).tolist()
    assert len(knapsack(gains, [4] * 200, 400)) == 100
    assert set(knapsack(gains, [4] * 200, 400)) == set(np.argsort(gains)[-100:].tolist())


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_ernie, tiny_task):
    """A ternary run, but for its classifier (8 bits) and one layer in fp32; read only."""
    folder = tmp_path_factory.mktemp("splitting")
    weight = {"quantizer": "ternary", "bits": 2, "granularity": "tensor"}
    layers = [["classifier", {"weight": {"quantizer": "minmax", "bits": 8}}], ["pooler", "skip"]]
    quant = {"weight": weight, "activation": {"range": "mse", "calibration_batches": 4}, "layers": layers}
    brief = {"epochs": 2, "learning_rate": 3e-3}
    train(settings(folder, tiny_ernie, tiny_task, "ternary", Slim={"quant": quant}, Train=brief))
    return folder / "ternary"


@pytest.fixture(scope="module")
def found(run, tiny_task):
    """A search in a budget between all and none."""
    return search(Options(str(run), str(tiny_task), budget_ratio=0.06), run.parent / "plan"), run.parent / "plan"


def test_gains_and_sizes_are_plain_arithmetic(found, run, tiny_task):
    results, _ = found
    restored = restore_run(run)
    split = load_eval_split(
        tiny_task / "dev.tsv", load_tokenizer(restored.vocabulary), restored.labels, restored.data.max_length
    )

    def loss():
        return cross_entropy(logits_of(restored.model, split, 0), split.labels)

    linears = quantized_linears(restored.model)
    assert [layer["name"] for layer in results["layers"]] == [name for name in linears if name != "classifier"]
    base = loss()
    assert results["all"]["loss"] == pytest.approx(base, rel=1e-5)
    for layer in results["layers"][3:6]:
        linear = linears[layer["name"]]
        quantizer, values = linear._fake_quant_weight, linear.weight.numpy()
        linear._fake_quant_weight = paddle.nn.Identity()
        linear.weight.set_value(binary(values.reshape(-1)).reshape(values.shape).astype(np.float32))
        assert layer["gain"] == pytest.approx(loss() - base, rel=1e-3, abs=1e-5)
        linear.weight.set_value(values)
        linear._fake_quant_weight = quantizer
        assert layer["cost_bytes"] == values.size / 8 + 4
    size = {name: linear.weight.size for name, linear in linears.items()}
    for row, chosen in (
        (results["all"], set(size)),
        (results["chosen"], {layer["name"] for layer in results["layers"] if layer["split"]}),
        (results["none"], set()),
    ):
        packed = sum((n / 8 + 4) * (2 if name in chosen else 1) for name, n in size.items() if name != "classifier")
        assert row["size_bytes"] == packed + size["classifier"] + 4
    assert results["fp32_bytes"] == 4 * sum(size.values())


def test_the_choice_fits_and_is_the_best_that_does(found):
    results, output = found
    layers, budget = results["layers"], results["budget_bytes"]
    chosen = [layer for layer in layers if layer["split"]]
    assert 0 < len(chosen) < len(layers)  # else this shows nothing
    assert results["none"]["size_bytes"] + sum(layer["cost_bytes"] for layer in chosen) <= budget
    room = budget - results["none"]["size_bytes"]
    best = knapsack([layer["gain"] for layer in layers], [layer["cost_bytes"] for layer in layers], room)
    assert [layers[place]["name"] for place in best] == [layer["name"] for layer in chosen]
    assert json.loads((output / "splitting.json").read_text()) == json.loads(json.dumps(results))
    rows = json.loads((output / "measured.json").read_text())["rows"]
    assert len(rows) == len(layers) + 3  # all, each alone, the choice, none


def test_both_plans_train_in_turn_and_export(found, run, tiny_task, tmp_path):
    """The paper's way: the chosen layers ternary and the others binary, then the chosen ones split, exactly where they were."""
    results, output = found
    chosen = {layer["name"] for layer in results["layers"] if layer["split"]}
    for name, start, kind in (
        ("mixed", None, "W2 ternary"),
        ("plan", tmp_path / "mixed/best_model", "W1 binary split"),
    ):
        overrides = [f"Global.output_dir={tmp_path / name}", "Train.max_steps=2", "Train.select=last"]
        loaded = config.load(output / f"{name}.yaml", overrides + ([f"Model.name_or_path={start}"] if start else []))
        if not start:
            assert loaded.Model.name_or_path == str(run / "best_model")
        train(loaded)
        lines = (tmp_path / name / "plan.txt").read_text().splitlines()
        planned = dict(line.split(": ", 1) for line in lines if ": W" in line or line.endswith(": fp32"))
        for layer in results["layers"]:
            wanted = kind if layer["name"] in chosen else "W1 binary"
            assert planned[layer["name"]] == f"{wanted} per tensor; A8 minmax, range mse"
        assert planned["classifier"] == "W8 minmax per tensor, range absmax; A8 minmax, range mse"
        assert planned["ernie.pooler.dense"] == "fp32"
    mixed, plan = (quantized_linears(restore_run(tmp_path / name).model) for name in ("mixed", "plan"))
    assert set(mixed) == set(plan)
    assert export_run(str(tmp_path / "plan"), str(tmp_path / "int8"), config.Export())["verification"]["passed"]
    layer = mixed[min(chosen)]
    values = layer._fake_quant_weight(layer.weight).numpy().reshape(-1)
    np.testing.assert_allclose(values, ternary(layer.weight.numpy().reshape(-1)), rtol=1e-5)


def test_scores_are_not_measured_twice(found, run, tiny_task, monkeypatch):
    results, output = found

    def refuse(*_):
        raise AssertionError("measured again")

    budget = results["budget_bytes"]
    monkeypatch.setattr(splitting.Workbench, "measure", refuse)
    again = search(Options(str(run), str(tiny_task), budget_bytes=budget), output)
    assert again["layers"] == results["layers"]


def test_the_tool_prints_the_choice(tool, run, tiny_task, tmp_path):
    command = ["adaptive_split", "--model", run, "--data", tiny_task, "--rows", 16, "--budget-ratio", 0.9]
    code, out, err = tool(*command, "--output", tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == f"{tmp_path}/plan.yaml"
    assert "Adaptive splitting: " in out
    assert "Command: python tools/adaptive_split.py --model" in (tmp_path / "plan.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "one of --budget-bytes and --budget-ratio is needed"),
        ({"budget_bytes": 9, "budget_ratio": 0.5}, "one of --budget-bytes and --budget-ratio"),
        ({"budget_ratio": 2.0}, "--budget-ratio: 2.0 is not in 0..1"),
        ({"budget_ratio": 0.01}, "--budget-ratio: .* bytes are under what all layers take without a split: "),
        ({"budget_bytes": 10}, "--budget-bytes: 10 bytes are under"),
        ({"budget_bytes": 10**6, "rows": 0}, "--rows: 0 is under 1"),
        ({"budget_bytes": 10**6, "data": "nowhere.tsv"}, "--data: nowhere.tsv"),
        ({"budget_bytes": 10**6, "model": "nowhere"}, "nowhere: not a run folder"),
    ],
)
def test_wrong_input_is_named(run, tiny_task, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        search(Options(**{"model": str(run), "data": str(tiny_task), **change}), tmp_path)


def test_a_run_without_ternary_weights_is_refused(tiny_ernie, tiny_task, tmp_path):
    trained(tmp_path, tiny_task, "binary", tiny_ernie, "binary")
    with pytest.raises(UserError, match="it has no ternary weights"):
        search(Options(str(tmp_path / "binary"), str(tiny_task), budget_ratio=0.5), tmp_path / "o")
    train(settings(tmp_path, tiny_ernie, tiny_task, "fp32", Train={"max_steps": 1}))
    with pytest.raises(UserError, match="an fp32 run; one with ternary weights is needed"):
        search(Options(str(tmp_path / "fp32"), str(tiny_task), budget_ratio=0.5), tmp_path / "o")
