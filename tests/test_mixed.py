"""Mixed precision: sizes, ranking and choice against plain arithmetic; plans that train and export with those very bits."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from ernie_kqat import UserError, config
from ernie_kqat.analysis import mixed, plan
from ernie_kqat.analysis.mixed_sections import frontier_table
from ernie_kqat.analysis.workbench import Workbench, open_workbench
from ernie_kqat.calibration import calibrate_rows
from ernie_kqat.data.dataset import load_eval_split
from ernie_kqat.evaluate import logits_of
from ernie_kqat.quantizers import numeric
from ernie_kqat.restore import restore_folder
from ernie_kqat.tokenizer import load_tokenizer
from ernie_kqat.trainer import train

LINEARS = 2 * 6 + 2
BITS = (8, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_ernie, tiny_task):
    """A tiny ERNIE that learned the toy task in fp32; read only."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    tree = {
        "Global": {"output_dir": str(run), "seed": 3, "log_every": 8},
        "Model": {"name_or_path": str(tiny_ernie)},
        "Data": {"path": str(tiny_task), "max_length": 32},
        "Train": {"epochs": 8, "learning_rate": 3e-3},
    }
    train(config.from_tree(tree, "test"))
    return run / "best_model"


def options(folder, tiny_task, **changes):
    given = {"floor": 0.9, "bits": BITS, "granularity": "tensor", "range": "mse", "points": 4, **changes}
    return mixed.Options(str(folder), str(tiny_task / "train.tsv"), str(tiny_task / "train.tsv"), **given)


@pytest.fixture(scope="module")
def found(folder, tiny_task, tmp_path_factory):
    """A search on 64 rows, and where it wrote; read only."""
    output = tmp_path_factory.mktemp("mixed") / "plan"
    return mixed.search(options(folder, tiny_task, rows=64, test=str(tiny_task / "dev.tsv")), output), output


def test_packed_size_counts_bits_and_steps():
    assert mixed.packed_bytes((32, 64), 4, "tensor") == 32 * 64 // 2 + 4
    assert mixed.packed_bytes((32, 64), 4, "channel") == 32 * 64 // 2 + 4 * 64
    assert mixed.packed_bytes((3, 3), 3, "tensor") == math.ceil(27 / 8) + 4
    packed = np.packbits(np.zeros((7 * 5, 6), np.uint8).reshape(-1))  # 7 x 5 integers of 6 bits
    assert mixed.packed_bytes((7, 5), 6, "tensor") == packed.size + 4


def test_the_ranking_is_the_rise_of_squared_error_per_byte(found, folder, tiny_task):
    results, _ = found
    layers = results["layers"]
    assert len(layers) == LINEARS
    rises = [layer["rise_per_byte"] for layer in layers]
    assert rises == sorted(rises)
    quant = config.Quant(config.WeightQuant(bits=8, granularity="tensor", range="mse"))
    bench = open_workbench(folder, tiny_task / "train.tsv", quant, tiny_task / "train.tsv", rows=64)
    grids = bench.on_own_grid()
    fp32 = np.float64(bench.logits)
    base = np.square(bench._logits(grids, ()) - fp32).mean()
    for layer in (layers[0], layers[-1]):
        weight = bench.weights[layer["name"]]
        step = numeric.mse_range(weight, 2, "tensor")
        alone = {**grids, layer["name"]: np.rint(np.clip(weight / step, -1, 1)) * step}
        rise = np.square(bench._logits(alone, ()) - fp32).mean() - base
        saved = weight.size * (8 - 2) // 8
        assert layer["bytes_saved"] == saved
        assert layer["squared_error_rise"] == pytest.approx(rise, rel=1e-3, abs=1e-9)
        assert layer["rise_per_byte"] == pytest.approx(rise / saved, rel=1e-3, abs=1e-12)


def test_the_chosen_plan_is_the_smallest_that_holds_the_floor(found):
    results, _ = found
    frontier, chosen = results["frontier"], results["chosen"]
    holding = [row for row in frontier if row["accuracy"] >= 0.9]
    assert chosen["size_bytes"] == min(row["size_bytes"] for row in holding)
    assert 0 < chosen["narrow_layers"] < LINEARS  # else this test shows nothing
    after = [row for row in frontier if row["narrow_layers"] == chosen["narrow_layers"] + 1]
    assert after[0]["accuracy"] < 0.9  # the bisection left no gap at the bound
    shapes = {layer["name"]: layer["shape"] for layer in results["layers"]}
    for row in frontier:
        narrow = [layer["name"] for layer in results["layers"][: row["narrow_layers"]]]
        bits = sum(np.prod(shape) * (2 if name in narrow else 8) for name, shape in shapes.items())
        assert row["size_bytes"] == bits / 8 + 4 * LINEARS
        assert row["ratio"] == pytest.approx(row["size_bytes"] / (4 * sum(np.prod(shape) for shape in shapes.values())))
    assert [layer["bits"] for layer in results["layers"]] == [
        2 if place < chosen["narrow_layers"] else 8 for place in range(LINEARS)
    ]


def test_a_budget_takes_the_most_accurate_plan_that_fits(found, folder, tiny_task):
    frontier = found[0]["frontier"]
    sizes = sorted(row["size_bytes"] for row in frontier)
    output = found[1]
    budget = sizes[len(sizes) // 2] - 1  # between two plans
    results = mixed.search(
        options(folder, tiny_task, rows=64, floor=None, budget_bytes=budget), output.parent / "budget"
    )
    within = [row for row in results["frontier"] if row["size_bytes"] <= budget]
    assert results["chosen"] in within
    assert results["chosen"]["accuracy"] == max(row["accuracy"] for row in within)
    largest = max(within, key=lambda row: row["size_bytes"])
    fewer = largest["narrow_layers"] - 1
    assert largest["size_bytes"] + results["layers"][fewer]["bytes_saved"] > budget  # one layer fewer would not fit


def test_the_search_writes_its_figures(found):
    results, output = found
    assert json.loads((output / "frontier.json").read_text()) == json.loads(json.dumps(results))
    measured = json.loads((output / "measured.json").read_text())["rows"]
    assert len({json.dumps(row["key"]) for row in measured}) == len(measured)  # nothing twice
    with open(output / "frontier.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["size_bytes"]) for row in rows] == [row["size_bytes"] for row in results["frontier"]]
    assert results["machine"]["cpu"]
    table = frontier_table(results)
    assert [row[-1] for row in table.rows].count("<- chosen") == 1
    frontier, layers = mixed.sections(json.loads((output / "frontier.json").read_text()))
    assert len(frontier.figures) == 2
    assert len(layers.figures) == 1
    assert len(layers.table.rows) == LINEARS
    head = (output / "plan.yaml").read_text().splitlines()
    assert f"accuracy {results['chosen']['accuracy']:.4f}" in "".join(line for line in head if line.startswith("#"))


def planned(results):
    return {layer["name"]: layer["bits"] for layer in results["layers"]}


def bits_of(lines):
    pairs = (line.split(": W", 1) for line in lines if ": W" in line)
    return {name: int(rest.split()[0]) for name, rest in pairs}


def test_the_plan_trains_with_the_planned_bits(found, tool, tmp_path):
    results, output = found
    for epochs in (0, 1):
        run = tmp_path / f"run{epochs}"
        code, _, err = tool("train", "-c", output / "plan.yaml", "-o", f"output_dir={run}", f"Train.epochs={epochs}")
        assert code == 0, err
        assert bits_of((run / "plan.txt").read_text().splitlines()) == planned(results)


def test_a_plan_is_measured_as_its_config_quantizes(found, folder, tiny_task):
    """plan.yaml applied from scratch, calibrated with its own weights, gives the logits that were measured."""
    results, output = found
    settings = config.load(output / "plan.yaml")
    fp32 = restore_folder(folder)
    tokenizer = load_tokenizer(fp32.vocabulary)
    dev, train_rows = (
        load_eval_split(tiny_task / name, tokenizer, fp32.labels, settings.Data.max_length)
        for name in ("dev.tsv", "train.tsv")
    )
    reference = np.float64(logits_of(fp32.model, dev, fp32.pad_token_id))
    restored = fp32.quantized(settings.Slim.quant)
    calibrate_rows(restored, train_rows, settings.Global.seed)
    logits = logits_of(restored.model, dev, restored.pad_token_id)
    noise = np.sqrt(np.mean((logits - reference) ** 2)) / reference.std()
    assert results["test"]["chosen"]["rms_over_std"] == pytest.approx(noise, rel=1e-6)
    assert results["test"]["chosen"]["accuracy"] == np.mean(logits.argmax(axis=1) == dev.labels)


def test_the_plan_exports_to_what_was_measured(found, folder, tool, tiny_task, tmp_path):
    """PTQ by the plan: the deployed bits are the planned ones, and its simulation is the plan's on the test rows."""
    results, output = found
    arguments = ["--model", folder, "--calibration", tiny_task / "train.tsv", "--verify", tiny_task / "dev.tsv"]
    code, out, err = tool("export", *arguments, "-c", output / "plan.yaml", "--output", tmp_path / "a")
    assert code == 0, out + err
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert bits_of(manifest["quantization"]["plan"]) == planned(results)
    assert manifest["verification"]["simulated_accuracy"] == results["test"]["chosen"]["accuracy"]
    assert manifest["verification"]["simulated_agreement_with_fp32"] == results["test"]["chosen"]["agreement"]


def test_the_rules_are_anchored_and_escaped(found):
    results, output = found
    tree = yaml.safe_load((output / "plan.yaml").read_text())
    rules = tree["Slim"]["quant"]["layers"]
    names = [layer["name"] for layer in results["layers"] if layer["bits"] == 2]
    assert [rule[0].replace("\\.", ".") for rule in rules] == [f"^{name}$" for name in names]
    assert all(name.count(".") == rule[0].count("\\.") for name, rule in zip(names, rules))
    assert config.load(output / "plan.yaml").Slim.quant.weight.bits == 8


@pytest.mark.parametrize(
    ("paths", "folder", "names"),
    [
        (("a/train.tsv", "a/dev.tsv"), "a", ["train.tsv", "dev.tsv"]),
        (("train.tsv", "dev.tsv"), ".", ["train.tsv", "dev.tsv"]),
        (("a/b/train.tsv", "a/c/dev.tsv"), "a", ["b/train.tsv", "c/dev.tsv"]),
        (("/a/train.tsv", "/b/dev.tsv"), "/", ["a/train.tsv", "b/dev.tsv"]),
        (("../a/train.tsv", "dev.tsv"), None, None),
    ],
)
def test_the_config_finds_both_files_again(paths, folder, names):
    where, found = plan._common(*paths)
    assert [(Path(where) / name).resolve() for name in found] == [Path(path).resolve() for path in paths]
    if folder is not None:
        assert (where, found) == (folder, names)


def test_an_interrupted_search_goes_on_where_it_stopped(found, folder, tiny_task, tmp_path, monkeypatch):
    calls = []
    measure = Workbench.measure

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(Workbench, "measure", counted)
    given = options(folder, tiny_task, rows=64, test=str(tiny_task / "dev.tsv"))
    with pytest.raises(KeyboardInterrupt):
        mixed.search(given, tmp_path)
    assert not (tmp_path / "plan.yaml").exists()
    results = mixed.search(given, tmp_path)
    assert {key: results[key] for key in ("layers", "frontier", "chosen", "test")} == {
        key: found[0][key] for key in ("layers", "frontier", "chosen", "test")
    }
    measured = json.loads((tmp_path / "measured.json").read_text())["rows"]
    assert len(calls) == len(measured) + 1
    again = mixed.search(options(folder, tiny_task, rows=64, floor=0.5), tmp_path)
    assert again["chosen"]["narrow_layers"] >= results["chosen"]["narrow_layers"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], "one of --floor, --budget-bytes, --budget-ratio is needed; given: none"),
        (["--floor", 0.9, "--budget-bytes", 9], "given: --floor and --budget-bytes"),
        (["--floor", 88.5], "--floor: 88.5 is not in 0..1"),
        (["--floor", 0.9, "--bits", 4, 8], "--bits: 4 8 is not WIDE NARROW"),
        (["--floor", 0.9, "--points", 1], "--points: 1 is under 2"),
        (["--floor", 0.9, "--test", "nowhere.tsv"], "--test: nowhere.tsv"),
        (["--floor", 0.9, "-o", "Slim.quant.layers=[[a, skip]]"], "Slim.quant.layers"),
        (["--budget-bytes", 4000], "--budget-bytes: 4000 bytes are under what all layers at 2 bits take: "),
        (["--budget-ratio", 0.01], "--budget-ratio: "),
    ],
)
def test_wrong_input_is_one_line(tool, folder, tiny_task, tmp_path, change, words):
    code, _, err = tool(
        "mixed_precision",
        "--model",
        folder,
        "--data",
        tiny_task,
        "--rows",
        16,
        "--output",
        tmp_path,
        "--bits",
        8,
        2,
        *change,
    )
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_a_floor_that_nothing_reaches_says_what_is_possible(tiny_ernie, tiny_task, tmp_path, tool):
    text = (tiny_task / "dev.tsv").read_text(encoding="utf-8").replace("negative", "0").replace("positive", "1")
    (tmp_path / "dev.tsv").write_text(text, encoding="utf-8")
    command = ["mixed_precision", "--model", tiny_ernie, "--data", tmp_path / "dev.tsv", "--output", tmp_path / "o"]
    code, _, err = tool(*command, "--calibration", tmp_path / "dev.tsv", "--floor", 0.999)
    assert code == 2
    assert "--floor: 0.999 is above what all layers at 8 bits reach on these rows: 0." in err


def test_a_run_is_refused_and_its_fp32_model_named(folder, tiny_task, tmp_path):
    with pytest.raises(UserError, match="best_model"):
        mixed.search(options(folder.parent, tiny_task), tmp_path)


def test_the_tool_prints_the_frontier(tool, folder, tiny_task, tmp_path, found):
    command = ["mixed_precision", "--model", folder, "--data", tiny_task / "train.tsv", "--bits", *BITS, "--floor", 0.9]
    command += ["--granularity", "tensor", "--rows", 64, "--points", 4, "--output", tmp_path]
    code, out, _ = tool(*command)
    assert code == 0
    assert out.count("<- chosen") == 1
    assert out.splitlines()[-1] == f"{tmp_path}/plan.yaml"
    results = json.loads((tmp_path / "frontier.json").read_text())
    assert results["frontier"] == found[0]["frontier"]
    assert results["command"].startswith("python tools/mixed_precision.py --model ")
