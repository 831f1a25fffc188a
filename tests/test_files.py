"""Files are written whole or not at all."""

import pytest

from ernie_kqat import files


def test_text_is_replaced_whole_and_kept_when_writing_fails(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "one")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "lone surrogate \udcff")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_folder_is_replaced_whole_and_kept_when_filling_fails(tmp_path):
    folder = tmp_path / "f"
    with files.replacing_folder(folder) as new:
        (new / "x").write_text("1")

    def fail():
        with files.replacing_folder(folder) as new:
            (new / "x").write_text("2")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (folder / "x").read_text() == "1"
    with files.replacing_folder(folder) as new:
        (new / "y").write_text("3")
    assert [p.name for p in folder.iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    folder = tmp_path / "f"
    old = tmp_path / ".f.old"
    old.mkdir()
    (old / "x").write_text("kept")
    files.recover_folder(folder)
    assert (folder / "x").read_text() == "kept"
    old.mkdir()
    files.recover_folder(folder)
    assert not old.exists()


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
