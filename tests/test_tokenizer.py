"""The fast tokenizer gives PaddleNLP's ids, on real text and on hostile text; folders it cannot serve are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from tiny_ernie import tiny_vocabulary

from ernie_kqat import UserError
from ernie_kqat.tokenizer import PaddleNLPTokenizer, WordPiece, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Places where WordPiece implementations part: markers, case, accents, symbols, CJK, invisible characters, long words.
NASTY = [
    "[SEP] [CLS] [MASK] [PAD] [UNK] [sep] [SEP SEP] [[SEP]] [SEP[SEP] x[MASK]y a[SEP]\n[CLS]b",
    "naïve NAÏVE cafe\u0301 e\u0323\u0301 \u0301 \u302e \U0001d16d\U0001d165 \u0301\u0301a ﬁ Å \u212b \u2126 ẞ ß",
    "Σας ΣΑΣ İstanbul ıI Ǆ ǅ Ⅳ ª º ² ½ 〇 µ Ø ŋ Ʊ",
    "😀 🥲 👨‍👩‍👧 🇨🇳 ™ € ° 5°C a+b=c ~~ … — “x” don't 3.14",
    "中国abc 中 国 﨑 \U00020000 か か\u3099 カ 한 \u1112\u1161\u11ab 。，！",
    "a\u200bb a\u200db \ufeffa a\u00adb a\u2028b a\u2029b a\x85b a\x0bb a\x1cb a\x00b a\tb a\r\nb a\u3000b a\xa0b",
    "\ufffd \ud800 \U0010ffff \u0378",
    "x" * 100 + " " + "x" * 101,
    "",
    " ",
    "\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A vocabulary in which most of the strings above are not [UNK], so that differences show."""
    characters = sorted({lower for text in NASTY for char in text for lower in (char, *char.lower()) if char > " "})
    pieces = [*tiny_vocabulary(), "naive", "xx", "##xx", "##x" * 3, "abc"]
    pieces += [piece for char in characters for piece in (char, "##" + char) if unicodedata.category(char) != "Cs"]
    folder = tmp_path_factory.mktemp("vocab")
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in dict.fromkeys(pieces)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def both(folder, request) -> tuple[WordPiece, PaddleNLPTokenizer]:
    return WordPiece.from_folder(folder, request.param), PaddleNLPTokenizer(folder, request.param)


def _ids(tokenizer, texts):
    return [row.input_ids for row in tokenizer.encode(texts, None, 512)]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_text_has_paddlenlps_ids(both, text):
    fast, reference = both
    assert _ids(fast, [text]) == _ids(reference, [text])


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_tokens_have_their_places_in_the_text(both, text):
    fast, reference = both
    found = fast.located(text)
    assert found.ids == fast.ids([text])[0]
    assert all(0 <= start < end <= len(text) for start, end in zip(found.starts, found.ends))
    assert found.starts == sorted(found.starts) or "\U0001d165" in text  # marks that change places
    with pytest.raises(UserError, match="only a plain WordPiece vocabulary says where in a text an answer stands"):
        reference.located(text)


def test_places_by_hand(folder):
    for lower, pieces in ((True, ["NaI\u0308ve", "[SEP]", "abc", ",", "中", "国"]), (False, ["x", "[UNK]"])):
        text = "NaI\u0308ve\u200b [SEP]Abc,中国" if lower else "x\u200b[UNK]"
        found = WordPiece.from_folder(folder, lower).located(text)
        assert [text[a:b].replace("Abc", "abc") for a, b in zip(found.starts, found.ends)] == pieces
    found = WordPiece.from_folder(folder, True).located("x e\u0301")
    assert (found.starts, found.ends) == ([0, 2], [1, 4])  # an accent belongs to its letter


def test_random_text_has_paddlenlps_ids(both):
    fast, reference = both
    rng = random.Random(0)
    pool = [char for text in NASTY for char in text] + ["[SEP]", "[MASK]", " ", " ", "the", "movie"]
    other = [lambda: rng.randrange(0x250), lambda: rng.randrange(0x3100), lambda: rng.randrange(0x110000)]
    texts = [
        "".join(rng.choice(pool) if rng.random() < 0.8 else chr(rng.choice(other)()) for _ in range(rng.randrange(30)))
        for _ in range(4000)
    ]
    different = [ascii(text) for text, a, b in zip(texts, _ids(fast, texts), _ids(reference, texts)) if a != b]
    assert different == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # PaddleNLP's, about its own arguments
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_cutting_and_segments_are_paddlenlps(folder, both):
    """Against PaddleNLP's own call, which cuts token by token."""
    fast, reference = both
    rng = random.Random(1)
    for _ in range(1500):
        a, b = (" ".join(rng.choices(["good", "film", "xxx"], k=rng.randrange(25))) for _ in range(2))
        pair = [b] if rng.random() < 0.8 else None
        length = rng.randrange(4, 40)
        expected = reference._tokenizer(a, pair and b, max_seq_len=length)
        whole = reference._tokenizer(a, pair and b)
        for tokenizer in (fast, reference):
            (row,) = tokenizer.encode([a], pair, length)
            assert row.input_ids == expected["input_ids"]
            assert row.token_type_ids == expected["token_type_ids"]
            assert row.truncated == (len(whole["input_ids"]) > length)


@pytest.mark.parametrize(
    ("file", "columns"), [("SST-2/dev.tsv", [0]), ("MRPC/dev.tsv", [3, 4]), ("ChnSentiCorp/dev.tsv", [0])]
)
def test_real_text_has_paddlenlps_ids(file, columns):
    vocabulary = SHARED / "models" / "minilm-l6-sst2-fp32"
    if not vocabulary.is_dir():
        pytest.skip("no ../shared")
    lines = (SHARED / "data" / file).read_text(encoding="utf-8-sig").splitlines()
    texts = [line.split("\t")[column] for line in lines for column in columns]
    assert len(texts) > 800
    assert _ids(load_tokenizer(vocabulary, "fast"), texts) == _ids(load_tokenizer(vocabulary, "paddlenlp"), texts)


def test_encode_by_hand(folder):
    tokenizer = WordPiece.from_folder(folder)
    vocab = {token: index for index, token in enumerate((folder / "vocab.txt").read_text("utf-8").split("\n"))}
    (row,) = tokenizer.encode(["Good films!"], ["naïve"], 128)
    tokens = ["[CLS]", "good", "film", "##s", "!", "[SEP]", "naive", "[SEP]"]
    assert row.input_ids == [vocab[token] for token in tokens]
    assert row.token_type_ids == [0, 0, 0, 0, 0, 0, 1, 1]
    assert not row.truncated
    assert tokenizer.pad_token_id == vocab["[PAD]"]
    assert tokenizer.vocab_size == len(vocab) - 1  # the text after the last newline


def test_auto_takes_fast_where_equal_and_paddlenlp_where_not(folder, monkeypatch):
    assert load_tokenizer(folder, samples=NASTY).kind == "fast"
    monkeypatch.setattr("ernie_kqat.tokenizer._SYMBOLS", frozenset())  # now ² and 〇 are not split off
    assert load_tokenizer(folder, samples=["plain"]).kind == "fast"
    assert load_tokenizer(folder, samples=["plain", "x²x"]).kind == "paddlenlp"


def test_serving_side_loads_no_paddle(folder):
    code = (
        f"import sys; from ernie_kqat.tokenizer import load_tokenizer; t = load_tokenizer({str(folder)!r});"
        "t.encode(['good'], None, 8); print([m for m in ('paddle', 'paddlenlp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_case_comes_from_the_folder(folder, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    lower = WordPiece.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = WordPiece.from_folder(tmp_path)
    assert _ids(lower, ["GOOD"]) == _ids(lower, ["good"])
    assert _ids(cased, ["GOOD"]) != _ids(cased, ["good"])
    assert _ids(cased, ["GOOD"]) == _ids(PaddleNLPTokenizer(tmp_path), ["GOOD"])
    assert lower.fingerprint != cased.fingerprint


def test_added_tokens_need_paddlenlp(folder, tmp_path):
    vocab = (folder / "vocab.txt").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(vocab)
    size = len(vocab.splitlines())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<aspect>": size}))
    with pytest.raises(UserError, match="<aspect>"):
        load_tokenizer(tmp_path, "fast")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "paddlenlp"
    assert _ids(tokenizer, ["<aspect>"])[0][1] == size
    assert tokenizer.vocab_size == size + 1


@pytest.mark.parametrize("kind", ["auto", "fast", "paddlenlp"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no vocab.txt"),
        ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\na\n"}, r"vocab.txt: \[SEP\], \[MASK\] not found"),
        ({"vocab.txt": b"[PAD]\n\xff\n"}, "vocab.txt: not UTF-8"),
        ({"spm_cased_simp_sampled.model": "", "vocab.txt": "a\n"}, "sentencepiece"),
        ({"tokenizer_config.json": '{"unk_token": "<unk>"}'}, "unk_token is '<unk>'"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: list found"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, message, kind):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path, kind)


def test_input_that_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError, match="max_length: 3"):
        tokenizer.encode(["a"], None, 3)
    with pytest.raises(UserError, match="one text"):
        tokenizer.encode("a", None, 8)
    with pytest.raises(UserError, match=r"texts\[1\]: None"):
        tokenizer.encode(["a", None], None, 8)
    with pytest.raises(UserError, match="2 texts with 1 pairs"):
        tokenizer.encode(["a", "b"], ["c"], 8)
    with pytest.raises(UserError, match="kind: 'slow'"):
        load_tokenizer(folder, "slow")
