"""Distillation: train the student to give what a teacher gives: its logits, hidden states and attention scores.

Papers: Hinton et al., arXiv 1503.02531 (logits); TinyBERT and TernaryBERT, arXiv 2009.12812, equations 5 to 7 (hidden
states, attention scores before the softmax, soft cross-entropy). With the `lsq` quantizer it is KDLSQ-BERT (2101.05938).

    L = task * loss(y, s) + logits * T^2 * CE(softmax(t / T), softmax(s / T)) + hidden * sum_l MSE + attention * sum_l MSE

Differs from the papers: the means of hidden states and scores are over real tokens (and pairs of them), so that padding
changes nothing; the embeddings' output is not among the hidden states; layers of a deeper teacher are taken evenly (the last
of each block), as in TinyBERT. A teacher of more heads than the student (tools/narrow.py) has no attention scores to give:
BinaryBERT's teacher is the fp32 model of half the width, too.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import paddle
import paddle.nn.functional as F

from .. import files, tasks
from ..data.tokenized import Split
from ..errors import UserError
from ..evaluate import logits_of
from ..models.folder import CONFIG, WEIGHTS, labels_of
from ..models.loading import load_classifier
from ..strict import number, place
from . import Method

KEY = "Slim.distill"

log = logging.getLogger(__name__)


def soft_cross_entropy(student: paddle.Tensor, teacher: paddle.Tensor, temperature: float) -> paddle.Tensor:
    """T^2 times the cross-entropy of the student's logits [choices, alternatives] to the teacher's, both divided by T."""
    wanted = F.softmax(teacher / temperature)
    return -(wanted * F.log_softmax(student / temperature)).sum(axis=1).mean() * temperature**2


def masked_mse(student: paddle.Tensor, teacher: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
    """Mean squared difference where `mask`, which broadcasts to their shape, is 1."""
    counted = mask.sum() * (student.size / mask.size)
    return (paddle.square(student - teacher) * mask).sum() / counted


@dataclass
class Layers:
    """What one forward left behind, by layer: hidden states [rows, tokens, width], queries and keys of the same shape."""

    hidden: list[paddle.Tensor] = field(default_factory=list)
    queries: list[paddle.Tensor] = field(default_factory=list)
    keys: list[paddle.Tensor] = field(default_factory=list)

    def clear(self) -> None:
        for kept in (self.hidden, self.queries, self.keys):
            kept.clear()

    def scores(self, layer: int, heads: int) -> paddle.Tensor:
        """Attention scores before mask and softmax, [rows, heads, tokens, tokens]."""
        query, key = (_by_head(kept[layer], heads) for kept in (self.queries, self.keys))
        return paddle.matmul(query, key, transpose_y=True) / math.sqrt(query.shape[-1])


@dataclass
class Distillation(Method):
    """Weights of the four terms; the teacher computes without dropout and is never changed."""

    teacher: Optional[str] = place(None, "folder of a fine-tuned classifier with the same labels")
    task: float = number(1.0, 0.0, 1e6, "weight of the task's own loss")
    logits: float = number(1.0, 0.0, 1e6, "weight of the soft cross-entropy to the teacher's logits")
    temperature: float = number(1.0, 0.01, 1e3, "T")
    hidden: float = number(0.0, 0.0, 1e6, "weight of the hidden states' mean squared differences, summed over layers")
    attention: float = number(0.0, 0.0, 1e6, "weight of the attention scores' mean squared differences, summed")
    cache: Optional[str] = place(
        None, "folder to keep the teacher's logits of all train rows in, from run to run (not for hidden and attention)"
    )

    model: Any = field(default=None, init=False, repr=False)
    layers: list[int] = field(
        default_factory=list, init=False, repr=False
    )  # of the teacher, one for each of the student
    of_student: Layers = field(default_factory=Layers, init=False, repr=False)
    of_teacher: Layers = field(default_factory=Layers, init=False, repr=False)
    family: Any = field(default=None, init=False, repr=False)  # the student's task
    kept: Any = field(default=None, init=False, repr=False)  # the teacher's logits of all train rows, where cached

    def attach(self, model, pretrained):
        if self.teacher is None:
            raise UserError(f"{KEY}.teacher: missing: the folder of a fine-tuned classifier")
        classes = model.classifier.weight.shape[1]
        self.family = tasks.of_model(model)
        self.model = load_classifier(self.teacher, classes, task=tasks.kind(self.family))
        if self.model.new_head:
            raise UserError(
                f"{KEY}.teacher: {self.teacher}: no classifier of {classes} classes in it"
                + ("" if tasks.kind(self.family) == "classification" else f" for the task {tasks.kind(self.family)}")
            )
        _check_labels(self.teacher, model)
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.stop_gradient = True
        if self.hidden or self.attention:
            self._check_shapes(model)
            _keep(model, self.of_student, range(len(self.layers)), training=True)
            _keep(self.model, self.of_teacher, self.layers, training=False)

    def _check_shapes(self, model) -> None:
        own, other = model.config, self.model.config
        if other.num_hidden_layers % own.num_hidden_layers:
            raise UserError(
                f"{KEY}.teacher: {self.teacher}: {other.num_hidden_layers} layers, no multiple of the student's"
                f" {own.num_hidden_layers}; say hidden: 0, attention: 0"
            )
        block = other.num_hidden_layers // own.num_hidden_layers
        self.layers = [block * (index + 1) - 1 for index in range(own.num_hidden_layers)]
        for wanted, key, name, way_out in (
            (self.hidden, "hidden", "hidden_size", ""),
            (self.attention, "attention", "num_attention_heads", ", or take an fp32 model as narrow as the student"),
        ):
            if wanted and getattr(own, name) != getattr(other, name):
                raise UserError(
                    f"{KEY}.teacher: {self.teacher}: {name} {getattr(other, name)}, the student's is"
                    f" {getattr(own, name)}; say {key}: 0{way_out}"
                )

    def task_weight(self):
        return self.task

    def train_rows(self, train):
        cache = self._cache()
        if cache:
            self.kept = cached_logits(Path(cache), Path(str(self.teacher)), self.model, train)

    def _cache(self) -> str | None:
        """The folder of `cache`, where logits are all that is asked of the teacher, and one row of them a row."""
        return None if self.hidden or self.attention or self.family.per_token else self.cache

    def _wanted(self, batch) -> paddle.Tensor:
        """The teacher's logits of a batch."""
        self.of_teacher.clear()
        if self.kept is not None:
            return paddle.to_tensor(self.kept[batch["rows"]])
        with paddle.no_grad():
            return self.model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))

    def loss_terms(self, batch, outputs):
        wanted = self._wanted(batch)
        terms = {}
        real = paddle.to_tensor((batch["input_ids"] != self.model.ernie.pad_token_id).astype(np.float32))
        if self.logits:
            terms["logits"] = self.logits * self.family.imitation(outputs, wanted, self.temperature, real)
        if self.hidden:
            terms["hidden"] = self.hidden * self._hidden(real)
        if self.attention:
            terms["attention"] = self.attention * self._attention(real)
        self.of_student.clear()
        return terms

    def _hidden(self, real: paddle.Tensor) -> paddle.Tensor:
        pairs = zip(self.of_student.hidden, self.of_teacher.hidden)
        return sum(masked_mse(own, wanted, real.unsqueeze(-1)) for own, wanted in pairs)

    def _attention(self, real: paddle.Tensor) -> paddle.Tensor:
        heads = self.model.config.num_attention_heads
        mask = (real.unsqueeze(1) * real.unsqueeze(2)).unsqueeze(1)
        return sum(
            masked_mse(self.of_student.scores(layer, heads), self.of_teacher.scores(layer, heads), mask)
            for layer in range(len(self.layers))
        )

    def plan(self):
        weights = ", ".join(f"{name} {getattr(self, name):g}" for name in ("task", "logits", "hidden", "attention"))
        lines = [f"distillation from {self.teacher}: {weights}, temperature {self.temperature:g}"]
        if self.cache and not self._cache():
            why = "logits of every token" if self.family.per_token else "hidden and attention"
            lines.append(f"{KEY}.cache is not used: {why} need the teacher itself at each step")
        return lines


def cached_logits(folder: Path, teacher: Path, model: paddle.nn.Layer, rows: Split) -> np.ndarray:
    """The logits of `model`, loaded from `teacher`, float32 [rows, classes]; read from `folder`, or computed and kept there.

    A file is of these weights and these token ids only. One that cannot be read or written costs time: the log says so.
    """
    digest = hashlib.sha256(f"{files.sha256(teacher / WEIGHTS)} {files.sha256(teacher / CONFIG)}".encode())
    digest.update(np.array([len(ids) for ids in rows.input_ids], np.int64).tobytes())
    for part in (rows.input_ids, rows.token_type_ids):
        digest.update(np.concatenate(part).astype(np.int64).tobytes())
    path = folder / f"{digest.hexdigest()}.npy"
    shape = len(rows), model.classifier.weight.shape[1]
    found = _read_logits(path, shape)
    if found is None:
        found = logits_of(model, rows, model.ernie.pad_token_id, what="teacher's logits")
        content = io.BytesIO()
        np.save(content, found)
        try:
            files.write_bytes(path, content.getvalue())
        except OSError as error:  # a read-only or full folder
            log.warning("%s: the teacher's logits could not be kept: %s", path, error)
    return found


def _read_logits(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s: unreadable (%s); computing the teacher's logits again", path, error)
        return None
    if found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
        log.warning("%s: damaged; computing the teacher's logits again", path)
        return None
    return found


def _by_head(tensor: paddle.Tensor, heads: int) -> paddle.Tensor:
    rows, tokens, width = tensor.shape
    return tensor.reshape([rows, tokens, heads, width // heads]).transpose([0, 2, 1, 3])


def _keep(model: paddle.nn.Layer, kept: Layers, layers: Sequence[int], training: bool) -> None:
    """Have these layers of an ERNIE leave their tensors behind at each forward while the model is (not) `training`."""

    def into(found: list[paddle.Tensor]):
        def hook(layer, inputs, output):
            if model.training == training:
                found.append(output)

        return hook

    for index in layers:
        layer = model.ernie.encoder.layers[index]
        layer.register_forward_post_hook(into(kept.hidden))
        layer.self_attn.q_proj.register_forward_post_hook(into(kept.queries))
        layer.self_attn.k_proj.register_forward_post_hook(into(kept.keys))


def _check_labels(teacher: str, model: paddle.nn.Layer) -> None:
    """The teacher's labels must stand in the student's order, where both have names."""
    own = [model.config.id2label[index] for index in sorted(model.config.id2label)]
    found = labels_of(Path(teacher))
    unnamed = [str(index) for index in range(len(found))]
    if found not in (own, unnamed) and own not in (unnamed, [f"LABEL_{index}" for index in range(len(own))]):
        raise UserError(f"{KEY}.teacher: {teacher}: its labels are {', '.join(found)}; the task's are {', '.join(own)}")
