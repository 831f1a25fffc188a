"""Strict configuration: what is accepted, and the message for each kind of mistake."""

from pathlib import Path

import pytest
import yaml

from ernie_kqat import UserError, config, strict

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_overrides_in_both_of_paddles_forms(tmp_path):
    path = write(tmp_path, "Train: {epochs: 2, learning_rate: 1e-4}\nSlim: {quant: {weight: {bits: 4}}}\n")
    found = config.load(path, ["Train.batch_size=8", "seed=7", "Slim.quant.activation.bits=4"])
    assert (found.Train.epochs, found.Train.batch_size, found.Global.seed) == (2, 8, 7)
    assert found.Train.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as text
    assert (found.Slim.quant.weight.bits, found.Slim.quant.activation.bits) == (4, 4)
    assert config.load(write(tmp_path, "")).Slim.quant is None


def test_methods_are_keys_of_slim(tmp_path):
    found = config.load(write(tmp_path, "Slim: {kurtosis: {targets: {cap: 3}, lambda: 2}}"))
    assert found.Slim.methods["kurtosis"].lambda_ == 2.0
    assert found.Slim.methods["kurtosis"].targets == {"cap": 3}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("Slim: {quant: {weight: {bits: 9}}}", [], "a.yaml: Slim.quant.weight.bits: 9 is not in 1..8"),
        ("Slim: {quant: {weight: {bits: 4.5}}}", [], "Slim.quant.weight.bits: 4.5 is not of type int"),
        ("Slim: {quant: {weight: {bits: yes}}}", [], "Slim.quant.weight.bits: True is not of type int"),
        ("Trian: {epochs: 1}", [], "a.yaml: Trian: unknown key; did you mean Train?"),
        ("Train: {epoch: 1}", [], "Train.epoch: unknown key; did you mean epochs?"),
        ("Slim: {kurtosys: {}}", [], "Slim.kurtosys: unknown key; did you mean kurtosis?"),
        ("Slim: {kurtosis: {lamda: 1}}", [], "Slim.kurtosis.lamda: unknown key; did you mean lambda?"),
        ("Slim: {quant: {weight: {range: max}}}", [], "'max' is not one of absmax | mse"),
        ("Train: {learning_rate: fast}", [], "Train.learning_rate: 'fast' is not a number"),
        ("Train: 3", [], "Train: 3 found where keys are needed"),
        ("- a\n- b", [], "found where sections are needed"),
        ("Train: {epochs: [", [], "not valid YAML"),
        ("Data: {labels: positive}", [], "Data.labels: 'positive' is not of type"),
        ("", ["Train.epochs=-1"], "-o Train.epochs=-1: Train.epochs: -1 is not in 0.."),
        ("", ["Train.epochs"], "-o Train.epochs: not of the form key.sub=value"),
        ("", ["nonsense=1"], "-o nonsense=1: say which section"),
        ("Train: {epochs: 1}", ["Train.epochs.a=1"], "Train.epochs is 1, which has no keys"),
    ],
)
def test_mistakes_name_file_key_value_and_what_is_allowed(tmp_path, text, overrides, message):
    with pytest.raises(UserError) as error:
        config.load(write(tmp_path, text), overrides)
    assert message in str(error.value)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        config.load(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        config.load(tmp_path / "b.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_survives_a_round_trip(path):
    found = config.load(path)
    tree = yaml.safe_load(yaml.safe_dump(strict.to_tree(found)))
    assert strict.to_tree(config.from_tree(tree, "again")) == strict.to_tree(found)


def test_every_key_is_documented():
    lines = list(config.describe())
    assert any(line.startswith("Slim.kurtosis.lambda = 1.0") for line in lines)
    assert [line for line in lines if line.endswith(")  ")] == []


def test_the_reference_is_what_the_dataclasses_say():
    page = Path(__file__).parents[1] / "docs/configuration.md"
    assert page.read_text(encoding="utf-8") == config.reference(), "stale: python tools/config_reference.py"
    for key in ("`Train.learning_rate`", "`Slim.quant.weight.bits`", "`Slim.squat.rho`"):
        assert key in config.reference()
