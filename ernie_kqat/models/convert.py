"""BERT-family checkpoints (safetensors or PyTorch) -> PaddleNLP ERNIE folders that compute the same hidden states."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors import SafetensorError, safe_open

from .. import files
from ..errors import UserError
from . import torch_file
from .folder import CONFIG, SIZES, VOCABULARY, WEIGHTS, check_sizes, find, read_json, tokenizer_settings

SOURCE_WEIGHTS, TORCH_WEIGHTS = "model.safetensors", "pytorch_model.bin"
IGNORED = re.compile(r"embeddings\.position_ids$|^cls\.")  # a buffer, and the pretraining heads
RENAMED = (  # BERT's name -> ERNIE's, part by part
    (r"^bert\.", ""),
    (r"^qa_outputs\.", "classifier."),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^embeddings\.LayerNorm", "embeddings.layer_norm"),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"attention\.self\.query", "self_attn.q_proj"),
    (r"attention\.self\.key", "self_attn.k_proj"),
    (r"attention\.self\.value", "self_attn.v_proj"),
    (r"attention\.output\.dense", "self_attn.out_proj"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "linear1"),
    (r"output\.dense", "linear2"),
    (r"output\.LayerNorm", "norm2"),
    (r"^(?=embeddings|encoder|pooler)", "ernie."),
)
HEADS = {  # BERT's class -> PaddleNLP's, whose weights are the same
    "BertForTokenClassification": "ErnieForTokenClassification",
    "BertForQuestionAnswering": "ErnieForQuestionAnswering",
}
KEPT = (
    *SIZES,
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "pad_token_id",
)


def convert_bert(source: str | Path, target: str | Path) -> list[str]:
    """Fill the existing folder `target` from `source`; returns remarks.

    Of `source` config.json, vocab.txt and model.safetensors are read, or pytorch_model.bin where that is missing.

    Keys may begin with `bert.` or not; a `classifier` is kept, of sentences or tokens, and `qa_outputs` as ERNIE's classifier
    of answers; a missing pooler, which only sentences need, and pretraining heads left out, are remarked on. Raises UserError for
    a file that is missing or damaged, for an architecture that ERNIE cannot compute, and for weights that are missing, left
    over or of the wrong shape.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise UserError(f"{source}: {'is a file; a folder is needed' if source.exists() else 'no such folder'}")
    settings = _ernie_config(find(source, CONFIG))
    has_torch = not (source / SOURCE_WEIGHTS).exists() and (source / TORCH_WEIGHTS).is_file()
    path, vocabulary = find(source, TORCH_WEIGHTS if has_torch else SOURCE_WEIGHTS), find(source, VOCABULARY)
    tensors = torch_file.read_tensors(path) if has_torch else _read_tensors(path)
    ignored = [name for name in tensors if IGNORED.search(name)]
    weights = {_ernie_name(name): _ernie_value(name, value) for name, value in tensors.items() if name not in ignored}
    if len(weights) + len(ignored) != len(tensors):
        raise UserError(f"{path}: it holds some weights twice, with and without `bert.`")
    remarks = _check(path, weights, settings)
    if any(name.startswith("cls.") for name in ignored):
        remarks.append("pretraining heads (cls.*) left out")
    paddle.save({name: paddle.to_tensor(value) for name, value in weights.items()}, str(target / WEIGHTS))
    files.write_json(target / CONFIG, settings)
    shutil.copyfile(vocabulary, target / VOCABULARY)
    for name, tree in tokenizer_settings(_lower_case(source)).items():
        files.write_json(target / name, tree)
    return remarks


def _ernie_config(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    for key, needed in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
        if tree.get(key, needed) != needed:
            raise UserError(f"{path}: {key}: {tree[key]!r}, where only {needed!r} can be converted")
    missing = [key for key in SIZES if key not in tree]
    if missing:
        raise UserError(f"{path}: missing keys: {', '.join(missing)}")
    check_sizes(path, tree)
    return {
        "architectures": [HEADS.get((tree.get("architectures") or [""])[0], "ErnieForSequenceClassification")],
        "model_type": "ernie",
        **{key: tree[key] for key in KEPT if key in tree},
        "layer_norm_eps": tree.get("layer_norm_eps", 1e-12),
        "use_task_id": False,
        **{key: tree[key] for key in ("id2label", "label2id", "problem_type") if tree.get(key) is not None},
    }


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(str(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short, or not safetensors: {error}") from None
    except TypeError as error:  # NumPy has no bfloat16
        raise UserError(f"{path}: {error}; float32 or float16 weights are needed") from None


def _ernie_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _ernie_value(name: str, value: np.ndarray) -> np.ndarray:
    linear = value.ndim == 2 and "embeddings" not in name
    return np.ascontiguousarray(
        value.T if linear else value, dtype=np.float32
    )  # BERT's Linear is [out, in], Paddle's [in, out]


def _check(path: Path, weights: dict[str, np.ndarray], settings: dict[str, Any]) -> list[str]:
    """UserError unless the weights are those that `settings` asks for; a classifier and a pooler may be missing."""
    shapes = _shapes(settings)
    pooler = {name for name in shapes if name.startswith("ernie.pooler.")}
    remarks = []
    if not pooler & set(weights):
        shapes = {name: shape for name, shape in shapes.items() if name not in pooler}
        if settings["architectures"][0] not in HEADS.values():
            remarks.append("no pooler: fine-tuning will begin with a random one")
    if "classifier.weight" in weights:
        labels = weights["classifier.weight"].shape[-1]
        shapes.update({"classifier.weight": (settings["hidden_size"], labels), "classifier.bias": (labels,)})
    for problem, names in (
        ("missing weights", set(shapes) - set(weights)),
        ("weights that ERNIE has no place for", set(weights) - set(shapes)),
    ):
        if names:
            raise UserError(f"{path}: {problem}: {_listed(names)}")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            found = list(weights[name].shape)
            raise UserError(f"{path}: {name} is of shape {found}, where config.json asks for {list(shape)}")
        if not np.isfinite(weights[name]).all():
            raise UserError(f"{path}: {name} has weights that are not finite numbers")
    return remarks


def _shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the encoder, as PaddleNLP's ErnieModel has them."""
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    linears, norms = {"ernie.pooler.dense": (hidden, hidden)}, ["ernie.embeddings.layer_norm"]
    for index in range(settings["num_hidden_layers"]):
        layer = f"ernie.encoder.layers.{index}"
        linears.update({f"{layer}.self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")})
        linears.update({f"{layer}.linear1": (hidden, inner), f"{layer}.linear2": (inner, hidden)})
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
    shapes: dict[str, tuple[int, ...]] = {}
    for table, size in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        shapes[f"ernie.embeddings.{table}_embeddings.weight"] = (settings[size], hidden)
    for name, shape in linears.items():
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[1:]})
    for name in norms:
        shapes.update({f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)})
    return shapes


def _lower_case(source: Path) -> bool:
    path = source / "tokenizer_config.json"
    return bool(read_json(path).get("do_lower_case", True)) if path.is_file() else True


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f", … ({len(ordered)} in all)" if len(ordered) > 3 else "")
