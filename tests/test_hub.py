"""Model names: PaddleNLP's cache is enough, and a hub that does not answer is one clear error."""

from __future__ import annotations

import shutil

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieConfig, ErnieTokenizer

from ernie_kqat import UserError
from ernie_kqat.models import hub, loading

NAME = "ernie-3.0-tiny-pico-v2-zh"


@pytest.fixture
def no_network(monkeypatch):
    """The proxy of every request is a port where nobody listens."""
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of PaddleNLP's, and tiny sizes for one of its names."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes.update(vocab_size=190, max_position_embeddings=128, type_vocab_size=2, use_task_id=False)
    monkeypatch.setattr(hub, "MODEL_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ErnieConfig.pretrained_init_configuration, NAME, sizes)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "./nowhere: no such folder"),
        ("some/where", "some/where: no such folder"),
        ("~/nowhere-at-all", "no such folder"),
        ("ernie-2.0-bas-en", "did you mean ernie-2.0-base-en"),
        ("bert-base-uncased", "neither a folder here nor an ERNIE that PaddleNLP knows"),
        (__file__, "is a file; a model folder is needed"),
    ],
)
def test_paths_and_names_that_are_not_there(path, message):
    for load in (loading.vocabulary_folder, loading.pretrained_matrices, lambda path: loading.load_classifier(path, 2)):
        with pytest.raises(UserError, match=message):
            load(path)


def test_unreachable_hub_names_both_ways_out(cache, no_network):
    with pytest.raises(UserError) as caught:
        loading.load_classifier("ernie-2.0-base-en", 2)
    for part in ("ernie-2.0-base-en", str(cache), "PPNLP_HOME", "-o Model.name_or_path=DIR"):
        assert part in str(caught.value)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_full_disk_is_not_taken_for_the_network(cache, monkeypatch):
    def full(*_, **__):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise OSError("Can't load the model") from None

    monkeypatch.setattr(hub, "resolve_file_path", full)
    with pytest.raises(OSError, match="No space left"):
        loading.vocabulary_folder(NAME)


def test_cached_name_loads_without_a_network(cache, no_network, tiny_ernie):
    """As PaddleNLP leaves it: the vocabulary under its own name, no config; and as official checkpoints are, with
    pretraining heads and (ernie-3.0-micro-zh) a layer too many."""
    cached = cache / NAME
    cached.mkdir(parents=True)
    shutil.copyfile(tiny_ernie / "vocab.txt", cached / "ernie_3.0_tiny_pico_v2_vocab.txt")
    state = paddle.load(str(tiny_ernie / "model_state.pdparams"))
    extra = {name.replace("layers.1", "layers.2"): value for name, value in state.items() if "layers.1" in name}
    extra["cls.predictions.decoder_bias"] = state["classifier.bias"]
    paddle.save({**state, **extra}, str(cached / "model_state.pdparams"))
    assert (loading.vocabulary_folder(NAME) / "vocab.txt").read_bytes() == (tiny_ernie / "vocab.txt").read_bytes()
    model = loading.load_classifier(NAME, 2)
    assert model.new_head
    own = loading.load_classifier(str(tiny_ernie), 2)
    model.eval(), own.eval()
    ids = paddle.arange(5, 30).unsqueeze(0)
    np.testing.assert_array_equal(model.ernie(ids)[1], own.ernie(ids)[1])
    assert "ernie.encoder.layers.0.linear2.weight" in loading.pretrained_matrices(NAME)
    assert ErnieTokenizer.from_pretrained(str(cached))("the film")["input_ids"][0] == 1
