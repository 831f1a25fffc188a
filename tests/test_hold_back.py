"""tools/split.py: each label's share, nothing twice, nothing of train in dev."""

import collections
import json

import pytest

from ernie_kqat import UserError
from ernie_kqat.data.hold_back import hold_back


def write_rows(path, rows):
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [(f"film, number {index}", "good" if index % 4 else "bad") for index in range(200)]


def test_each_label_gives_its_share_and_every_row_is_in_one_file(tmp_path):
    lines = hold_back(write_rows(tmp_path / "a.csv", ROWS), tmp_path / "data", share=0.2)
    train, dev = (read(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "dev"))
    assert sorted((row["text"], row["label"]) for row in train + dev) == sorted(ROWS)
    assert collections.Counter(row["label"] for row in dev) == {"good": 30, "bad": 10}
    assert lines[0] == "label bad: 50 rows, 10 of them in dev"
    assert lines[-1].endswith("160 train rows, 40 dev rows")


def test_the_seed_chooses(tmp_path):
    source = write_rows(tmp_path / "a.csv", ROWS)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        hold_back(source, tmp_path / name, seed=seed)
    first, again, other = ((tmp_path / name / "dev.jsonl").read_text() for name in "abc")
    assert first == again != other


def test_equal_texts_are_never_held_back(tmp_path):
    hold_back(write_rows(tmp_path / "a.csv", ROWS + ROWS[:100]), tmp_path / "data", share=0.5)
    train, dev = (read(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "dev"))
    assert not {row["text"] for row in train} & {row["text"] for row in dev}
    assert len({row["text"] for row in dev}) == len(dev) == 100  # the rows that are there once, which is under half


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        (ROWS, 1.0, "--dev: 1.0 is not a share"),
        ([*ROWS, ("alone", "rare")], 0.1, "label 'rare' has 1 rows, 1 of them unique: none can be held back"),
        ([*ROWS, ("x", "rare"), ("x", "rare")], 0.1, "label 'rare' has 2 rows, 0 of them unique"),
    ],
)
def test_what_cannot_be_split_is_said(tmp_path, rows, share, message):
    with pytest.raises(UserError, match=message):
        hold_back(write_rows(tmp_path / "a.csv", rows), tmp_path / "data", share)
    assert not (tmp_path / "data").exists()


def test_nothing_is_overwritten(tmp_path, tool):
    source = write_rows(tmp_path / "a.csv", ROWS)
    assert tool("split", source, tmp_path / "data")[0] == 0
    code, _, err = tool("split", source, tmp_path / "data")
    assert code == 2
    assert "train.jsonl: already there; name another folder" in err
