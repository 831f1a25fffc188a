"""What a PaddleNLP model folder holds, read and checked. Weights are unpickled as data: a checkpoint runs no code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from paddlenlp.transformers import ErnieConfig
from paddlenlp.utils.log import logger

from .. import tasks
from ..errors import UserError

WEIGHTS, CONFIG, VOCABULARY = "model_state.pdparams", "config.json", "vocab.txt"
LEGACY_CONFIG = "model_config.json"  # of PaddleNLP before 2.5
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
ACTIVATIONS = ("gelu", "relu")
ARRAY_PARTS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),  # bytes, as pickle protocol 2 writes them
    ("builtins", "tuple"),  # (name, array), as paddle.save writes a tensor
    ("collections", "OrderedDict"),
}

logger.set_level("ERROR")  # PaddleNLP logs every file that it opens


def find(folder: Path, name: str) -> Path:
    """`folder`/`name`; UserError naming the file if it is not there."""
    path = folder / name
    if path.is_file():
        return path
    hint = ""
    others = [other for other in ("model.safetensors", "pytorch_model.bin") if (folder / other).is_file()]
    if name == WEIGHTS and others:
        hint = f"; tools/convert.py converts its {others[0]}"
    raise UserError(f"{folder}: it has no {name}{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object")
    return tree


def check_sizes(path: Path, tree: dict[str, Any]) -> None:
    """UserError unless the numbers of a transformer's config, where given, are possible and its activation is known.

    `head_dim` (loading.make_classifier) frees hidden_size from being a multiple of num_attention_heads.
    """
    for key in (*SIZES, "head_dim"):
        value = tree.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {key}: {value!r} is not a positive integer")
    hidden, heads = tree.get("hidden_size", 768), tree.get("num_attention_heads", 12)
    if "head_dim" not in tree and hidden % heads:
        raise UserError(f"{path}: hidden_size: {hidden} is not a multiple of num_attention_heads ({heads})")
    epsilon = tree.get("layer_norm_eps", 1e-12)
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 <= epsilon < 1:
        raise UserError(f"{path}: layer_norm_eps: {epsilon!r} is not a number in 0..1")
    activation = tree.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act: {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def labels_of(folder: Path) -> list[str]:
    """Label names in order of their ids from config.json; `0`, `1`, … for the classes of a folder that names none."""
    settings, names = _heading(folder)
    fixed = tasks.find(task_of(folder)).fixed
    if fixed:
        return list(fixed)
    count = settings.get("num_labels") or settings.get("num_choices") or 2
    if sorted(names) != list(range(len(names))) or not names:
        return [str(index) for index in range(count)]
    labels = [names[index] for index in range(len(names))]
    if labels == [f"LABEL_{index}" for index in range(len(labels))]:  # a placeholder, not a name
        return [str(index) for index in range(len(labels))]
    return labels


def task_of(folder: Path) -> str:
    """The task (tasks/) that a folder's config.json says its head is for; classification where it does not say."""
    settings, names = _heading(folder)
    count = settings.get("num_labels") or len(names) or 2
    return tasks.kind_of_settings(settings.get("architectures"), settings.get("problem_type"), count)


def _heading(folder: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """config.json, and the label names by id in it."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: not a model folder: it has no config.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = settings.get("id2label") or {}
        names = {int(index): str(label) for index, label in names.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None
    return settings, names


def read_config(folder: Path) -> ErnieConfig:
    """The ErnieConfig in config.json (or in an old folder's model_config.json); UserError where it cannot be one."""
    if not (folder / CONFIG).is_file() and (folder / LEGACY_CONFIG).is_file():
        read_json(folder / LEGACY_CONFIG)
        settings = ErnieConfig.from_pretrained(str(folder))
        check_sizes(folder / LEGACY_CONFIG, settings.to_dict())
        return settings
    path = find(folder, CONFIG)
    tree = read_json(path)
    kind = tree.get("model_type", "ernie")
    if kind != "ernie":
        raise UserError(f"{path}: model_type: {kind!r} is not ernie (tools/convert.py converts BERT's)")
    check_sizes(path, tree)
    return ErnieConfig.from_dict(tree)


def tokenizer_settings(do_lower_case: bool = True) -> dict[str, dict[str, Any]]:
    """ErnieTokenizer's two JSON files by name, as they stand beside a vocab.txt."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    settings = {"do_lower_case": do_lower_case, **special, "tokenizer_class": "ErnieTokenizer"}
    return {"tokenizer_config.json": settings, "special_tokens_map.json": special}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array of a .pdparams file.

    Raises UserError for a file that is cut short or damaged, that holds anything but named arrays of finite floats, or
    that would run code.
    """
    try:
        with open(path, "rb") as file:
            state = _ArrayUnpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise anything
        raise UserError(
            f"{path}: damaged or cut short, or not a weights file: {error or type(error).__name__}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: it holds a {type(state).__name__}; named weights are needed")
    state.pop("StructuredToParameterName@@", None)  # paddle.save's table of its own names
    if not state:
        raise UserError(f"{path}: it holds no weights")
    return {str(name): _checked(path, name, value) for name, value in state.items()}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # NumPy 2's pickles
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of weights needs")
        return super().find_class(module, name)


def _checked(path: Path, name: Any, value: Any) -> np.ndarray:
    if isinstance(value, tuple) and len(value) == 2:
        value = value[1]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{path}: {name} is {found}; an array of floats is needed")
    if not np.isfinite(value).all():
        raise UserError(f"{path}: {name} has weights that are not finite numbers")
    return value.astype(np.float32, copy=False)
