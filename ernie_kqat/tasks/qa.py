"""The answer to a question as a span of its context: SQuAD, CMRC 2018, DRCD.

A context longer than the model takes is read in overlapping windows (BERT, arXiv 1810.04805, run_squad.py). Differs from it:
`doc_stride` windows compete by the sum of their two logits alone, without its rule of maximal context; the question is cut to
half of the row.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from . import Task
from .classification import softmax

if TYPE_CHECKING:
    from ..tokenizer import Located, Tokenizer

MAX_ANSWER = 30  # tokens, as in BERT's run_squad.py
_CJK = re.compile(r"([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


@dataclass(frozen=True)
class Window:
    """One row: [CLS] question [SEP] part of the context [SEP]; token `offset` is the context's token `begin`, of `count`."""

    input_ids: list[int]
    token_type_ids: list[int]
    offset: int
    begin: int
    count: int


@dataclass(frozen=True)
class Asked:
    """A question about a context as the model reads it."""

    context: str
    located: Located  # the context's tokens
    parts: list[Window]
    question_tokens: int
    cut: bool  # the question

    @property
    def windows(self) -> list[tuple[list[int], list[int]]]:
        """(input_ids, token_type_ids) of each row."""
        return [(part.input_ids, part.token_type_ids) for part in self.parts]

    def text(self, first: int, last: int) -> str:
        """The context from one of its tokens to another."""
        return self.context[self.located.starts[first] : self.located.ends[last]]


@dataclass(frozen=True)
class Answer:
    """context[start:end], or none (empty, 0, 0); score: the probability of its start times its end's, within its window."""

    answer: str
    start: int
    end: int
    score: float
    logits: list[list[float]]  # of its window, [tokens, 2]

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"answer": self.answer, "start": self.start, "end": self.end, "score": round(self.score, 6)}


@dataclass(frozen=True)
class _Found:
    """The best span: its window, and its tokens in the context; `window` alone where there is no answer."""

    window: int
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class QuestionAnswering(Task):
    doc_stride: int = 64
    unanswerable: bool = False

    model = "ErnieForQuestionAnswering"
    fixed = ("start", "end")
    metrics = ("f1", "exact_match")
    suffixes = (".json",)
    per_token = True
    named = False

    def read(self, path, text, text_pair, label, require_label):
        from ..data.squad import QuestionReader

        return QuestionReader(path, require_label, self.unanswerable)

    def split(self, examples, labels, tokenizer, max_length, name, cache_dir=None, numbers_are_ids=True):
        """A row a window; targets: the answer's first and last token in it, int64 [rows, 2], (0, 0) where it is not in it.

        `sources`: for each question (Asked, its first row, its right answers or None).
        """
        from ..data.tokenized import Split

        texts = [example.text for example in examples], [example.text_pair for example in examples]
        asked = self.encode(tokenizer, *texts, max_length)
        ids: list[np.ndarray] = []
        types, sources, targets, of_rows = [], [], [], []
        for example, own in zip(examples, asked):
            if self.lacks_text(own):
                raise UserError(f"{example.where}: a question or a context without a token")
            sources.append((own, len(ids), None if example.answers is None else [text for text, _ in example.answers]))
            span = None if labels is None else _token_span(example, own.located)
            for part in own.parts:
                ids.append(np.array(part.input_ids, np.int32))
                types.append(np.array(part.token_type_ids, np.int8))
                targets.append(_in_window(span, part))
                of_rows.append(example)
        return Split(
            ids,
            types,
            None if labels is None else np.array(targets, np.int64),
            [example.text for example in of_rows],
            [example.text_pair for example in of_rows],
            sum(own.cut for own in asked),
            name,
            sources,
        )

    def loss(self, logits, labels):
        """Cross-entropy over the row's tokens, mean of start and end."""
        import paddle.nn.functional as F

        return F.cross_entropy(logits.transpose([0, 2, 1]).flatten(0, 1), labels.flatten())

    def choices(self, logits, real):
        """Which token is the start and which the end, [rows x 2, tokens]; padding is none."""
        hidden = (1 - real).unsqueeze(-1) * -1e4
        return (logits + hidden).transpose([0, 2, 1]).flatten(0, 1)

    def scores(self, logits, split, labels):
        wanted = [answers or [""] for _, _, answers in split.sources]
        answers = [_text(own, found) for (own, _, _), found in zip(split.sources, self._all(logits, split))]
        return {
            "f1": float(np.mean([max(overlap(own, one) for one in right) for own, right in zip(answers, wanted)])),
            "exact_match": float(
                np.mean([any(normal(own) == normal(one) for one in right) for own, right in zip(answers, wanted)])
            ),
        }

    def agreement(self, found, reference, split):
        """Share of questions with the same answer, character for character."""
        pairs = zip(split.sources, self._all(found, split), self._all(reference, split))
        return float(np.mean([_place(asked, own) == _place(asked, other) for (asked, _, _), own, other in pairs]))

    def encode(self, tokenizer, texts, pairs, max_length):
        from ..tokenizer import check_text

        check_text(texts, "texts")
        check_text(pairs or (), "pairs")
        if len(pairs or ()) != len(texts):
            raise UserError(f"{len(texts)} questions with {len(pairs or ())} contexts; each question needs one")
        contexts: dict[str, Located] = {}  # many questions share one
        rows = []
        for question, context in zip(tokenizer.ids(texts), pairs or ()):
            located = contexts.get(context) or tokenizer.located(context)
            contexts = {context: located}
            rows.append(self._asked(question, context, located, tokenizer, max_length))
        return rows

    def _asked(
        self, question: list[int], context: str, located: Located, tokenizer: Tokenizer, max_length: int
    ) -> Asked:
        kept = question[: (max_length - 3) // 2]
        head = [tokenizer.cls_token_id, *kept, tokenizer.sep_token_id]
        room = max_length - len(head) - 1
        parts = []
        begin = 0
        while True:
            body = located.ids[begin : begin + room]
            types = [0] * len(head) + [1] * (len(body) + 1)
            parts.append(Window([*head, *body, tokenizer.sep_token_id], types, len(head), begin, len(body)))
            if begin + room >= len(located.ids):
                return Asked(context, located, parts, len(kept), len(kept) < len(question))
            begin += min(self.doc_stride, room)

    def lacks_text(self, row):
        return row.question_tokens == 0 or not row.located.ids

    def answers(self, logits, rows, labels):
        found, begin = [], 0
        for row in rows:
            ends = begin + np.cumsum([len(part.input_ids) for part in row.parts])
            of_windows = np.split(logits[begin : ends[-1]], ends[:-1] - begin)
            begin = ends[-1]
            best = self._best(of_windows, row)
            own = of_windows[best.window]
            chances = softmax(own.T)
            start, end = _place(row, best)
            tokens = (0, 0) if best.first is None else _tokens(row.parts[best.window], best)
            score = float(chances[0, tokens[0]] * chances[1, tokens[1]])
            found.append(Answer(_text(row, best), start, end, score, own.tolist()))
        return found

    def _all(self, logits: np.ndarray, split: Any) -> list[_Found]:
        ends = np.cumsum([len(ids) for ids in split.input_ids])
        rows = np.split(logits, ends[:-1])
        return [self._best(rows[begin : begin + len(asked.parts)], asked) for asked, begin, _ in split.sources]

    def _best(self, of_windows: Sequence[np.ndarray], asked: Asked) -> _Found:
        """The span with the largest start + end; none, where that is allowed and [CLS] has more in every window."""
        best, best_score, none, none_window = None, -np.inf, np.inf, 0
        for window, (logits, part) in enumerate(zip(of_windows, asked.parts)):
            first, last, score = best_span(logits[part.offset : part.offset + part.count])
            if score > best_score:
                best, best_score = _Found(window, part.begin + first, part.begin + last), score
            if float(logits[0].sum()) < none:
                none, none_window = float(logits[0].sum()), window
        if best is None or (self.unanswerable and none > best_score):
            return _Found(none_window)
        return best


def best_span(logits: np.ndarray) -> tuple[int, int, float]:
    """(first, last, start + end logit) of the best span of at most MAX_ANSWER tokens; logits [tokens, 2]."""
    start, end = logits[:, 0].astype(np.float64), logits[:, 1].astype(np.float64)
    sums = start[:, None] + end[None, :]
    places = np.arange(len(start))
    width = places[None, :] - places[:, None]
    sums[(width < 0) | (width >= MAX_ANSWER)] = -np.inf
    first, last = np.unravel_index(sums.argmax(), sums.shape)
    return int(first), int(last), float(sums[first, last])


def normal(text: str) -> str:
    """As SQuAD's evaluation script compares answers: lower case, no punctuation, no articles, single blanks."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(found: str, wanted: str) -> float:
    """SQuAD's F1 of two answers' words; an ideograph counts as a word, as in CMRC 2018."""
    own, other = (_CJK.sub(r" \1 ", normal(text)).split() for text in (found, wanted))
    common = sum((collections.Counter(own) & collections.Counter(other)).values())
    if not own or not other:
        return float(own == other)
    return 2 * common / (len(own) + len(other))


def _token_span(example: Any, located: Located) -> tuple[int, int] | None:
    """First and last token of the first right answer; None where there is none."""
    if not example.answers:
        return None
    text, begin = example.answers[0]
    within = [
        index
        for index, (start, end) in enumerate(zip(located.starts, located.ends))
        if end > begin and start < begin + len(text)
    ]
    if not within:
        raise UserError(f"{example.where}: answer {text!r} has no token")
    return within[0], within[-1]


def _in_window(span: tuple[int, int] | None, part: Window) -> tuple[int, int]:
    if span is None or span[0] < part.begin or span[1] >= part.begin + part.count:
        return 0, 0  # [CLS]
    return span[0] - part.begin + part.offset, span[1] - part.begin + part.offset


def _tokens(part: Window, found: _Found) -> tuple[int, int]:
    return found.first - part.begin + part.offset, found.last - part.begin + part.offset  # type: ignore[operator]


def _place(asked: Asked, found: _Found) -> tuple[int, int]:
    if found.first is None or found.last is None:
        return 0, 0
    return asked.located.starts[found.first], asked.located.ends[found.last]


def _text(asked: Asked, found: _Found) -> str:
    start, end = _place(asked, found)
    return asked.context[start:end]
