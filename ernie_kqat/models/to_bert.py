"""A PaddleNLP ERNIE classifier -> a BERT folder (safetensors) for other frameworks, which computes the same logits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from .. import files
from ..errors import UserError
from .convert import KEPT, SOURCE_WEIGHTS
from .folder import CONFIG, VOCABULARY, WEIGHTS, find, labels_of, read_config, read_json, read_weights

RENAMED = (  # ERNIE's name -> BERT's, part by part
    (r"^ernie\.", "bert."),
    (r"embeddings\.layer_norm", "embeddings.LayerNorm"),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"self_attn\.q_proj", "attention.self.query"),
    (r"self_attn\.k_proj", "attention.self.key"),
    (r"self_attn\.v_proj", "attention.self.value"),
    (r"self_attn\.out_proj", "attention.output.dense"),
    (r"norm1", "attention.output.LayerNorm"),
    (r"norm2", "output.LayerNorm"),
    (r"linear1", "intermediate.dense"),
    (r"linear2", "output.dense"),
)
TASKS = "ernie.embeddings.task_type_embeddings.weight"
SEGMENTS = "ernie.embeddings.token_type_embeddings.weight"


def convert_ernie(source: str | Path, target: str | Path) -> list[str]:
    """Fill the existing folder `target` with config.json, model.safetensors and the tokenizer's files; returns remarks.

    BERT has no task embeddings: ERNIE adds the same one to every token, so it goes into the token types'. Raises UserError for a
    folder that is no ERNIE, or one of fewer heads (tools/narrow.py), which BERT has no config for.
    """
    source, target = Path(source), Path(target)
    settings = read_config(source).to_dict()
    if "head_dim" in settings:
        raise UserError(f"{source / CONFIG}: head_dim: BERT's heads are hidden_size / num_attention_heads wide")
    weights, vocabulary = read_weights(find(source, WEIGHTS)), find(source, VOCABULARY)
    remarks = []
    tasks = weights.pop(TASKS, None)
    if tasks is not None and settings.get("use_task_id"):
        weights[SEGMENTS] = weights[SEGMENTS] + tasks[settings.get("task_id", 0)]
        remarks.append("the task's embedding is added to those of the token types")
    labels = labels_of(source)
    tree: dict[str, Any] = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "position_embedding_type": "absolute",
        **{key: settings[key] for key in KEPT if key in settings},
        "layer_norm_eps": settings.get("layer_norm_eps", 1e-12),
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    named = {_bert_name(name): _bert_value(name, value) for name, value in weights.items()}
    save_file(named, target / SOURCE_WEIGHTS, metadata={"format": "pt"})
    files.write_json(target / CONFIG, tree)
    shutil.copyfile(vocabulary, target / VOCABULARY)
    path = source / "tokenizer_config.json"
    lower = bool(read_json(path).get("do_lower_case", True)) if path.is_file() else True
    files.write_json(target / "tokenizer_config.json", {"do_lower_case": lower, "tokenizer_class": "BertTokenizer"})
    return remarks


def _bert_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _bert_value(name: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T if value.ndim == 2 and "embeddings" not in name else value)
