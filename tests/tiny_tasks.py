"""Toy data of every task family that is not classification, each learned in seconds by the tiny ERNIE."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_ernie import ADVERBS, NEGATIVE, NOUNS, OTHER, POSITIVE

GRADED = [*NEGATIVE, *POSITIVE]  # from 0 to 5
TOPICS = NOUNS[:3]


def make_regression(folder: Path, rows: int = 256, seed: int = 0) -> Path:
    """STS-B's shape: two sentences and a score of 0..5, which one word of the second decides."""
    rng = random.Random(seed)

    def row() -> str:
        grade = rng.randrange(len(GRADED))
        second = f"the {rng.choice(NOUNS)} is {GRADED[grade]}"
        return f"a {rng.choice(NOUNS)}\t{second}\t{5 * grade / (len(GRADED) - 1):.2f}"

    return _tsv(folder, "sentence1\tsentence2\tscore", row, rows)


def make_multilabel(folder: Path, rows: int = 256, seed: int = 0) -> Path:
    """The topics that a sentence names, joined by |; some sentences name none."""
    rng = random.Random(seed)

    def row() -> str:
        topics = [topic for topic in TOPICS if rng.random() < 0.5]
        return f"{' '.join(['the', *rng.sample(topics, len(topics)), rng.choice(ADVERBS)])}\t{'|'.join(topics)}"

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
