"""A tag for each word: named entities and the like, in IOB2 (B-PER I-PER O).

The tag stands at a word's first token; its other tokens have none, in training and in answers, as in BERT's own experiments.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from . import Task
from .classification import listed, softmax

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

OUTSIDE = "O"
TAG = re.compile(r"O|[BI]-\S+")
# Ideographs and kana are words by themselves in a text, as in the Chinese data sets.
_ALONE = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\u3040-\u30ff"
_WORD = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")


@dataclass(frozen=True)
class Words:
    """One text as the model reads it: its words, of which the first `len(first)` have a first token, at these positions."""

    text: str
    spans: list[tuple[int, int]]  # of each word in the text
    input_ids: list[int]
    first: np.ndarray

    @property
    def windows(self) -> list[tuple[list[int], list[int]]]:
        """(input_ids, token_type_ids) of its one row."""
        return [(self.input_ids, [0] * len(self.input_ids))]


@dataclass(frozen=True)
class Entity:
    """text[start:end] is a `label`; score: the least probability among its words' tags."""

    label: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True)
class Entities:
    """The answer for one text: its entities in order; logits [tokens, tags]."""

    entities: list[Entity]
    logits: list[list[float]]

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"entities": [{**asdict(entity), "score": round(entity.score, 6)} for entity in self.entities]}


@dataclass(frozen=True)
class Tokens(Task):
    model = "ErnieForTokenClassification"
    metrics = ("f1", "precision", "recall", "accuracy")
    suffixes = (".txt", ".conll", ".jsonl")
    per_token = True
    named = False

    def read(self, path, text, text_pair, label, require_label):
        from ..data.conll import TaggedReader

        return TaggedReader(path, text, label, require_label)

    def labels_in(self, example):
        return example.tags or ()

    def outputs(self, known, found):
        """O first, then B- and I- of each type; an I- has its B-, and a B- its I-, whether train has both or not."""
        tags = list(known or ())
        wrong = [tag for tag in (tags or found) if not TAG.fullmatch(tag)]
        if wrong:
            source = "Data.labels" if known else "tags of train"
            raise UserError(f"{source}: {listed(sorted(wrong))} found where O, B-… and I-… are needed")
        if known:
            if OUTSIDE not in tags or len(set(tags)) < max(len(tags), 2):
                raise UserError(f"Data.labels: {listed(tags)} found where O and other different tags are needed")
            return tags
        types = sorted({tag[2:] for tag in found} - {""})
        if not types:
            raise UserError("tags of train: only O found where entities are needed; is Data.label the right column?")
        return [OUTSIDE, *(f"{place}-{name}" for name in types for place in "BI")]

    def split(self, examples, labels, tokenizer, max_length, name, cache_dir=None, numbers_are_ids=True):
        """`sources`: for each row (positions of its words' first tokens, tag ids of ALL its words or None)."""
        from ..data.batching import UNLABELLED
        from ..data.tokenized import Split

        ids = {label: index for index, label in enumerate(labels or ())}
        rows = _rows(tokenizer, [example.tokens for example in examples], max_length)
        targets, sources = [], []
        for example, (row, first) in zip(examples, rows):
            tags = _tag_ids(example, ids) if labels is not None else None
            sources.append((first, tags))
            if tags is not None:
                targets.append(np.full(len(row), UNLABELLED, np.int64))
                targets[-1][first] = tags[: len(first)]
        return Split(
            [np.array(row, np.int32) for row, _ in rows],
            [np.zeros(len(row), np.int8) for row, _ in rows],
            None if labels is None else targets,
            [example.text for example in examples],
            None,
            sum(len(first) < len(example.tokens) for example, (_, first) in zip(examples, rows)),
            name,
            sources,
        )

    def loss(self, logits, labels):
        """Cross-entropy, mean over the batch's words."""
        import paddle.nn.functional as F

        return F.cross_entropy(logits, labels)  # it leaves UNLABELLED out

    def choices(self, logits, real):
        """Every token that is no padding."""
        import paddle

        return logits[paddle.cast(real, "bool")]

    def scores(self, logits, split, labels):
        found = [_with_cut(tags, len(wanted)) for tags, (_, wanted) in zip(_tags(logits, split), split.sources)]
        names = np.array(labels)
        outside = labels.index(OUTSIDE)
        found = [np.where(row < 0, outside, row) for row in found]
        wanted = [wanted for _, wanted in split.sources]
        equal = np.concatenate(found) == np.concatenate(wanted)
        return {
            **entity_scores([names[row].tolist() for row in found], [names[row].tolist() for row in wanted]),
            "accuracy": float(equal.mean()),
        }

    def agreement(self, found, reference, split):
        """Share of words with the same tag."""
        pairs = zip(_tags(found, split), _tags(reference, split))
        return float(np.mean(np.concatenate([own == other for own, other in pairs])))

    def encode(self, tokenizer, texts, pairs, max_length):
        """Words are what white space separates, less the punctuation at their ends; an ideograph is one."""
        from ..tokenizer import check_text

        check_text(texts, "texts")
        spans = [words_in(text) for text in texts]
        rows = _rows(tokenizer, [[text[a:b] for a, b in own] for text, own in zip(texts, spans)], max_length)
        return [Words(text, own, row, first) for text, own, (row, first) in zip(texts, spans, rows)]

    def lacks_text(self, row):
        return not row.spans

    def answers(self, logits, rows, labels):
        ends = np.cumsum([len(row.input_ids) for row in rows])
        return [self._entities(own, row, labels) for own, row in zip(np.split(logits, ends[:-1]), rows)]

    def _entities(self, logits: np.ndarray, row: Words, labels: Sequence[str]) -> Entities:
        chances = softmax(logits[row.first])
        tags = [labels[index] for index in chances.argmax(axis=1)]
        entities = []
        for label, begin, end in entities_of(tags):
            start, stop = row.spans[begin][0], row.spans[end - 1][1]
            score = float(chances[begin:end].max(axis=1).min())
            entities.append(Entity(label, start, stop, row.text[start:stop], score))
        return Entities(entities, logits.tolist())


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in a row's tags.

    As conlleval and seqeval read IOB2: an I- after O, or after another type, begins an entity too.
    """
    found: list[tuple[str, int, int]] = []
    open_type, begin = "", 0
    for index, tag in enumerate([*tags, OUTSIDE]):
        here = tag[2:]
        goes_on = tag.startswith("I-") and here == open_type
        if open_type and not goes_on:
            found.append((open_type, begin, index))
        if not goes_on:
            open_type, begin = here, index
    return found


def entity_scores(found: Iterable[Sequence[str]], wanted: Iterable[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of the entities of all rows together; one counts if its type and both its ends are right."""
    right = of_found = of_wanted = 0
    for own, other in zip(found, wanted):
        own_entities, other_entities = set(entities_of(own)), set(entities_of(other))
        right += len(own_entities & other_entities)
        of_found += len(own_entities)
        of_wanted += len(other_entities)
    return {
        "f1": 2 * right / max(of_found + of_wanted, 1),
        "precision": right / max(of_found, 1),
        "recall": right / max(of_wanted, 1),
    }


def words_in(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are: split at white space, punctuation at a word's ends apart, each ideograph and kana alone."""
    spans = []
    for match in _WORD.finditer(text):
        begin, end = match.span()
        inner_begin, inner_end = begin, end
        while inner_begin < inner_end and _is_punctuation(text[inner_begin]):
            inner_begin += 1
        while inner_end > inner_begin and _is_punctuation(text[inner_end - 1]):
            inner_end -= 1
        spans += [(place, place + 1) for place in range(begin, inner_begin)]
        spans += [(inner_begin, inner_end)] if inner_begin < inner_end else []
        spans += [(place, place + 1) for place in range(inner_end, end)]
    return spans


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] == "P"


def _rows(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], max_length: int
) -> list[tuple[list[int], np.ndarray]]:
    """Ids of each sentence, cut to `max_length`, and the positions of its words' first tokens, as far as they are kept.

    A word without a token, as one of control characters, is [UNK].
    """
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(sentences)))  # some tenth of all words
    pieces = {word: found or [tokenizer.unk_token_id] for word, found in zip(distinct, tokenizer.ids(distinct))}
    rows = []
    for words in sentences:
        own = [pieces[word] for word in words]
        first = np.cumsum([1, *map(len, own)])[:-1]
        kept = list(itertools.chain.from_iterable(own))[: max_length - 2]
        row = [tokenizer.cls_token_id, *kept, tokenizer.sep_token_id]
        rows.append((row, first[first <= len(kept)]))
    return rows


def _tag_ids(example: Any, ids: dict[str, int]) -> np.ndarray:
    for number, tag in enumerate(example.tags or (), 1):
        if tag not in ids:
            raise UserError(f"{example.where}: tag {tag!r} of word {number} is not one of {listed(list(ids))}")
    if example.tags is None:
        raise UserError(f"{example.where}: no tags found where one a word is needed")
    return np.array([ids[tag] for tag in example.tags], np.int64)


def _tags(logits: np.ndarray, split: Any) -> list[np.ndarray]:
    """Of each row, the likeliest tag of each word that was not cut."""
    ends = np.cumsum([len(ids) for ids in split.input_ids])
    return [own[first].argmax(axis=1) for own, (first, _) in zip(np.split(logits, ends[:-1]), split.sources)]


def _with_cut(tags: np.ndarray, words: int) -> np.ndarray:
    """With -1 for words that were cut off, which are never found."""
    return np.concatenate([tags, np.full(words - len(tags), -1, tags.dtype)])
