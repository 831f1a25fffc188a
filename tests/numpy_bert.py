"""BERT's encoder in NumPy float64, from its equations: the oracle for converted checkpoints.

Vaswani et al., Attention Is All You Need (2017), post-LayerNorm; Devlin et al., BERT (2019): learned positions and
segments, GELU by the error function, a tanh pooler on the first token.
"""

from __future__ import annotations

import math

import numpy as np


def bert_hidden_states(
    weights: dict[str, np.ndarray], config: dict, input_ids: np.ndarray, token_type_ids: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """After the embeddings and after every layer, [rows, tokens, hidden]; and the pooled first token, [rows, hidden].

    `weights` by BERT's names without `bert.`, Linear weights [out, in]; no padding: every token is seen.
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, name):
        rows, tokens, hidden = x.shape
        q, k, v = (
            linear(x, f"{name}.self.{part}").reshape(rows, tokens, heads, hidden // heads).transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(hidden // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = scores / scores.sum(-1, keepdims=True)
        return linear((probabilities @ v).transpose(0, 2, 1, 3).reshape(rows, tokens, hidden), f"{name}.output.dense")

    x = w["embeddings.word_embeddings.weight"][input_ids]
    x = x + w["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
    x = layer_norm(x + w["embeddings.token_type_embeddings.weight"][token_type_ids], "embeddings.LayerNorm")
    states = [x]
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        x = layer_norm(x + attention(x, f"{layer}.attention"), f"{layer}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{layer}.intermediate.dense"))
        x = layer_norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        states.append(x)
    return states, np.tanh(linear(x[:, 0], "pooler.dense"))


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x), Phi the normal distribution function."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
