"""The log: one JSON object a line, rotated, harmless whatever clients send."""

import json
import logging

import pytest

from ernie_kqat import UserError
from ernie_kqat.serving import logs


@pytest.fixture(autouse=True)
def restored():
    root, ours = logging.getLogger(), logging.getLogger("ernie_kqat")
    found = root.handlers[:], root.level, ours.level, logging.raiseExceptions
    yield
    for handler in root.handlers:
        if handler not in found[0]:
            handler.close()
    root.handlers[:], raising = found[0], found[3]
    root.setLevel(found[1])
    ours.setLevel(found[2])
    logging.raiseExceptions = raising


def test_lines_are_json_whatever_is_in_them(tmp_path):
    file = tmp_path / "log"
    logs.configure(str(file))
    logging.getLogger("ernie_kqat.a").info("request", extra={"request_id": "x", "texts": ["a\nb\u2028\x1b[31m", "é"]})
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("other").exception("failed")
    logging.getLogger("other").info("not of ours, and no warning")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert file.read_text().isascii()
    assert (first["event"], first["level"], first["request_id"]) == ("request", "info", "x")
    assert first["texts"] == ["a\nb\u2028\x1b[31m", "é"]
    assert first["time"].endswith("+00:00")
    assert "ValueError: why" in second["traceback"]


def test_files_are_rotated_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "ROTATE_BYTES", 2000)
    logs.configure(str(tmp_path / "log"))
    for number in range(200):
        logging.getLogger("ernie_kqat.a").info("request", extra={"number": number})
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["log", *(f"log.{number}" for number in range(1, logs.KEPT_FILES + 1))]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["number"] == 199


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="--log-file: .*: Is a directory"):
        logs.configure(str(tmp_path))
