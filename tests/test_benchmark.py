"""The latency figures: what is a median of what, whose turn it is, and the tool that prints them."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from ernie_kqat import UserError, benchmark
from ernie_kqat.machine import exact_int8, machine, versions

ROWS = [([1, 2], [0, 0])] * 8


@pytest.fixture
def clock(monkeypatch):
    """A clock that only Sleepers move: a busy machine's would make the figures unknown."""
    made = SimpleNamespace(now=0.0, perf_counter=lambda: made.now)
    monkeypatch.setattr(benchmark, "time", made)
    return made


class Sleeper:
    """Takes a known time a row, and notes who was called."""

    def __init__(self, name, ms, log, clock=None, slow_first_pass=False):
        self.name, self.ms, self.log, self.clock, self.slow = name, ms, log, clock, slow_first_pass

    def logits(self, rows, batch_size):
        self.log.append((self.name, len(rows), batch_size))
        seconds = self.ms * len(rows) / 1e3
        if self.slow and sum(name == self.name for name, _, _ in self.log) <= len(ROWS):
            seconds += 0.02
        if self.clock:
            self.clock.now += seconds
        return np.zeros((len(rows), 2), np.float32)


def test_milliseconds_a_sentence_after_a_warm_up(clock):
    log = []
    found = benchmark.latency_ms({"a": Sleeper("a", 2, log, clock, slow_first_pass=True)}, ROWS, (1, 4), repeats=3)["a"]
    for key in ("batch_1", "batch_4"):
        assert found[key] == pytest.approx(2)
        assert found[f"{key}_per_second"] == pytest.approx(500)
        assert found[f"{key}_spread"] == pytest.approx(0, abs=1e-9)
    assert found["batch_1_p90"] == pytest.approx(2)
    assert found["batch_1_p99"] == pytest.approx(2)
    assert log.count(("a", 1, 1)) == len(ROWS) * 4
    assert log.count(("a", len(ROWS), 4)) == 4


def test_predictors_take_turns(clock):
    log = []
    predictors = {name: Sleeper(name, ms, log, clock) for name, ms in (("a", 0.5), ("b", 2))}
    found = benchmark.latency_ms(predictors, ROWS, (4,), repeats=2)
    assert [name for name, _, _ in log] == list("ababab")
    assert found["b"]["batch_4"] == pytest.approx(4 * found["a"]["batch_4"])


def test_loads_take_turns_after_a_warm_up(clock):
    log = []

    def load(name, ms):
        log.append(name)
        clock.now += (ms + 50 * (log.count(name) == 1)) / 1e3

    found = benchmark.load_ms({name: partial(load, name, ms) for name, ms in (("a", 3), ("b", 20))}, repeats=2)
    assert found == {"a": pytest.approx(3), "b": pytest.approx(20)}
    assert log == list("ababab")


def test_a_slow_machine_gets_no_more_passes_than_are_enough(clock):
    log = []
    found = benchmark.latency_ms({"a": Sleeper("a", 1000, log, clock)}, ROWS, (4,), repeats=5, enough_s=20)["a"]
    assert len(log) == 3  # 24 s: one pass of 8 s to warm up, two to measure
    assert found["batch_4"] == pytest.approx(1000)


def test_figures_of_known_times():
    calls = np.array([[1.0, 1.0, 1.0, 1.0, 6.0], [2.0, 2.0, 2.0, 2.0, 7.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    found = benchmark._figures(1, calls, rows=5)
    assert found["batch_1"] == 1.0
    assert found["batch_1_p90"] == pytest.approx(np.percentile(calls, 90))
    assert found["batch_1_per_second"] == 500.0  # the median pass takes 10 ms for 5 rows
    assert found["batch_1_spread"] == pytest.approx((3 - 1) / 2)


def test_rows_of_each_model():
    log = []
    benchmark.latency_ms({name: Sleeper(name, 0, log) for name in "ab"}, {"a": ROWS, "b": ROWS[:3]}, (4,), 1)
    assert ("a", 8, 4) in log
    assert ("b", 3, 4) in log


@pytest.mark.parametrize(
    ("rows", "sizes", "repeats", "message"),
    [
        ([], (1,), 1, "a: no rows"),
        (ROWS, (), 1, "batch sizes"),
        (ROWS, (0, 1), 1, "batch sizes"),
        (ROWS, (1,), 0, "repeats: 0"),
    ],
)
def test_wrong_options(rows, sizes, repeats, message):
    with pytest.raises(UserError, match=message):
        benchmark.latency_ms({"a": Sleeper("a", 0, [])}, rows, sizes, repeats)


def test_machine_and_versions():
    assert machine()["cores"] >= 1
    assert machine()["cpu"]
    assert versions()["paddlepaddle"].startswith("2.6")
    assert exact_int8(["avx2", "avx_vnni"])
    assert exact_int8(["avx512_vnni"])
    assert not exact_int8(["avx2", "avx512f"])


def test_the_tool_compares_two_artifacts(tool, tiny_int8, tiny_fp32, tmp_path):
    (tmp_path / "rows.txt").write_text("a good film\nthe plot was very dull .\n" * 4)
    arguments = ["--model", tiny_int8, "--model", tiny_fp32, "--model", tiny_int8, "--data", tmp_path / "rows.txt"]
    code, out, _ = tool(
        "benchmark", *arguments, "--repeats", 2, "--batch", 1, "--batch", 4, "--rows", 6, "--json", tmp_path / "j"
    )
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "j").read_text())
    assert list(result["models"]) == [str(tiny_int8), str(tiny_fp32), f"{tiny_int8} (3)"]
    assert [one["engine"] for one in result["models"].values()] == ["onednn_int8", "fp32", "onednn_int8"]
    assert result["rows"] == 6
    for figures in result["models"].values():
        assert figures["batch_1"] > 0
        assert figures["batch_4"] > 0
        assert figures["mean_tokens"] > 3
    assert out.count("onednn_int8") == 4  # twice in the table, twice in the JSON


def test_the_tool_names_what_is_wrong(tool, tiny_int8, tmp_path):
    (tmp_path / "rows.txt").write_text("a good film\n")
    for arguments, message in (
        (["--model", tiny_int8, "--data", tmp_path / "none.txt"], "none.txt: no such file"),
        (["--model", tmp_path, "--data", tmp_path / "rows.txt"], "not an artifact"),
        (["--model", tiny_int8, "--data", tmp_path / "rows.txt", "--batch", 0], "batch sizes"),
        (["--model", tiny_int8, "--data", tmp_path / "rows.txt", "--rows", 0], "--rows 0"),
    ):
        code, _, err = tool("benchmark", *arguments)
        assert code == 2
        assert message in err
