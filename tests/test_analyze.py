"""The analysis: its figures against NumPy in float64, a sensitivity that goes on where it stopped, and the tool's files."""

import csv
import json
from dataclasses import replace

import numpy as np
import paddle
import pytest
from tiny_ernie import make_tiny_ernie

from ernie_kqat import UserError, config, strict
from ernie_kqat.analysis import activations, analyze, sensitivity, tables, training, weights
from ernie_kqat.analysis.workbench import Workbench, open_workbench
from ernie_kqat.data.batching import collate, epoch_batches
from ernie_kqat.data.dataset import load_eval_split
from ernie_kqat.evaluate import logits_of
from ernie_kqat.restore import restore_folder
from ernie_kqat.tokenizer import load_tokenizer
from ernie_kqat.trainer import train

LINEARS = 2 * 6 + 2
TABLES = 3  # word, position, token type


@pytest.fixture(scope="module")
def task(tmp_path_factory, tiny_task):
    """The toy task with 0 and 1 as its labels, which are also the tiny ERNIE's; read only."""
    folder = tmp_path_factory.mktemp("analyze") / "task"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        text = (tiny_task / name).read_text(encoding="utf-8").replace("negative", "0").replace("positive", "1")
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_ernie, tiny_task):
    """A short fp32 run with kurtosis targets, of the tiny ERNIE; read only."""
    folder = tmp_path_factory.mktemp("analyze") / "run"
    tree = {
        "Global": {"output_dir": str(folder), "log_every": 2},
        "Model": {"name_or_path": str(tiny_ernie)},
        "Data": {"path": str(tiny_task), "max_length": 32},
        "Slim": {"kurtosis": {"targets": {"cap": 2.5}, "apply": "decoupled"}},
        "Train": {"epochs": 1, "learning_rate": 1e-3},
    }
    train(config.from_tree(tree, "test"))
    return folder


def skewed(rows, columns, seed=0):
    """Columns over four decades and one outlier: what tells tensor from channel, and absmax from least squares."""
    weight = np.random.default_rng(seed).normal(size=(rows, columns)) * np.logspace(-2, 2, columns)
    weight[0, 0] = 5 * np.abs(weight).max()
    return weight.astype(np.float32)


def oracle(weight, bits, axis):
    """SQNR in dB of rounding to nearest, range = max|w| over `axis`; float64."""
    weight = weight.astype(np.float64)
    step = np.abs(weight).max(axis=axis, keepdims=axis is not None) / (2 ** (bits - 1) - 1)
    error = weight - step * np.rint(weight / step)
    return 10 * np.log10((weight**2).sum() / (error**2).sum())


def test_weight_statistics_are_those_of_numpy():
    weight = skewed(48, 20)
    (found,) = weights.statistics({"linear": weight})
    z = (weight.astype(np.float64) - weight.mean(dtype=np.float64)) / weight.std(dtype=np.float64)
    assert found.kurtosis == pytest.approx((z**4).mean(), rel=1e-9)
    assert found.absmax_over_std == pytest.approx(np.abs(weight).max() / weight.std(dtype=np.float64), rel=1e-6)
    assert found.histogram.sum() == weight.size
    for bits in weights.BITS:
        assert found.sqnr["tensor", "absmax"][bits] == pytest.approx(oracle(weight, bits, None), abs=0.05)
        assert found.sqnr["channel", "absmax"][bits] == pytest.approx(oracle(weight, bits, 0), abs=0.05)
        for granularity in weights.GRANULARITIES:
            assert found.sqnr[granularity, "mse"][bits] >= found.sqnr[granularity, "absmax"][bits]
    assert found.mse_range[4] < found.absmax


def test_the_channel_of_an_embedding_is_its_row():
    weight = skewed(48, 20).T.copy()
    table, linear = weights.statistics({"ernie.embeddings.word_embeddings": weight, "linear": weight})
    assert table.sqnr["channel", "absmax"][4] == pytest.approx(oracle(weight, 4, 1), abs=0.05)
    assert linear.sqnr["channel", "absmax"][4] == pytest.approx(oracle(weight, 4, 0), abs=0.05)
    assert table.sqnr["tensor", "mse"] == linear.sqnr["tensor", "mse"]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("way", weights.WAYS, ids="_".join)
def test_a_grid_of_b_bits_has_fewer_than_2_to_the_b_points(way, bits):
    weight = skewed(64, 6)
    on_grid = weights.on_grid(weight, weights.range_of(weight, "linear", way, bits), bits)
    groups = [on_grid] if way[0] == "tensor" else on_grid.T
    assert all(1 < len(np.unique(group)) <= 2**bits - 1 for group in groups)


def test_layers_are_listed_as_data_flows(tiny_ernie):
    names = list(weights.matrices(str(tiny_ernie)))
    assert len(names) == TABLES + LINEARS
    assert all("embeddings" in name for name in names[:TABLES])
    assert names[-2:] == ["ernie.pooler.dense", "classifier"]
    indices = [int(name.split(".")[3]) for name in names[TABLES:-2]]
    assert indices == sorted(indices)


def test_activations_are_those_that_arrive(tiny_ernie, task):
    restored = restore_folder(tiny_ernie)
    split = load_eval_split(task, load_tokenizer(restored.vocabulary), restored.labels, 32)
    before = logits_of(restored.model, split, restored.pad_token_id)
    found = {of.name: of for of in activations.statistics(restored, split, batches=2)}
    assert len(found) == LINEARS
    assert not any(layer._forward_pre_hooks for layer in restored.model.sublayers()), "no hook is left behind"
    np.testing.assert_array_equal(before, logits_of(restored.model, split, restored.pad_token_id))

    peaks, values = [], []
    for rows in epoch_batches([len(ids) for ids in split.input_ids], 32, 42, 0):
        batch = collate(split, rows, restored.pad_token_id)
        with paddle.no_grad():
            sequence, _ = restored.model.ernie(*(paddle.to_tensor(batch[k]) for k in ("input_ids", "token_type_ids")))
        values.append(sequence[:, 0].numpy())  # [CLS]: what arrives at the pooler
        peaks.append(np.abs(values[-1]).max())
    seen, values = found["ernie.pooler.dense"], np.concatenate(values)
    np.testing.assert_allclose(seen.absmax, peaks, rtol=1e-6)
    assert (seen.minimum, seen.maximum) == (values.min(), values.max())
    assert seen.percentile == pytest.approx(np.percentile(np.abs(values), 99.9), rel=1e-6)
    average = (0.9 * peaks[0] + peaks[1]) / 1.9
    assert seen.ranges["moving_average"] == pytest.approx(average, rel=1e-5)
    grid = average / 127 * np.clip(np.rint(values * 127 / average), -128, 127)
    expected = 10 * np.log10((values**2).sum() / ((values - grid) ** 2).sum())
    assert seen.sqnr["moving_average"] == pytest.approx(expected, abs=0.05)


class Counting(Workbench):
    """A workbench that stops after some measurements, as a user does."""

    def __init__(self, restored, split, limit):
        super().__init__(restored, split)
        self.limit, self.calls = limit, []

    def measure(self, weights, activations=()):
        if len(self.calls) == self.limit:
            raise KeyboardInterrupt
        self.calls.append(sorted(weights))
        return super().measure(weights, activations)


@pytest.fixture(scope="module")
def bench(tiny_ernie, task):
    quant = strict.build(config.Quant, {"weight": {"bits": 2, "granularity": "tensor"}}, "quant", "test")
    return open_workbench(tiny_ernie, task, quant, columns=config.Data(max_length=32), rows=16)


def test_sensitivity_goes_on_where_it_stopped(bench, tmp_path):
    way, path = ("tensor", "absmax"), tmp_path / "s.json"
    first = Counting(bench.restored, bench.split, 1 + 2 * 3 + 1)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.measure(first, way, 2, path, "m", {"bits": 2})
    kept = json.loads(path.read_text())["m"]["layers"]
    assert list(kept) == list(bench.layers)[:3]

    second = Counting(bench.restored, bench.split, 1000)
    found = sensitivity.measure(second, way, 2, path, "m", {"bits": 2})
    assert len(second.calls) == 2 * (LINEARS - 3)
    whole = sensitivity.measure(bench, way, 2, tmp_path / "other.json", "m", {"bits": 2})
    assert found == whole

    third = Counting(bench.restored, bench.split, 1000)
    assert sensitivity.measure(third, way, 2, path, "m", {"bits": 2}) == whole
    assert third.calls == []
    sensitivity.measure(third, way, 3, path, "m", {"bits": 3})
    assert len(third.calls) == 1 + 2 * LINEARS


def test_sensitivity_quantizes_the_layers_it_says(bench, tmp_path):
    found = sensitivity.measure(bench, ("tensor", "absmax"), 2, tmp_path / "s.json", "m", {})
    grids = bench.on_own_grid()
    name = list(grids)[5]
    others = {other: grid for other, grid in grids.items() if other != name}
    assert found.only[name] == bench.measure({name: grids[name]}, [name])
    assert found.all_but[name] == bench.measure(others, others)
    assert found.everything == bench.measure(grids, grids)
    assert found.fp32 == bench.fp32
    assert all(score.rms_over_std > 0 for score in found.only.values())
    assert found.only[name].rms_over_std < found.all_but[name].rms_over_std


def test_a_run_s_curves_are_those_of_its_log(run):
    found = training.read(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found.loss == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert found.accuracy == [(row["step"], row["eval_accuracy"]) for row in rows if "eval_accuracy" in row]
    assert len(found.kurtosis) == LINEARS - 2
    assert set(found.targets.values()) == {2.5}
    last = [row for row in rows if "layers" in row][-1]
    assert {name: curve[-1][1] for name, curve in found.kurtosis.items()} == {
        name: values["kurtosis"] for name, values in last["layers"].items()
    }
    assert training.trade_off(run) == {}


def test_a_run_that_was_exported_shows_its_trade_off(tmp_path):
    latency = {"batch_1": 3.0, "batch_1_p90": 4.0, "batch_32": 1.0}
    rows = {"fp32": {"accuracy": 0.9, "latency_ms": latency, "size_bytes": 100}, "simulated": {"accuracy": 0.89}}
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 5, **rows}))
    found = training.trade_off(tmp_path)
    assert found["fp32"] == {"accuracy": 0.9, "batch_1": 3.0, "batch_32": 1.0, "size_bytes": 100}
    table = tables.trade_off_table(found)
    assert [row[:2] for row in table.rows] == [["fp32", "90.00"], ["simulated", "89.00"]]


def test_the_tool_compares_a_model_with_a_run(tool, tmp_path, caplog, run, tiny_ernie, task):
    out = tmp_path / "out"
    arguments = ["--model", tiny_ernie, "--compare", run, "--data", task, "--rows", 8, "--output", out]
    code, text, _ = tool("analyze", *arguments)
    assert code == 0, text
    lines = text.splitlines()
    assert max(map(len, lines[:11])) <= 120
    assert lines[0].startswith("layer")
    assert lines[11] == ""
    tree = json.loads((out / "analysis.json").read_text())
    assert [model["label"] for model in tree["models"]] == ["before", "after"]
    assert [model["kind"] for model in tree["models"]] == ["model folder", "run"]
    with open(out / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (TABLES + LINEARS)
    assert not any("histogram" in column for column in rows[0]), "81 counts in a cell"
    for row in rows:
        model = next(m for m in tree["models"] if m["model"] == row["model"])
        assert float(row["weights_kurtosis"]) == model["layers"][row["layer"]]["weights"]["kurtosis"]
    linear = next(row for row in rows if row["layer"] == "classifier")
    assert float(linear["only_accuracy"]) == tree["models"][0]["layers"]["classifier"]["only"]["accuracy"]
    page = (out / "report.html").read_text()
    for title in (
        "Training (after)",
        "Kurtosis",
        "SQNR",
        "Sensitivity",
        "Activations",
        "Weight histograms",
        "Settings",
    ):
        assert f">{title}" in page

    before = (out / "sensitivity.json").read_bytes()
    code, text, _ = tool("analyze", *arguments, "--all")
    assert code == 0
    assert f"{LINEARS} of {LINEARS} layers" in caplog.text
    assert len([line for line in text.splitlines() if line.startswith(("ernie.", "classifier"))]) == LINEARS + TABLES
    assert (out / "sensitivity.json").read_bytes() == before


def test_an_encoder_gets_weight_statistics_only(tool, tmp_path, caplog, tiny_task):
    encoder = make_tiny_ernie(tmp_path / "encoder", head=False)
    code, *_ = tool("analyze", "--model", encoder, "--data", tiny_task, "--output", tmp_path / "out")
    tree = json.loads((tmp_path / "out/analysis.json").read_text())
    assert code == 0
    assert "weight statistics only" in caplog.text
    assert len(tree["models"][0]["layers"]) == TABLES + LINEARS - 1
    assert {key for layer in tree["models"][0]["layers"].values() for key in layer} == {"weights"}


def test_rows_without_labels_give_activations_but_no_sensitivity(tool, tmp_path, caplog, tiny_ernie):
    (tmp_path / "s.txt").write_text("a good film\na very dull story\n", encoding="utf-8")
    code, _, err = tool("analyze", "--model", tiny_ernie, "--data", tmp_path / "s.txt", "--output", tmp_path / "out")
    layer = json.loads((tmp_path / "out/analysis.json").read_text())["models"][0]["layers"]["classifier"]
    assert code == 0, err
    assert "no labels" in caplog.text
    assert set(layer) == {"weights", "input"}


def test_a_constant_matrix_has_figures_too(tmp_path):
    found = weights.statistics({"zero": np.zeros((4, 3), np.float32), "classifier": skewed(4, 3)})
    one = analyze.Analysis("m", "", "model folder", found)
    text = json.dumps(tables.tree(analyze.Options("m"), [one]), allow_nan=False)
    layer = json.loads(text)["models"][0]["layers"]["zero"]["weights"]
    assert layer["sqnr"]["tensor_absmax"]["4"] is None
    assert layer["absmax_over_std"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "--bits: 9 is not in 2..8"),
        ({"rows": 0}, "--rows: 0 is under 1"),
        ({"model": "ernie-2.0-base-e"}, "did you mean ernie-2.0-base-en"),
        ({"compare": "./nowhere"}, "./nowhere: no such folder"),
        ({"data": "nowhere.tsv"}, "--data: nowhere.tsv: no such file or folder"),
        ({"calibration": "nowhere"}, "--calibration: nowhere: no such file or folder"),
    ],
)
def test_wrong_options_are_named(tmp_path, tiny_ernie, changes, message):
    with pytest.raises(UserError, match=message):
        analyze.analyze(replace(analyze.Options(str(tiny_ernie)), **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not JSON"), ("[1]", "a JSON list where an object is needed")],
)
def test_wrong_results_of_another_tool_are_named(tool, tmp_path, tiny_ernie, content, message):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    code, _, err = tool("analyze", "--model", tiny_ernie, "--robustness", path, "--output", tmp_path / "out")
    assert code == 2
    assert str(path) in err
    assert message in err


def test_damaged_files_are_named(tmp_path, bench):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"ste\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a row of metrics"):
        training.read(tmp_path)
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(UserError, match=r"s.json: not the sensitivities"):
        sensitivity.measure(bench, ("tensor", "absmax"), 2, tmp_path / "s.json", "m", {})
