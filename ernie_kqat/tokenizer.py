"""Text -> token ids, equal id for id to PaddleNLP's ErnieTokenizer but faster, and without loading Paddle or PaddleNLP.

`WordPiece` cleans and spaces the text with the interpreter's own Unicode tables, as PaddleNLP does, and leaves only the
matching of word pieces to the `tokenizers` library. That library's own BERT settings differ from PaddleNLP: they do not
split around symbols such as emoji and degree signs, and their Unicode tables are older.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("auto", "fast", "paddlenlp")
MIN_LENGTH = 4  # [CLS] a [SEP] b [SEP] would have no room for text at 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """One row: [CLS] a [SEP] (b [SEP]); segment 0 up to the first [SEP], segment 1 after it."""

    input_ids: list[int]
    token_type_ids: list[int]
    truncated: bool

    @property
    def windows(self) -> list[tuple[list[int], list[int]]]:
        """(input_ids, token_type_ids) of each row for the model that it is: of this one."""
        return [(self.input_ids, self.token_type_ids)]


@dataclass(frozen=True)
class Located:
    """A text's token ids without [CLS] and [SEP], and where each stands: text[starts[i]:ends[i]]."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Tokenizer(Protocol):
    """What training and serving need of a tokenizer; `fingerprint` changes whenever the ids it gives could."""

    kind: str
    pad_token_id: int
    vocab_size: int
    fingerprint: str
    cls_token_id: int
    sep_token_id: int
    unk_token_id: int

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> list[Encoded]: ...

    def ids(self, texts: Sequence[str]) -> list[list[int]]: ...

    def located(self, text: str) -> Located: ...


class WordPiece:
    """BERT's WordPiece over a vocab.txt, as PaddleNLP 2.8.1 computes it. `vocab_size` is the largest id plus one."""

    kind = "fast"

    def __init__(self, vocab: dict[str, int], do_lower_case: bool = True):
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Engine
        from tokenizers.models import WordPiece as Model
        from tokenizers.pre_tokenizers import WhitespaceSplit

        self.pad_token_id = vocab[PAD]
        self.vocab_size = max(vocab.values()) + 1
        self.do_lower_case = do_lower_case
        self.fingerprint = _fingerprint(self.kind, vocab, do_lower_case)
        self.cls_token_id, self.sep_token_id, self.unk_token_id = vocab[CLS], vocab[SEP], vocab[UNK]
        self._engine = Engine(Model(vocab, unk_token=UNK, max_input_chars_per_word=100))
        self._engine.pre_tokenizer = WhitespaceSplit()
        self._engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
        self._clean = _Table(_lower_and_clean if do_lower_case else _clean)
        self._split = _Table(_split_unaccented if do_lower_case else _split)
        self._letters = _Table(self._letter)

    @classmethod
    def from_folder(cls, folder: str | Path, do_lower_case: bool | None = None) -> WordPiece:
        """Read `folder`/vocab.txt. `do_lower_case` defaults to tokenizer_config.json's, else True.

        Raises UserError where there is no vocab.txt, where it lacks a special token, or where the folder asks for
        tokens or a vocabulary (sentencepiece) that are not plain WordPiece.
        """
        settings = _settings(folder)
        if settings.beyond_wordpiece:
            raise UserError(f"{folder}: {settings.beyond_wordpiece}; only PaddleNLP's tokenizer can do that")
        return cls(_read_vocab(folder), settings.do_lower_case if do_lower_case is None else do_lower_case)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Encoded]:
        """Token ids of each text, or text and pair, at most `max_length`; the longer of the two is cut at its end."""
        return _encode(self.ids, self.cls_token_id, self.sep_token_id, texts, pairs, max_length)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without [CLS] and [SEP]."""
        words = [self._words(text) for text in texts]
        return [row.ids for row in self._engine.encode_batch(words, add_special_tokens=False)]

    def located(self, text: str) -> Located:
        """The ids of `ids`, and their places in the text; an accent that follows a token's last character belongs to it."""
        written = [
            self._letters[ord(char)] for char in text
        ]  # what each character becomes, before words and signs part
        special = {}
        for match in _SPECIAL.finditer(text):
            written[slice(*match.span())] = match[0]
            special.update(dict.fromkeys(range(*match.span())))
            special.update({match.start(): " [", match.end() - 1: "] "})
        letters = [(letter, place) for place, found in enumerate(written) for letter in found]
        if self.do_lower_case:
            letters = _in_canonical_order(letters)
        found, source = "", []
        for letter, place in letters:
            piece = (special[place] or letter) if place in special else letter.translate(self._split)
            found += piece
            source += [place] * len(piece)
        encoded = self._engine.encode(found, add_special_tokens=False)
        starts = [min(source[begin:end]) for begin, end in encoded.offsets]
        ends = [max(source[begin:end]) + 1 for begin, end in encoded.offsets]
        silent = set(range(len(text))).difference(source)
        for index, end in enumerate(ends):
            while end in silent and unicodedata.category(text[end]) == "Mn":
                end += 1
            ends[index] = end
        return Located(encoded.ids, starts, ends)

    def _words(self, text: str) -> str:
        """Words and signs with blanks between them; a literal "[SEP]" in the text is that token, as in PaddleNLP."""
        if "[" not in text:
            return self._space(text)
        parts = _SPECIAL.split(text)
        return " ".join(part if index % 2 else self._space(part) for index, part in enumerate(parts))

    def _space(self, text: str) -> str:
        return self._letter(text).translate(self._split)

    def _letter(self, text: str) -> str:
        text = text.translate(self._clean)
        return unicodedata.normalize("NFD", text) if self.do_lower_case else text


class PaddleNLPTokenizer:
    """PaddleNLP's ErnieTokenizer behind the same interface: slower, and needs PaddleNLP installed."""

    kind = "paddlenlp"

    def __init__(self, folder: str | Path, do_lower_case: bool | None = None):
        settings = _settings(folder)
        vocab = _read_vocab(folder)  # refuses missing special tokens; PaddleNLP gives them ids beyond the embedding
        do_lower_case = settings.do_lower_case if do_lower_case is None else do_lower_case
        from paddlenlp.transformers import ErnieTokenizer

        # Absolute, because a relative folder called `ernie-1.0` would be taken for that model's name.
        self._tokenizer = ErnieTokenizer.from_pretrained(str(Path(folder).resolve()), do_lower_case=do_lower_case)
        self.pad_token_id = self._tokenizer.pad_token_id
        self.cls_token_id, self.sep_token_id = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        self.unk_token_id = self._tokenizer.unk_token_id
        self._folder = folder
        self.vocab_size = len(self._tokenizer)
        self.fingerprint = _fingerprint(self.kind, vocab, do_lower_case, self._tokenizer.get_added_vocab())

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> list[Encoded]:
        """As `WordPiece.encode`."""
        return _encode(self.ids, self.cls_token_id, self.sep_token_id, texts, pairs, max_length)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As `WordPiece.ids`."""
        tokenizer = self._tokenizer
        return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]

    def located(self, text: str) -> Located:
        """UserError: this tokenizer does not say where in a text its tokens stand."""
        raise UserError(f"{self._folder}: only a plain WordPiece vocabulary says where in a text an answer stands")


def load_tokenizer(
    folder: str | Path, kind: str = "auto", samples: Sequence[str] = ()
) -> WordPiece | PaddleNLPTokenizer:
    """The tokenizer of a model folder.

    `kind` is "fast" (`WordPiece`), "paddlenlp" or "auto": fast unless the folder needs more than WordPiece or any of
    `samples` gets other ids than from PaddleNLP, which the log then says. Without `samples` PaddleNLP is not loaded.
    Raises UserError as `WordPiece.from_folder` does.
    """
    if kind not in KINDS:
        raise UserError(f"tokenizer kind: {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "paddlenlp":
        return PaddleNLPTokenizer(folder)
    beyond = _settings(folder).beyond_wordpiece
    if kind == "auto" and beyond:
        log.warning("%s: %s; PaddleNLP's tokenizer is used, which is slower", folder, beyond)
        return PaddleNLPTokenizer(folder)
    fast = WordPiece.from_folder(folder)
    if kind == "fast" or not samples:
        return fast
    reference = PaddleNLPTokenizer(folder)
    for text, ours, theirs in zip(samples, fast.ids(samples), reference.ids(samples)):
        if ours != theirs:
            log.warning("%s: %r has other ids in PaddleNLP's tokenizer, which is used and is slower", folder, text)
            return reference
    return fast


def lacks_text(row: Encoded) -> bool:
    """Whether the text, or the second text of a pair, has no token: only [CLS] [SEP], or only [SEP], is left of it."""
    second = sum(row.token_type_ids)
    return len(row.input_ids) - second <= 2 or second == 1


def _encode(
    ids_of: Callable[[Sequence[str]], list[list[int]]],
    cls: int,
    sep: int,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
) -> list[Encoded]:
    if max_length < MIN_LENGTH:
        raise UserError(f"max_length: {max_length} is under {MIN_LENGTH} tokens")
    check_text(texts, "texts")
    if pairs is None:
        return [_join(ids, None, cls, sep, max_length) for ids in ids_of(texts)]
    check_text(pairs, "pairs")
    if len(pairs) != len(texts):
        raise UserError(f"{len(texts)} texts with {len(pairs)} pairs; each text needs one")
    return [_join(a, b, cls, sep, max_length) for a, b in zip(ids_of(texts), ids_of(pairs))]


def check_text(texts: Sequence[str], name: str) -> None:
    """UserError for a text in place of a list of them, and for what is no text in it."""
    if isinstance(texts, str):
        raise UserError(f"{name}: {texts[:40]!r} is one text; a list of texts is needed")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name}[{index}]: {repr(text)[:40]} is not text")


def _join(first: list[int], second: list[int] | None, cls: int, sep: int, max_length: int) -> Encoded:
    """Cut and join: tokens go one by one from the end of the longer sequence, of the second where both are as long."""
    if second is None:
        kept = first[: max_length - 2]
        ids = [cls, *kept, sep]
        return Encoded(ids, [0] * len(ids), len(kept) < len(first))
    room = max_length - 3
    kept_second = second[: max(room - len(first), room // 2)]
    kept_first = first[: room - len(kept_second)]
    ids = [cls, *kept_first, sep, *kept_second, sep]
    types = [0] * (len(kept_first) + 2) + [1] * (len(kept_second) + 1)
    return Encoded(ids, types, len(kept_first) + len(kept_second) < len(first) + len(second))


_SPECIAL = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")

# What BERT calls a Chinese character: CJK ideographs, not kana and not Hangul.
_CJK = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
# Letters and numbers that PaddleNLP counts as symbols, besides Unicode's own.
_SYMBOLS = frozenset("\u00b2\u00b5\u00ba\u00d8\u014b\u01b1\u3007")


class _Table(dict):
    """A `str.translate` table that computes each character's replacement when it is first met."""

    def __init__(self, replace: Callable[[str], str]):
        super().__init__()
        self._replace = replace

    def __missing__(self, codepoint: int) -> str:
        text = self[codepoint] = self._replace(chr(codepoint))
        return text


def _clean(char: str) -> str:
    """Blank for white space, nothing for control, format and unassigned characters, room around Chinese ones."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category[0] == "Z":
        return " "
    if category[0] == "C" or char == "\ufffd":
        return ""
    return f" {char} " if any(low <= ord(char) <= high for low, high in _CJK) else char


def _lower_and_clean(char: str) -> str:
    return "".join(_clean(lower) for lower in char.lower())


def _in_canonical_order(letters: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """NFD letters with their places, as NFD orders the marks of a whole text."""
    ordered: list[tuple[str, int]] = []
    for _, run in itertools.groupby(letters, lambda letter: unicodedata.combining(letter[0]) > 0):
        ordered += sorted(run, key=lambda letter: unicodedata.combining(letter[0]))  # what is no mark has 0, and stays
    return ordered


def _split(char: str) -> str:
    """Room around punctuation and symbols."""
    return f" {char} " if unicodedata.category(char)[0] in "PS" or char in _SYMBOLS else char


def _split_unaccented(char: str) -> str:
    return "" if unicodedata.category(char) == "Mn" else _split(char)


@dataclass(frozen=True)
class _Settings:
    do_lower_case: bool
    beyond_wordpiece: str  # why `WordPiece` cannot serve the folder; empty where it can


def _settings(folder: str | Path) -> _Settings:
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    sentencepiece = sorted(path.name for path in folder.glob("*.model"))
    if sentencepiece:
        raise UserError(f"{folder}: {sentencepiece[0]}, a sentencepiece model, found where WordPiece is needed")
    names = {**config, **_read_json(folder / "special_tokens_map.json")}
    for token in SPECIAL_TOKENS:
        key = token.strip("[]").lower() + "_token"
        name = names.get(key) or token
        name = name.get("content") if isinstance(name, dict) else name
        if name != token:
            raise UserError(f"{folder}: {key} is {name!r}; {token!r} is needed")
    added = {*_read_json(folder / "added_tokens.json"), *(names.get("additional_special_tokens") or ())}
    beyond = f"it adds tokens to vocab.txt ({', '.join(sorted(map(str, added))[:3])})" if added else ""
    return _Settings(bool(config.get("do_lower_case", True)), beyond)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {type(value).__name__} found where an object is needed")
    return value


def _read_vocab(folder: str | Path) -> dict[str, int]:
    """Token -> line number from 0; of a token given twice the last counts, as in PaddleNLP."""
    path = Path(folder) / "vocab.txt"
    if not path.is_file():
        raise UserError(f"{folder}: no vocab.txt (a WordPiece vocabulary, one token a line)")
    try:
        with open(path, encoding="utf-8") as file:
            vocab = {line.rstrip("\n"): index for index, line in enumerate(file)}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} not found among its {len(vocab)} tokens")
    return vocab


def _fingerprint(kind: str, vocab: dict[str, int], do_lower_case: bool, added: Iterable[str] = ()) -> str:
    content = [kind, do_lower_case, unicodedata.unidata_version, list(vocab.items()), sorted(added)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
