"""ERNIE with a head, from PaddleNLP names and folders. A local folder never touches the network."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.transformers import ErnieConfig

from .. import files, tasks
from ..errors import UserError
from . import heads, hub
from .folder import CONFIG, VOCABULARY, WEIGHTS, find, read_config, read_weights, tokenizer_settings

ENCODER, HEAD, POOLER = "ernie.", "classifier.", "ernie.pooler."
PARTS = ("embeddings.", "encoder.", "pooler.")  # of an ErnieModel, saved without `ernie.`
PRETRAINING_HEADS = "cls."

log = logging.getLogger(__name__)


def load_classifier(
    name_or_path: str, num_labels: int, dropout: float | None = None, task: str = "classification"
) -> paddle.nn.Layer:
    """An ERNIE with a head for `task` in fp32, every LayerNorm with the epsilon of config.json.

    `dropout` replaces the model's own for hidden states and attention. The model gets an attribute `new_head`: True
    when its classifier was initialized (from Paddle's seed) because the checkpoint has none, or one of another size or task;
    then the pooler may be missing too. A model name stands for its encoder only, so its head is always new.
    Raises UserError naming the missing file, the missing, left-over or misshapen weight, or both ways out when a name
    cannot be downloaded.
    """
    folder = hub.local_folder(name_or_path)
    named = folder is None
    folder = hub.complete(name_or_path) if folder is None else folder
    settings = read_config(folder)
    _check_vocabulary(folder, settings.vocab_size)
    weights = _with_prefix(read_weights(find(folder, WEIGHTS)))
    found = tasks.kind_of_settings(settings.architectures, settings.problem_type, settings.num_labels)
    if named:
        weights = _encoder_of(weights, settings.num_hidden_layers)
    elif found != task:
        weights = {name: value for name, value in weights.items() if not name.startswith(HEAD)}
    settings.num_labels = num_labels
    if dropout is not None:
        settings.hidden_dropout_prob = settings.attention_probs_dropout_prob = dropout
        settings.classifier_dropout = None  # it follows the hidden dropout
    model = make_classifier(settings, task)
    model.new_head = _fill(model, weights, folder / WEIGHTS)
    return model


def make_classifier(settings: ErnieConfig, task: str = "classification") -> paddle.nn.Layer:
    """An ERNIE of these sizes with a head for `task` and random weights, every LayerNorm with the epsilon of `settings`.

    The model gets an attribute `task`, its name.
    `settings.head_dim`, which PaddleNLP does not know, makes its attention narrower than its hidden states, as
    tools/narrow.py does: num_attention_heads heads of that size, whose product need not be hidden_size.
    """
    heads_count, head_dim = settings.num_attention_heads, getattr(settings, "head_dim", None)
    settings.num_attention_heads = heads_count if head_dim is None else 1  # 1: any hidden_size is a multiple of it
    family = tasks.find(task)
    settings.problem_type = family.problem
    model = heads.CLASSES[family.model](settings)
    model.task = task
    settings.num_attention_heads = heads_count
    for layer in model.ernie.encoder.layers if head_dim is not None else ():
        attention, width = layer.self_attn, heads_count * head_dim
        attention.num_heads, attention.head_dim = heads_count, head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, paddle.nn.Linear(settings.hidden_size, width))
        attention.out_proj = paddle.nn.Linear(width, settings.hidden_size)
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.LayerNorm):
            layer._epsilon = settings.layer_norm_eps  # PaddleNLP always takes 1e-12
    return model


def pretrained_matrices(name_or_path: str) -> dict[str, np.ndarray]:
    """The 2-D weights of a checkpoint, float32, named as in ErnieForSequenceClassification: for kurtosis targets."""
    folder = hub.local_folder(name_or_path) or hub.complete(name_or_path)
    weights = _with_prefix(read_weights(find(folder, WEIGHTS)))
    return {name: value for name, value in weights.items() if value.ndim == 2 and name.startswith((ENCODER, HEAD))}


def vocabulary_folder(name_or_path: str) -> Path:
    """The local folder with vocab.txt of a folder, or of a model name (then in PaddleNLP's cache)."""
    folder = hub.local_folder(name_or_path)
    if folder is None:
        return hub.vocabulary(name_or_path)
    find(folder, VOCABULARY)
    return folder


def save_classifier(
    model: paddle.nn.Layer,
    vocabulary: str | Path,
    folder: str | Path,
    labels: list[str],
    without: Sequence[str] = (),
) -> None:
    """Fill an existing `folder` as a PaddleNLP model folder: config with `labels` in order of their ids, tokenizer, and
    the fp32 weights, except those with one of `without` in their names.

    PaddleNLP's own loader reads all of it, but always computes with a LayerNorm epsilon of 1e-12, and refuses `head_dim`.
    """
    folder = Path(folder)
    own = model.state_dict().items()
    state = {name: value for name, value in own if not any(part in name for part in without)}
    paddle.save(state, str(folder / WEIGHTS))
    settings = model.config.to_diff_dict()
    settings.update(
        architectures=[tasks.of_model(model).model],
        model_type="ernie",
        layer_norm_eps=model.config.layer_norm_eps,
        id2label={str(index): label for index, label in enumerate(labels)},
        label2id={label: index for index, label in enumerate(labels)},
    )
    files.write_json(folder / CONFIG, dict(sorted(settings.items())))
    shutil.copyfile(find(Path(vocabulary), VOCABULARY), folder / VOCABULARY)
    for name, default in tokenizer_settings().items():
        if Path(vocabulary, name).is_file():
            shutil.copyfile(Path(vocabulary, name), folder / name)
        else:
            files.write_json(folder / name, default)


def _check_vocabulary(folder: Path, size: int) -> None:
    path = find(folder, VOCABULARY)
    with open(path, "rb") as file:
        tokens = sum(1 for _ in file)
    if tokens > size:
        raise UserError(f"{path}: {tokens} tokens, where config.json's vocab_size is {size}")


def _with_prefix(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names as in ErnieForSequenceClassification; an encoder saved on its own lacks `ernie.`."""
    return {ENCODER + name if name.startswith(PARTS) else name: value for name, value in weights.items()}


def _encoder_of(weights: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The encoder in an official checkpoint: without the heads of other tasks, and without the layers that its config
    does not count (ernie-3.0-micro-zh was published with one too many)."""
    kept = {}
    for name, value in weights.items():
        index = name.split(".")[3] if name.startswith("ernie.encoder.layers.") else "0"
        if name.startswith(ENCODER) and int(index) < layers:
            kept[name] = value
    return kept


def _fill(model: paddle.nn.Layer, weights: dict[str, np.ndarray], path: Path) -> bool:
    """Set every weight of `model`; returns whether its classifier is new."""
    own = model.state_dict()
    if not any(name.startswith(POOLER) for name in own):  # a head on every token reads none
        weights = {name: value for name, value in weights.items() if not name.startswith(POOLER)}
    head = {name for name in own if name.startswith(HEAD)}
    new_head = any(name not in weights or list(weights[name].shape) != own[name].shape for name in head)
    optional = set()
    if new_head:
        pooler = {name for name in own if name.startswith(POOLER)}
        optional = head | (pooler if not pooler & set(weights) else set())
        weights = {name: value for name, value in weights.items() if name not in head}
        log.info("%s: %s", path, "new classifier" if optional == head else "new pooler and classifier")
    missing = sorted(set(own) - set(weights) - optional)
    left_over = sorted(name for name in set(weights) - set(own) if not name.startswith(PRETRAINING_HEADS))
    for problem, names in (("missing weights", missing), ("weights that config.json has no place for", left_over)):
        if names:
            more = f", … ({len(names)} in all)" if len(names) > 3 else ""
            raise UserError(f"{path}: {problem}: {', '.join(names[:3])}{more}")
    for name in set(own) - optional:
        if list(weights[name].shape) != own[name].shape:
            raise UserError(
                f"{path}: {name} is of shape {list(weights[name].shape)}, where config.json asks for {own[name].shape}"
            )
        own[name].set_value(weights[name])
    return new_head
