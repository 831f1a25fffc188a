"""The served models as the front knows them: checked before any worker starts, texts and ids to rows, logits to labels.

Nothing here loads Paddle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifact, tasks
from ..errors import UserError
from ..packed.expand import folder_of
from ..tokenizer import Encoded, Tokenizer, lacks_text, load_tokenizer
from .protocol import Invalid, Question

VERSION_DIGITS = 12


@dataclass(frozen=True)
class Model:
    """An artifact behind a name. `version` is the hash of its manifest, which holds the hash of each of its files."""

    name: str
    index: int  # what the workers call it
    folder: Path
    version: str
    labels: list[str]
    pair: bool
    max_length: int
    vocab_size: int
    type_vocab_size: int
    pad_token_id: int
    tokenizer: Tokenizer
    task: tasks.Task

    def describe(self) -> dict[str, Any]:
        """What clients are told of it."""
        return {
            "name": self.name,
            "task": tasks.kind(self.task),
            "version": self.version,
            "labels": self.labels,
            "pair": self.pair,
            "max_length": self.max_length,
        }

    def encode(self, question: Question) -> list[np.ndarray]:
        """int64 [2, tokens] of each text; raises Invalid for pairs that the model lacks or does not take, and no text."""
        texts, pairs = question.texts or [], question.pairs
        if self.pair and pairs is None:
            raise Invalid("pairs_missing", f"model {self.name!r} judges pairs: 'pairs' is missing")
        if pairs is not None and not self.pair:
            raise Invalid("pairs_superfluous", f"model {self.name!r} takes no 'pairs'")
        rows = []
        for index, row in enumerate(self.tokenizer.encode(texts, pairs, self.max_length)):
            if lacks_text(row):
                where = " or ".join(question.place(name, index) for name in ("texts", "pairs")[: 1 + self.pair])
                raise Invalid("empty_text", f"{where}: no text in it; an empty sentence has no label")
            rows.append(_array(row))
        return rows

    def check_ids(self, ids: list[list[int]], types: list[list[int]] | None) -> list[np.ndarray]:
        """int64 [2, tokens] of each row of ids; raises Invalid for ids that would crash the engine or mislead it."""
        rows = []
        for index, row in enumerate(ids):
            if not 1 <= len(row) <= self.max_length:
                message = f"input_ids[{index}]: {len(row)} tokens, not in 1..{self.max_length}"
                raise Invalid("wrong_length", message)
            segment = [0] * len(row) if types is None else types[index]
            if len(segment) != len(row):
                message = f"token_type_ids[{index}]: {len(segment)} ids for {len(row)} input_ids"
                raise Invalid("wrong_length", message)
            for name, values, size in (
                ("input_ids", row, self.vocab_size),
                ("token_type_ids", segment, self.type_vocab_size),
            ):
                low, high = min(values), max(values)
                if low < 0 or high >= size:
                    message = f"{name}[{index}]: {low if low < 0 else high} is not in 0..{size - 1}"
                    raise Invalid("id_out_of_range", message)
            rows.append(np.array((row, segment), np.int64))
        return rows

    def label(self, logits: np.ndarray) -> list[tuple[str, float]]:
        """The label and the score of each row: in classification the likeliest and its probability."""
        return self.task.served(logits, self.labels)


def load(folders: dict[str, Path]) -> list[Model]:
    """The models of these artifact folders or packed artifacts. Raises UserError, which names the model, for one that cannot be
    served."""
    models = []
    for index, (name, folder) in enumerate(folders.items()):
        try:
            models.append(_load(name, index, folder))
        except UserError as error:
            raise UserError(f"model {name!r}: {error}") from None
    return models


def _load(name: str, index: int, folder: Path) -> Model:
    folder = folder_of(folder)
    manifest = artifact.read_manifest(folder)
    artifact.check_verified(folder, manifest)
    task = tasks.of_manifest(manifest)
    if task.per_token:
        raise UserError(
            f"{folder}: its task is {tasks.kind(task)}, which is not served; Predictor and tools/infer.py answer"
        )
    if artifact.SERVING_CONF not in manifest["files"]:
        raise UserError(f"{folder}: has no {artifact.SERVING_CONF}; export it again")
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".pdmodel", ".pdiparams"))
    expected = sorted((artifact.MODEL, artifact.PARAMS)) if artifact.has_plain(manifest) else []
    if found != expected or Path(folder, "__params__").exists():
        # Paddle Serving takes whatever program it finds first.
        raise UserError(f"{folder}: holds {', '.join(found)}; {artifact.MODEL} and {artifact.PARAMS} only are needed")
    return Model(
        name=name,
        index=index,
        folder=folder.resolve(),
        version=version(folder),
        tokenizer=load_tokenizer(folder, manifest["tokenizer"]["kind"]),
        task=task,
        **{
            key: manifest[key]
            for key in ("labels", "pair", "max_length", "vocab_size", "type_vocab_size", "pad_token_id")
        },
    )


def version(folder: Path) -> str:
    """Changes whenever any file of the artifact does."""
    return hashlib.sha256(Path(folder, artifact.MANIFEST).read_bytes()).hexdigest()[:VERSION_DIGITS]


def _array(row: Encoded) -> np.ndarray:
    return np.array((row.input_ids, row.token_type_ids), np.int64)


def named(models: Sequence[Model], name: str) -> Model:
    """The model of that name, or Invalid with status 404."""
    for model in models:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in models)
    raise Invalid("unknown_model", f"model {json.dumps(name)[:80]} is not served; served: {known}", 404)
