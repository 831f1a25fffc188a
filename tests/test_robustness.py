"""Robustness to the step: its figures against NumPy, and the tool on a trained tiny ERNIE, stopped and continued."""

import json
import shutil
from fractions import Fraction

import numpy as np
import pytest

from ernie_kqat import UserError, config
from ernie_kqat.analysis import grids, robustness, rows
from ernie_kqat.analysis.workbench import Workbench, open_workbench
from ernie_kqat.evaluate import accuracy, logits_of
from ernie_kqat.quantizers import numeric
from ernie_kqat.trainer import train

WEIGHT = {"bits": 3, "granularity": "tensor", "range": "mse"}


def run_of(folder, start, task, quant=None):
    tree = {
        "Global": {"output_dir": str(folder), "seed": 3, "log_every": 8},
        "Model": {"name_or_path": str(start)},
        "Data": {"path": str(task), "max_length": 32},
        "Slim": {"quant": quant},
        "Train": {"epochs": 8, "learning_rate": 3e-3},
    }
    train(config.from_tree(tree, "test"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_ernie, tiny_task):
    """A tiny ERNIE that learned the toy task in fp32; read only."""
    return run_of(tmp_path_factory.mktemp("robustness") / "run", tiny_ernie, tiny_task) / "best_model"


@pytest.fixture(scope="module")
def qat(tmp_path_factory, tiny_ernie, tiny_task):
    """A QAT run with 3 bits per tensor, but 5 per channel in `linear1` of each layer; read only."""
    layers = [["linear1", {"weight": {"bits": 5, "granularity": "channel", "range": "absmax"}}]]
    return run_of(
        tmp_path_factory.mktemp("robustness") / "qat", tiny_ernie, tiny_task, {"weight": WEIGHT, "layers": layers}
    )


@pytest.fixture(scope="module")
def bench(folder, tiny_task):
    return open_workbench(folder, tiny_task, config.Quant(config.WeightQuant(**WEIGHT)))


def test_power_of_two_is_the_nearest_in_the_logarithm():
    # between 2^n and 2^(n+1) the border is 2^(n + 1/2): 1.41421 x 2^n, and not 1.5 x 2^n
    found = grids.power_of_two(np.float32([1, 1.414, 1.4143, 1.49, 1.51, 3, 0.7072, 0.707, 2.0**-20 * 1.3]))
    np.testing.assert_array_equal(found, np.float32([1, 1, 2, 2, 2, 4, 1, 0.5, 2.0**-20]))
    assert found.dtype == np.float32


def test_area_is_the_mean_of_the_piecewise_linear_curve():
    places = [Fraction(1, 2), Fraction(3, 5), Fraction(1), Fraction(5, 2)]
    values = [Fraction(1, 2), Fraction(7, 10), Fraction(9, 10), Fraction(1, 10)]
    parts = [(b - a) * (u + v) / 2 for a, b, u, v in zip(places, places[1:], values, values[1:])]
    assert robustness.area([float(x) for x in places], [float(y) for y in values]) == pytest.approx(
        float(sum(parts) / 2)
    )
    assert robustness.area(robustness.FACTORS, [0.8] * len(robustness.FACTORS)) == pytest.approx(0.8)
    assert (robustness.FACTORS[0], robustness.FACTORS[-1], len(robustness.FACTORS)) == (0.5, 1.5, 11)


@pytest.mark.parametrize("bits", robustness.WIDTHS)
def test_other_bits_find_the_range_anew(bench, bits):
    found = robustness.weights_at(bench, ("bits", bits))
    largest = 2 ** (bits - 1) - 1
    for name, weight in bench.weights.items():
        step = np.float64(numeric.mse_range(weight, bits, "tensor")) / largest
        integers = np.clip(np.rint(weight / step), -largest, largest)
        np.testing.assert_allclose(found[name], integers * step, rtol=1e-5, atol=1e-7)


def test_changed_steps_keep_the_integers_bounds(bench):
    for point, change in ((("factor", 0.5), lambda step: step / 2), (robustness.POWER_OF_TWO, grids.power_of_two)):
        for name, grid in robustness.weights_at(bench, point).items():
            step = change(bench.steps[name])
            integers = np.clip(np.rint(np.float64(bench.weights[name]) / step), -3, 3)
            assert np.abs(integers).max() == 3
            np.testing.assert_allclose(grid, integers * step, rtol=1e-5, atol=1e-7)


def test_a_run_has_its_own_bits_granularity_and_ranges(qat, tiny_task):
    bench = open_workbench(qat, tiny_task, config.Quant())
    name = "ernie.encoder.layers.1.linear1"
    other = "ernie.encoder.layers.1.linear2"
    found = robustness.weights_at(bench, ("bits", 2))
    assert len(np.unique(np.abs(found[name]).max(axis=0))) > 10  # a step for each channel
    assert len(np.unique(found[other])) == 3
    own = robustness.weights_at(bench, ("factor", 1.0))
    assert 8 < max(len(np.unique(column)) for column in own[name].T) <= 31
    assert len(np.unique(own[other])) <= 7


def settings(tiny_task, **changes):
    return robustness.Options(str(tiny_task), config.Quant(config.WeightQuant(**WEIGHT)), **changes)


def test_the_own_step_is_the_run_as_it_was_trained(qat, tiny_task, tmp_path):
    found = robustness.measure({str(qat): "qat"}, settings(tiny_task), tmp_path / "r.json")
    (curve,) = robustness.curves(found)
    bench = open_workbench(qat, tiny_task, config.Quant())
    logits = logits_of(bench.restored.model, bench.split, bench.restored.pad_token_id)
    assert curve.accuracy(("factor", 1.0)) == accuracy(logits, bench.labels)
    noise = np.sqrt(np.mean((np.float64(logits) - bench.logits) ** 2)) / np.float64(bench.logits).std()
    assert curve.scores["factor", 1.0]["rms_over_std"] == pytest.approx(noise)
    assert noise > 0.01
    assert set(curve.scores) == set(robustness.POINTS)
    assert min(curve.accuracy(("factor", f)) for f in robustness.FACTORS) <= curve.area <= 1
    assert found["runs"][0]["machine"]["cpu"]
    assert found["runs"][0]["versions"]["numpy"] == np.__version__


def test_inputs_can_stay_in_fp32(folder, tiny_task, tmp_path):
    path = tmp_path / "r.json"
    for fp32 in (False, True):
        robustness.measure({str(folder): "m"}, settings(tiny_task, rows=16, fp32_activations=fp32), path)
    coarse, fine = robustness.curves(json.loads(path.read_text()))
    assert fine.setting["activation"] == "fp32"
    point = ("bits", 8)
    assert 0 < fine.scores[point]["rms_over_std"] < coarse.scores[point]["rms_over_std"]
    assert coarse.label != fine.label
    assert "activation fp32" in fine.label


def test_weights_are_bit_equal_afterwards_also_after_an_error(bench):
    before = {name: value.numpy() for name, value in bench.restored.model.state_dict().items()}
    for point in robustness.POINTS:
        bench.measure(robustness.weights_at(bench, point), bench.layers)
    with pytest.raises(KeyError):
        bench.measure({**robustness.weights_at(bench, ("bits", 2)), "no such layer": np.zeros(1)})
    after = bench.restored.model.state_dict()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name].numpy(), value, err_msg=name)


def test_an_interrupted_run_loses_one_point_and_a_second_measures_the_rest(folder, tiny_task, tmp_path, monkeypatch):
    path, calls = tmp_path / "r.json", []
    measure = Workbench.measure

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(Workbench, "measure", counted)
    models = {str(folder): "m"}
    with pytest.raises(KeyboardInterrupt):
        robustness.measure(models, settings(tiny_task, rows=16), path)
    kept = json.loads(path.read_text())["rows"]
    assert len(kept) == 5  # fp32 needs no call
    found = robustness.measure(models, settings(tiny_task, rows=16), path)
    assert len(calls) == len(robustness.POINTS)  # each point once, and the one that was interrupted again
    assert found["rows"][:5] == kept
    assert robustness.curves(found)[0].area is not None
    robustness.measure(models, settings(tiny_task, rows=16), path)
    assert len(calls) == len(robustness.POINTS)


def test_a_model_that_changed_is_measured_again(tmp_path):
    (tmp_path / "model_state.pdparams").write_bytes(b"one")
    made = rows.Rows(tmp_path / "r.json", "robustness")
    made.inputs(rows.digests(tmp_path))
    key = {"model": str(tmp_path), "point": "fp32"}
    made.score(key, lambda: rows.Score(0.5, 1.0, 1.0, 0.0))
    again = rows.Rows(tmp_path / "r.json", "robustness")
    again.inputs(rows.digests(tmp_path))
    assert again.find(key) == rows.Score(0.5, 1.0, 1.0, 0.0)
    (tmp_path / "model_state.pdparams").write_bytes(b"two")
    again.inputs(rows.digests(tmp_path))
    assert again.find(key) is None


def test_the_tool_prints_a_table_and_writes_a_report(tool, folder, tiny_task, tmp_path):
    shutil.copytree(folder, tmp_path / "b")
    command = ["robustness", "--model", folder, "--model", tmp_path / "b", "--names", "first", "second"]
    command += ["--data", tiny_task, "--bits", 4, "--rows", 16, "--output", tmp_path / "r.json"]
    code, out, _ = tool(*command, "--report", tmp_path / "r.html")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["accuracy,", "%", "first", "second"]
    assert len(lines) == 1 + len(robustness.POINTS) + 1
    (area,) = [line.split() for line in lines if line.startswith("area")]
    assert area[-1] == area[-2]
    (section,) = robustness.sections(json.loads((tmp_path / "r.json").read_text()))
    assert len(section.figures) == 3
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 3
    assert "first" in page
    assert "second" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--bits", 9], "9 is not in 1..8"),
        (["--rows", 0], "--rows: 0 is under 1"),
        (["--data", "nowhere.tsv"], "--data: nowhere.tsv"),
        (["--calibration", "nowhere.tsv"], "--calibration: nowhere.tsv"),
        (["--model", "nowhere"], "nowhere: no such run or model folder"),
        (["--names", "a", "b"], "--names: 2 found where 1 are needed"),
        (["-o", "Slim.quant.layers=[[a, skip]]"], "Slim.quant.layers"),
        (["--output", "."], "a folder; name a JSON file"),
    ],
)
def test_wrong_input_is_one_line(tool, folder, tiny_task, tmp_path, change, words):
    command = ["robustness", "--data", tiny_task, "--output", tmp_path / "r.json"]
    command += [] if "--model" in change else ["--model", folder]
    code, _, err = tool(*command, *change)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_another_tools_file_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"tool": "mixed_precision"}')
    with pytest.raises(UserError, match="of tools/mixed_precision.py"):
        rows.Rows(tmp_path / "r.json", "robustness")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        rows.Rows(tmp_path / "r.json", "robustness")
    with pytest.raises(UserError, match="not a result of tools/robustness.py"):
        robustness.sections({})


@pytest.mark.parametrize("weight", [{"quantizer": "ternary", "bits": 2}, {"quantizer": "binary", "bits": 1}])
def test_weights_that_are_not_rounded_to_the_nearest_step_are_refused(folder, tiny_task, weight):
    quant = config.Quant(weight=config.WeightQuant(**weight))
    bench = open_workbench(folder, tiny_task, quant)
    with pytest.raises(UserError, match="only weights rounded to the nearest step can be measured"):
        bench.on_own_grid()
