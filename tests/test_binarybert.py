"""BinaryBERT's whole way with the shipped configs, two steps a stage: half width, ternary in two stages, split in two, INT8."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ernie_kqat import config
from ernie_kqat.export.exporter import export_run
from ernie_kqat.narrow import narrow_folder
from ernie_kqat.quantizers.attach import quantized_linears
from ernie_kqat.restore import restore_run
from ernie_kqat.trainer import train

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("half", "ternary_1", "ternary_2", "binary_1", "binary_2")


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_ernie, tiny_task):
    """The folder of the five runs, each from the one before."""
    folder = tmp_path_factory.mktemp("chain")
    whole = shutil.copytree(tiny_ernie, folder / "whole")
    described = json.loads((whole / "config.json").read_text())
    described["id2label"] = {"0": "negative", "1": "positive"}
    (whole / "config.json").write_text(json.dumps(described))
    narrow_folder(str(whole), str(tiny_task), 0.5, 0.5, folder / "narrow", rows=64)
    start = folder / "narrow"
    for stage in STAGES:
        teacher = whole if stage == "half" else folder / "half/best_model"
        overrides = {
            "Global.output_dir": folder / stage,
            "Model.name_or_path": start,
            "Data.path": tiny_task,
            "Data.max_length": 32,
            "Slim.distill.teacher": teacher,
            "Train.max_steps": 2,
            "Train.eval_steps": 1,
            "Train.learning_rate": 1e-3,
        }
        made = config.load(
            CONFIGS / f"ernie_sst2_minilm_{stage}.yaml", [f"{key}={value}" for key, value in overrides.items()]
        )
        train(made)
        start = folder / stage / "best_model"
    return folder


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_a_second_stage_begins_where_the_first_one_ended(chain, kind):
    first, second = chain / f"{kind}_1", chain / f"{kind}_2"
    assert f"quantizers go on as they are in {first / 'best_model'}" in (second / "plan.txt").read_text()
    assert rows(second)[0]["eval_accuracy"] == json.loads((first / "summary.json").read_text())["accuracy"]
    for run, terms in ((first, {"hidden", "attention"}), (second, {"logits"})):
        logged = [row for row in rows(run) if "loss" in row]
        assert logged
        assert all(set(row) & {"hidden", "attention", "logits"} == terms for row in logged)


def test_the_split_is_made_anew_only_after_the_ternary_runs(chain):
    text = (chain / "binary_1/plan.txt").read_text()
    assert "quantizers begin anew: " in text
    assert "weight.quantizer was ternary, is binary" in text


def test_the_end_has_four_values_a_layer_and_half_the_heads(chain):
    restored = restore_run(chain / "binary_2")
    assert restored.fp32 == str(chain / "half/best_model")
    assert restored.model.config.num_attention_heads == 2
    for layer in quantized_linears(restored.model).values():
        assert len(np.unique(layer._fake_quant_weight(layer.weight).numpy())) <= 4


def test_the_end_is_deployed_as_it_was_simulated(chain):
    found = export_run(str(chain / "binary_2"), str(chain / "int8"), config.Export())["verification"]
    assert found["passed"]
    assert found["simulated_accuracy"] == json.loads((chain / "binary_2/summary.json").read_text())["best_accuracy"]
    assert found["int8_ops"] == 2 * 6 + 2
