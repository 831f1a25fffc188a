"""The race against other engines: rows, turns, figures, ratios; and a race on a tiny ERNIE."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_ernie import make_tiny_ernie

from ernie_kqat import UserError
from ernie_kqat.models.folder import CONFIG
from ernie_kqat.peers import candidates, environment, race, report, roofline
from ernie_kqat.peers.engines import worker

ROOT = Path(__file__).parents[1]
ROWS = [np.array([[5] + [7 + index] * index + [6], [0] * (index + 2)]) for index in range(1, 6)]


def test_rows_come_back_as_they_were(tmp_path):
    worker.write_rows(str(tmp_path / "rows.npz"), {"natural": ROWS, "32": ROWS[:2]})
    found = worker.read_rows(str(tmp_path / "rows.npz"))
    assert set(found) == {"natural", "32"}
    for name, rows in (("natural", ROWS), ("32", ROWS[:2])):
        assert len(found[name]) == len(rows)
        for one, other in zip(found[name], rows):
            np.testing.assert_array_equal(one, other)


def test_batches_are_longest_first_and_single_rows_as_they_come():
    assert worker.batches(ROWS, 1) == [[0], [1], [2], [3], [4]]
    assert worker.batches(ROWS, 2) == [[4, 3], [2, 1], [0]]


def test_logits_are_in_the_order_of_the_rows():
    logits = worker.all_logits(lambda rows: np.array([[row.shape[1], 0.0] for row in rows]), ROWS, 2)
    assert logits[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_rows_of_fixed_length_are_whole_batches_of_real_text():
    rows = race.lengths_of(ROWS * 20, 90)
    assert len(rows["natural"]) == 90
    for length in (32, 64, 128):
        of = rows[str(length)]
        assert len(of) == 32
        assert {row.shape for row in of} == {(2, length)}
        assert all(row[0, 0] == 5 and row[0, -1] == 6 and row[0, 1:-1].min() >= 8 for row in of)
    assert rows["32"][0][0, 1:7].tolist() == [8, 9, 9, 10, 10, 10]


def test_figures_of_known_times():
    found = race.figures_of(np.array([[2.0, 4.0], [3.0, 5.0], [10.0, 20.0]]), rows=4)
    assert found["ms"] == 2.0
    assert found["spread"] == pytest.approx((7.5 - 1.5) / 2)
    assert found["p50_call"] == 4.5


def made(times, accuracies=None):
    """(engines, cells) of milliseconds by name."""
    about = {name: {"accuracy": (accuracies or {}).get(name, 0.9)} for name in times}
    cells = [
        {
            "length": length,
            "batch": batch,
            "engines": {name: {"ms": ms * (1 + batch), "p50_call": 1.0, "p99_call": 3.0} for name, ms in times.items()},
        }
        for length in race.LENGTHS
        for batch in race.BATCHES
    ]
    return about, cells


TIMES = {"ours native": 1.0, "ours plain": 2.0, "paddle fp32": 6.0, "openvino fp32": 8.0, "openvino int8": 3.0}


def test_ratios_are_to_the_best_of_a_peer():
    about, cells = made(TIMES)
    cells[3]["engines"]["openvino fp32"]["ms"] = cells[3]["engines"]["ours native"]["ms"] * 0.5
    found = race.summary(about, cells)
    assert found["recommended"] == "ours native"
    assert found["worst_vs_openvino"] == pytest.approx(0.5)
    assert found["geomean_vs_openvino"] == pytest.approx((3.0**11 * 0.5) ** (1 / 12))
    assert found["plain_batched_worst_vs_openvino"] == pytest.approx(1.5)
    assert found["geomean_vs_paddle_fp32"] == pytest.approx(6.0)
    assert found["batch_1_natural_p99_over_p50"] == pytest.approx(3.0)


def test_an_inaccurate_engine_is_not_recommended():
    about, cells = made(TIMES, {"ours native": 0.85})
    assert race.recommended(about, cells) == "ours plain"
    about["paddle fp32"]["commonest_label"] = 0.95  # the fp32 model knows nothing either
    assert race.recommended(about, cells) == "ours native"


def test_operations_of_a_model():
    settings = {"hidden_size": 4, "intermediate_size": 16, "num_hidden_layers": 2}
    found = roofline.work(settings, rows=3, tokens=5)
    layer, tokens = 4 * 4 * 4 + 2 * 4 * 16, 15
    assert found["int8_ops"] == 2 * (2 * tokens * layer + 3 * 16)
    keys_and_values, rest = 2 * 4 * 4, 2 * 4 * 4 + 2 * 4 * 16
    assert found["int8_ops_least"] == 2 * (tokens * layer + tokens * keys_and_values + 3 * rest + 3 * 16)
    assert found["fp32_ops"] == 2 * 2 * 4 * 5 * (tokens + 3)
    assert found["weight_bytes"] == 2 * layer + 16


def test_an_unknown_peer_is_named(tmp_path):
    with pytest.raises(UserError, match="--against: tvm: not one of openvino, onnxruntime, paddleslim"):
        candidates.prepare("m", None, None, candidates.RECIPE, ["tvm"], tmp_path)
    with pytest.raises(UserError, match="peer 'tvm': not one of onnxruntime, openvino"):
        environment.python_of("tvm")


def test_a_peer_that_cannot_be_installed_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(environment, "HERE", tmp_path)
    (tmp_path / "openvino.lock").write_text("openvino==0.0.0 --hash=sha256:" + "0" * 64 + "\n", encoding="utf-8")
    half_made = tmp_path / "peers/openvino-then/bin"
    half_made.mkdir(parents=True)
    monkeypatch.setattr(environment, "_folder", lambda name: half_made.parent)
    with pytest.raises(UserError, match="openvino: pip could not install it"):
        environment.python_of("openvino")


def test_an_engine_that_dies_says_why(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("import sys\nsys.exit('no such model')\n", encoding="utf-8")
    candidate = candidates.Candidate("tvm int8", sys.executable, script, tmp_path)
    message = "tvm int8: its process ended with code 1: no such model"
    with pytest.raises(UserError, match=message), race._started(candidate, tmp_path, 1):
        pass


def test_a_race_on_a_tiny_ernie(tiny_task, tmp_path):
    model, output = make_tiny_ernie(tmp_path / "ernie"), tmp_path / "results.json"
    settings = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    (model / CONFIG).write_text(
        json.dumps({**settings, "id2label": {"0": "negative", "1": "positive"}}), encoding="utf-8"
    )
    command = [sys.executable, "tools/benchmark.py", "--model", model, "--data", tiny_task, "--against", "paddleslim"]
    command += ["--rows", "8", "--repeats", "1", "--output", output]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert list(found["engines"]) == ["ours native", "ours plain", "paddle fp32", "paddleslim int8"]
    assert len(found["cells"]) == 12
    assert {"recommended", "geomean_vs_paddleslim", "geomean_vs_paddle_fp32"} <= set(found["summary"])
    assert found["engines"]["ours plain"]["agreement_with_fp32"] > 0.9
    assert found["engines"]["paddle fp32"]["agreement_with_fp32"] == 1
    assert found["roofline"]["int8_gops"] > 1
    assert json.loads(done.stdout.splitlines()[-1]) == found["summary"]
    assert output.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
    assert "| ours native |" in "\n".join(report.table(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "openvino"], "--against: needs one --model FP32_FOLDER and --data DIR"),
        (["--against", "openvino", "--model", "m", "--data", "d", "--batch", "4"], "leave --batch and --engine out"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
