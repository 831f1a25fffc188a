"""Narrower models: the least important attention heads and feed-forward neurons of each layer are left out.

Paper: DynaBERT, arXiv 2004.04037, section 2.1; at half the width it is what BinaryBERT (2012.15701) splits. How much the loss
L would change without a head or a neuron is, to first order,

    |dL/dm| at m = 1 = |sum of a dL/da|      m: a factor on its output a, which out_proj or linear2 reads

Differs from the paper: |.| is taken of each row and then summed (as in 1905.10650, equation 2), not of each batch, so that
the batch size means nothing. One width for all layers, as there; what is kept stays in its order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddlenlp.transformers import ErnieConfig
from tqdm import tqdm

from . import files
from .config import Data
from .data.batching import collate, eval_batches
from .data.dataset import Split, find_file, load_eval_split
from .errors import UserError
from .models.loading import make_classifier, save_classifier
from .restore import restore_folder
from .tasks import only_classification
from .tokenizer import load_tokenizer

BATCH_SIZE = 32


def importance(slopes: np.ndarray, groups: int) -> np.ndarray:
    """Sum over rows of |dL/dm| of each group, float64 [groups]; slopes: dL/d(a factor on one value), [rows, groups x values]."""
    return np.abs(slopes.astype(np.float64).reshape(len(slopes), groups, -1).sum(axis=2)).sum(axis=0)


def most_important(values: np.ndarray, share: float) -> np.ndarray:
    """Indices of this share of the values, the largest, in ascending order; at least one; of equals the first."""
    count = max(1, round(share * len(values)))
    return np.sort(np.argsort(-values, kind="stable")[:count])


@dataclass(frozen=True)
class LayerImportance:
    """Of one encoder layer: float64 [heads] and [neurons]."""

    heads: np.ndarray
    neurons: np.ndarray


def measure(model: paddle.nn.Layer, batches: Iterable[dict[str, np.ndarray]]) -> list[LayerImportance]:
    """The importance of every head and neuron for the task's loss on labelled batches.

    The model is put in eval mode, and its gradients are cleared.
    """
    model.eval()
    heads = model.config.num_attention_heads
    factors: list[
        paddle.Tensor
    ] = []  # of this batch, [rows, 1, width], on what out_proj and linear2 of each layer read

    def mask(layer, inputs):
        factors.append(paddle.ones([inputs[0].shape[0], 1, inputs[0].shape[2]], inputs[0].dtype))
        factors[-1].stop_gradient = False
        return inputs[0] * factors[-1]

    linears = [part for layer in model.ernie.encoder.layers for part in (layer.self_attn.out_proj, layer.linear2)]
    hooks = [linear.register_forward_pre_hook(mask) for linear in linears]
    sums = [np.zeros(linear.weight.shape[0] if index % 2 else heads) for index, linear in enumerate(linears)]
    try:
        for batch in batches:
            factors.clear()
            logits = model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
            # not paddle.grad: its gradients are wrong here (Paddle 2.6.2; PaddlePaddle/Paddle issues 39759 and 42420)
            F.cross_entropy(logits, paddle.to_tensor(batch["labels"]), reduction="sum").backward()
            for total, factor in zip(sums, factors):
                total += importance(factor.grad.numpy()[:, 0], len(total))
    finally:
        model.clear_gradients()
        for hook in hooks:
            hook.remove()
    return [LayerImportance(*pair) for pair in zip(sums[::2], sums[1::2])]


def narrowed(model: paddle.nn.Layer, heads: list[np.ndarray], neurons: list[np.ndarray]) -> paddle.nn.Layer:
    """A new model with these heads and neurons of each layer only (as many in all layers), in eval mode.

    It computes what `model` does with all others masked to zero.
    """
    tree = model.config.to_diff_dict()
    had, hidden = model.config.num_attention_heads, model.config.hidden_size
    head_dim = model.ernie.encoder.layers[0].self_attn.head_dim
    tree.update(num_attention_heads=len(heads[0]), intermediate_size=len(neurons[0]))
    if len(heads[0]) * head_dim != hidden:
        tree["head_dim"] = head_dim
    settings = ErnieConfig.from_dict(tree)
    settings.num_labels = model.config.num_labels
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for index, (of_heads, kept) in enumerate(zip(heads, neurons)):
        layer = f"ernie.encoder.layers.{index}."
        columns = np.arange(had * head_dim).reshape(had, head_dim)[of_heads].reshape(-1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            _take(state, layer + name, columns)
        _take(state, layer + "linear1", kept)
        for name, rows in (("self_attn.out_proj", columns), ("linear2", kept)):
            state[f"{layer}{name}.weight"] = state[f"{layer}{name}.weight"][rows]
    new = make_classifier(settings)
    for name, value in new.state_dict().items():
        value.set_value(state[name])
    new.eval()
    return new


def _take(state: dict[str, np.ndarray], linear: str, columns: np.ndarray) -> None:
    state[f"{linear}.weight"] = state[f"{linear}.weight"][:, columns]
    state[f"{linear}.bias"] = state[f"{linear}.bias"][columns]


def narrow_folder(
    source: str,
    data: str,
    heads: float,
    ffn: float,
    output: str | Path,
    rows: int | None = None,
    seed: int = 42,
    columns: Data | None = None,
) -> list[str]:
    """Write a fine-tuned fp32 folder with these shares of its heads and neurons to `output`; returns lines to print.

    data: labelled rows (a file, or a folder's train file) that say what is important; `rows`: of them, so many by `seed`.
    Raises UserError for wrong input.
    """
    for name, share in (("--heads", heads), ("--ffn", ffn)):
        if not 0 < share <= 1:
            raise UserError(f"{name}: {share} is not a share over 0, up to 1")
    restored = restore_folder(source, columns)
    only_classification(restored.task, "tools/narrow.py")
    split = _labelled(data, restored)
    chosen = np.random.default_rng(seed).permutation(len(split))[:rows]
    order = eval_batches([len(split.input_ids[row]) for row in chosen], BATCH_SIZE)
    batches = (collate(split, chosen[places], restored.pad_token_id) for places in order)
    found = measure(restored.model, tqdm(batches, total=len(order), desc="importance", disable=None))
    kept_heads = [most_important(layer.heads, heads) for layer in found]
    kept = [most_important(layer.neurons, ffn) for layer in found]
    new = narrowed(restored.model, kept_heads, kept)
    with files.replacing_folder(output) as folder:
        save_classifier(new, restored.vocabulary, folder, restored.labels)
    lines = [f"importance on {len(chosen)} rows of {split.name}; of each layer the share that is kept:"]
    for index, (layer, of_heads, neurons) in enumerate(zip(found, kept_heads, kept)):
        lines.append(
            f"  layer {index}: heads {' '.join(map(str, of_heads))} ({_share(layer.heads, of_heads):.1%} of the importance),"
            f" {len(neurons)} of {len(layer.neurons)} neurons ({_share(layer.neurons, neurons):.1%})"
        )
    before, after = (sum(parameter.size for parameter in model.parameters()) for model in (restored.model, new))
    return [*lines, f"parameters: {before} -> {after}"]


def _labelled(data: str, restored) -> Split:
    path = Path(data).expanduser()
    if path.is_dir():
        path = find_file(path, "train", None)
    own, tokenizer = restored.data, load_tokenizer(restored.vocabulary)
    split = load_eval_split(path, tokenizer, restored.labels, own.max_length, own.text, own.text_pair, own.label)
    if split.labels is None:
        raise UserError(f"--data: {path}: its rows have no labels, without which there is no loss")
    return split


def _share(values: np.ndarray, kept: np.ndarray) -> float:
    return float(values[kept].sum() / max(values.sum(), 1e-300))
