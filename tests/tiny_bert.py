"""A tiny random BERT as other frameworks store it: safetensors, Linear weights [out, in]."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny_ernie import tiny_vocabulary

HIDDEN, LAYERS, HEADS, INNER = 32, 2, 4, 48


def make_tiny_bert(folder: str | Path, prefix: str = "", layer_norm_eps: float = 1e-12, seed: int = 0) -> Path:
    """Write config.json, model.safetensors (names with `prefix`) and vocab.txt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tiny_vocabulary()
    config = {
        "model_type": "bert",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": layer_norm_eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
    }
    weights = {prefix + name: value for name, value in _weights(config, np.random.default_rng(seed)).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def _weights(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    linears = {"pooler.dense": (HIDDEN, HIDDEN)}
    norms = ["embeddings.LayerNorm"]
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        linears.update({f"{layer}.attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")})
        linears[f"{layer}.attention.output.dense"] = (HIDDEN, HIDDEN)
        linears[f"{layer}.intermediate.dense"] = (INNER, HIDDEN)
        linears[f"{layer}.output.dense"] = (HIDDEN, INNER)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    weights = {}
    for table, size in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        weights[f"embeddings.{table}_embeddings.weight"] = rng.normal(0, 0.5, (config[size], HIDDEN))
    for name, shape in linears.items():
        weights[f"{name}.weight"] = rng.normal(0, shape[1] ** -0.5, shape)
        weights[f"{name}.bias"] = rng.normal(0, 0.1, shape[0])
    for name in norms:
        weights[f"{name}.weight"] = rng.normal(1, 0.1, HIDDEN)
        weights[f"{name}.bias"] = rng.normal(0, 0.1, HIDDEN)
    return {name: value.astype(np.float32) for name, value in weights.items()}
