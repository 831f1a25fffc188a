"""Toy data of every task family that is not classification, each learned in seconds by the tiny ERNIE."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_ernie import ADVERBS, NEGATIVE, NOUNS, OTHER, POSITIVE

from ernie_kqat import config
from ernie_kqat.export import verify
from ernie_kqat.export.exporter import export_run
from ernie_kqat.trainer import train

GRADES = {
    word: 0.2 * index for words in (NEGATIVE, POSITIVE) for index, word in enumerate(words, 18 * (words is POSITIVE))
}
TOPICS = NOUNS[:3]


def make_regression(folder: Path, rows: int = 256, seed: int = 0) -> Path:
    """STS-B's shape: two sentences and a score of 0..5, low or high by one word of the second."""
    rng = random.Random(seed)

    def row() -> str:
        word = rng.choice(list(GRADES))
        return f"a {rng.choice(NOUNS)}\tthe {rng.choice(NOUNS)} is {word}\t{GRADES[word]:.2f}"

    return _tsv(folder, "sentence1\tsentence2\tscore", row, rows)


def make_multilabel(folder: Path, rows: int = 256, seed: int = 0) -> Path:
    """The topics that a sentence names, joined by |; some sentences name none."""
    rng = random.Random(seed)

    def row() -> str:
        topics = [topic for topic in TOPICS if rng.random() < 0.5]
        return f"{' '.join(['the', *topics])}\t{'|'.join(topics)}"

    return _tsv(folder, "text\tlabel", row, rows)


def make_entities(folder: Path, rows: int = 256, seed: int = 0, kind: str = "txt") -> Path:
    """Things of one or two words, and judgements; CoNLL columns, or JSON lines."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("dev", rows // 4)):
        sentences = [_tagged(rng) for _ in range(count)]
        if kind == "jsonl":
            lines = [json.dumps({"tokens": words, "labels": tags}) + "\n" for words, tags in sentences]
        else:
            lines = ["".join(f"{word}\t{tag}\n" for word, tag in zip(*pair)) + "\n" for pair in sentences]
        (folder / f"{name}.{kind}").write_text("".join(lines), encoding="utf-8")
    return folder


def make_questions(folder: Path, rows: int = 256, seed: int = 0, unanswerable: float = 0.0, filler: int = 3) -> Path:
    """SQuAD's shape: the answer is the one judgement in the context, with its adverb; `filler` words on both sides."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("dev", rows // 4)):
        paragraphs = []
        for index in range(count):
            before, after = ([rng.choice(OTHER) for _ in range(rng.randrange(filler + 1))] for _ in range(2))
            answer = [] if rng.random() < unanswerable else [f"{rng.choice(ADVERBS)} {rng.choice(POSITIVE)}"]
            context = " ".join([*before, "The", *answer, *after])
            found = [{"text": text, "answer_start": context.index(text)} for text in answer]
            asked = {"id": f"q{index}", "question": f"what is the {rng.choice(NOUNS)}?", "answers": found}
            paragraphs.append({"context": context, "qas": [{**asked, "is_impossible": not answer}]})
        tree = {"version": "2.0", "data": [{"title": "toy", "paragraphs": paragraphs}]}
        (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def _tagged(rng: random.Random) -> tuple[list[str], list[str]]:
    words, tags = ["the"], ["O"]
    things = rng.sample(NOUNS, rng.choice([1, 2]))
    words += things
    tags += ["B-THING", "I-THING"][: len(things)]
    words += [rng.choice(["is", "was"])]
    tags += ["O"]
    if rng.random() < 0.7:
        words.append(rng.choice(POSITIVE))
        tags.append("B-GOOD")
    words.append("xyz")  # a word of several tokens
    tags.append("O")
    return words, tags


def _tsv(folder: Path, header: str, row, rows: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("dev", rows // 4)):
        lines = [header, *(row() for _ in range(count))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Made:
    """A run, its verified artifact, and what they said."""

    run: Path
    artifact: Path
    summary: dict
    manifest: dict


def make(folder: Path, model: Path, data: Path, task: str, slim: dict | None = None, **sections: dict) -> Made:
    """Train (by default plain QAT), export and verify."""
    tree = {
        "Global": {"output_dir": str(folder / "run"), "seed": 3, "log_every": 8},
        "Model": {"name_or_path": str(model), **sections.get("Model", {})},
        "Data": {"task": task, "path": str(data), "max_length": 24, **sections.get("Data", {})},
        "Slim": {"quant": {}} if slim is None else slim,
        "Train": {"epochs": 4, "batch_size": 16, "learning_rate": 3e-3, **sections.get("Train", {})},
    }
    summary = train(config.from_tree(tree, "test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "LATENCY_ROWS", 1)
        manifest = export_run(str(folder / "run"), str(folder / "out"), config.Export())
    return Made(folder / "run", folder / "out", summary, manifest)
