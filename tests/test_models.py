"""Loading and saving of ERNIE folders: PaddleNLP is the oracle of what they compute."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import socket

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieForSequenceClassification, ErnieTokenizer
from tiny_ernie import make_tiny_ernie

from ernie_kqat import UserError
from ernie_kqat.models import loading
from ernie_kqat.models.folder import read_weights
from ernie_kqat.quantizers.attach import QUANTIZER_STATE

IDS = paddle.to_tensor(np.random.default_rng(0).integers(5, 180, (3, 12)))


def logits(model) -> np.ndarray:
    model.eval()
    return model(IDS).numpy()


def state_of(folder) -> dict[str, paddle.Tensor]:
    return paddle.load(str(folder / "model_state.pdparams"))


def write_state(folder, state) -> None:
    paddle.save(state, str(folder / "model_state.pdparams"))


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path, tiny_ernie):
    return shutil.copytree(tiny_ernie, tmp_path / "ernie")


@pytest.mark.parametrize(
    "options",
    [{}, {"use_task_id": True, "task_id": 2}, {"hidden_act": "relu", "num_labels": 3}, {"layers": 1, "heads": 2}],
    ids=lambda options: ",".join(options) or "default",
)
def test_load_equals_paddlenlps_own(tmp_path, options):
    folder = make_tiny_ernie(tmp_path, **options)
    model = loading.load_classifier(str(folder), options.get("num_labels", 2))
    assert not model.new_head
    np.testing.assert_array_equal(logits(model), logits(ErnieForSequenceClassification.from_pretrained(str(folder))))


def test_local_folder_never_touches_the_network(tiny_ernie, monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loading.load_classifier(str(tiny_ernie), 2)
    loading.pretrained_matrices(str(tiny_ernie))
    assert loading.vocabulary_folder(str(tiny_ernie)) == tiny_ernie


def test_epsilon_is_the_configs_on_every_layer_norm(tmp_path):
    folder = make_tiny_ernie(tmp_path / "ernie", layer_norm_eps=1e-3)
    model = loading.load_classifier(str(folder), 2)
    norms = [layer for layer in model.sublayers() if isinstance(layer, paddle.nn.LayerNorm)]
    assert [norm._epsilon for norm in norms] == [1e-3] * 5
    copy = tmp_path / "copy"
    copy.mkdir()
    loading.save_classifier(model, folder, copy, ["no", "yes"])
    np.testing.assert_array_equal(logits(loading.load_classifier(str(copy), 2)), logits(model))
    edit_config(copy, layer_norm_eps=1e-12)
    assert np.abs(logits(loading.load_classifier(str(copy), 2)) - logits(model)).max() > 1e-4


def test_dropout(folder):
    model = loading.load_classifier(str(folder), 2, dropout=0.3)
    layer = model.ernie.encoder.layers[0]
    assert [model.dropout.p, model.ernie.embeddings.dropout.p, layer.dropout1.p, layer.self_attn.dropout] == [0.3] * 4
    assert loading.load_classifier(str(folder), 2).dropout.p == 0.1


def test_head_of_another_size_is_new_and_follows_the_seed(tiny_ernie):
    heads = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        model = loading.load_classifier(str(tiny_ernie), 5)
        assert model.new_head
        heads.append(model.classifier.weight.numpy())
    assert heads[0].shape == (32, 5)
    np.testing.assert_array_equal(heads[0], heads[1])
    assert (heads[0] != heads[2]).all()
    np.testing.assert_array_equal(model.ernie.pooler.dense.weight, state_of(tiny_ernie)["ernie.pooler.dense.weight"])


def test_encoder_saved_on_its_own(tmp_path, tiny_ernie):
    folder = make_tiny_ernie(tmp_path, head=False)
    assert "embeddings.word_embeddings.weight" in state_of(folder)
    model = loading.load_classifier(str(folder), 2)
    assert model.new_head
    whole = loading.load_classifier(str(tiny_ernie), 2)
    model.eval(), whole.eval()
    np.testing.assert_array_equal(model.ernie(IDS)[1], whole.ernie(IDS)[1])


def test_pooler_may_be_missing_only_with_the_head(folder):
    state = {name: value for name, value in state_of(folder).items() if ".pooler." not in name}
    write_state(folder, state)
    with pytest.raises(UserError, match=r"missing weights: ernie\.pooler\.dense\.bias, ernie\.pooler\.dense\.weight$"):
        loading.load_classifier(str(folder), 2)
    assert loading.load_classifier(str(folder), 3).new_head


@pytest.mark.parametrize("name", ["config.json", "model_state.pdparams", "vocab.txt"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"ernie: it has no {name}"):
        loading.load_classifier(str(folder), 2)


def test_unconverted_safetensors_are_pointed_out(folder):
    (folder / "model_state.pdparams").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"it has no model_state\.pdparams; tools/convert\.py converts"):
        loading.load_classifier(str(folder), 2)


def test_missing_left_over_and_misshapen_weights_are_named(folder):
    state = state_of(folder)
    norm = "ernie.encoder.layers.1.norm2.bias"
    write_state(folder, {name: value for name, value in state.items() if name != norm})
    with pytest.raises(UserError, match=rf"missing weights: {norm}$"):
        loading.load_classifier(str(folder), 2)
    write_state(folder, {**state, "ernie.encoder.layers.2.norm2.bias": state[norm]})
    with pytest.raises(UserError, match=r"no place for: ernie\.encoder\.layers\.2\.norm2\.bias$"):
        loading.load_classifier(str(folder), 2)
    linear = "ernie.encoder.layers.0.linear1.weight"
    write_state(folder, {**state, linear: state[linear].t()})
    with pytest.raises(UserError, match=rf"{linear} is of shape \[64, 32\], where config\.json asks for \[32, 64\]"):
        loading.load_classifier(str(folder), 2)
    write_state(folder, {**state, "cls.predictions.transform.weight": state[linear]})
    assert not loading.load_classifier(str(folder), 2).new_head


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999999])
def test_truncated_weights(folder, share):
    path = folder / "model_state.pdparams"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"model_state\.pdparams: damaged or cut short"):
        loading.load_classifier(str(folder), 2)


def test_damaged_weights_never_end_in_another_error(folder):
    path = folder / "model_state.pdparams"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for position in rng.integers(0, 400, 3):  # the pickle's own bytes; flipped weights are only other weights
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            read_weights(path)


def test_code_in_weights_is_refused_not_run(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"ernie.pooler.dense.weight": Attack()}))
    with pytest.raises(UserError, match=r"asks for posix\.mkdir"):
        loading.load_classifier(str(folder), 2)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_formats_of_paddle_save(tmp_path, protocol):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
    path = tmp_path / "weights"
    paddle.save({name: paddle.to_tensor(value) for name, value in values.items()}, str(path), protocol=protocol)
    for content in (None, values, {name: (name, value) for name, value in values.items()}):
        if content is not None:
            path.write_bytes(pickle.dumps(content, protocol=protocol))
        found = read_weights(path)
        for name, value in values.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == np.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights"),
        ([1], "holds a list"),
        ({"a": 3}, "a is int; an array of floats"),
        ({"a": np.arange(3)}, "a is int64"),
        ({"a": np.array([1.0, np.nan], np.float32)}, "a has weights that are not finite"),
    ],
)
def test_weights_that_are_not_weights(tmp_path, content, message):
    (tmp_path / "w").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"model_type: 'bert' is not ernie \(tools/convert\.py"),
        ({"hidden_size": "32"}, "hidden_size: '32' is not a positive integer"),
        ({"num_attention_heads": 5}, r"hidden_size: 32 is not a multiple of num_attention_heads \(5\)"),
        ({"hidden_act": "gelu_new"}, "hidden_act: 'gelu_new' is not one of gelu, relu"),
        ({"layer_norm_eps": None}, "layer_norm_eps: None is not a number"),
        ({"vocab_size": 100}, r"vocab\.txt: \d+ tokens, where config\.json's vocab_size is 100"),
    ],
)
def test_impossible_configs(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        loading.load_classifier(str(folder), 2)


def test_broken_json(folder):
    (folder / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        loading.load_classifier(str(folder), 2)


def test_legacy_config(folder):
    tree = json.loads((folder / "config.json").read_text())
    for key in ("architectures", "id2label", "label2id", "model_type"):
        tree.pop(key)
    expected = logits(loading.load_classifier(str(folder), 2))
    (folder / "config.json").unlink()
    legacy = {"init_args": [{**tree, "init_class": "ErnieModel"}], "init_class": "ErnieForSequenceClassification"}
    (folder / "model_config.json").write_text(json.dumps(legacy))
    np.testing.assert_array_equal(logits(loading.load_classifier(str(folder), 2)), expected)


def test_pretrained_matrices(tmp_path, tiny_ernie):
    model = loading.load_classifier(str(tiny_ernie), 2)
    expected = {name: value.numpy() for name, value in model.state_dict().items() if value.ndim == 2}
    found = loading.pretrained_matrices(str(tiny_ernie))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    encoder = loading.pretrained_matrices(str(make_tiny_ernie(tmp_path, head=False)))
    assert encoder.keys() == expected.keys() - {"classifier.weight"}


def test_saved_folder_is_paddlenlps(tmp_path, tiny_ernie):
    model = loading.load_classifier(str(tiny_ernie), 3)
    loading.save_classifier(model, tiny_ernie, tmp_path, ["bad", "so so", "好"])
    own = ErnieForSequenceClassification.from_pretrained(str(tmp_path))
    np.testing.assert_array_equal(logits(own), logits(model))
    assert own.config.id2label == {0: "bad", 1: "so so", 2: "好"}
    assert own.config.label2id == {"bad": 0, "so so": 1, "好": 2}
    text = "The movie was dully, 非常 好!"
    expected = ErnieTokenizer.from_pretrained(str(tiny_ernie))(text)
    assert ErnieTokenizer.from_pretrained(str(tmp_path))(text) == expected
    assert json.loads((tmp_path / "config.json").read_text())["layer_norm_eps"] == 1e-12


def test_save_writes_tokenizer_settings_where_the_source_has_none(tmp_path, folder):
    model = loading.load_classifier(str(folder), 2)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    loading.save_classifier(model, folder, tmp_path, ["a", "b"])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["do_lower_case"] is True
    assert ErnieTokenizer.from_pretrained(str(tmp_path)).tokenize("The Film") == ["the", "film"]


def test_save_leaves_quantizer_state_out(tmp_path, tiny_ernie):
    model = loading.load_classifier(str(tiny_ernie), 2)
    model.classifier.add_sublayer("_fake_quant_input", paddle.nn.BatchNorm1D(3))
    assert any("_fake_quant_" in name for name in model.state_dict())
    loading.save_classifier(model, tiny_ernie, tmp_path, ["a", "b"], QUANTIZER_STATE)
    assert not loading.load_classifier(str(tmp_path), 2).new_head
