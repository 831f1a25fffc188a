"""`make serve-demo`: a server, real requests over both protocols, and a clean end."""

import re

import pytest


def test_the_demo_asks_over_both_protocols_and_stops(tool, tiny_int8):
    code, out, _ = tool("serve_demo", "--model", tiny_int8)
    assert code == 0
    assert re.findall(r"--url (http|grpc)://127\.0\.0\.1:\d+", out) == ["http", "grpc"]
    answers = re.findall(r"^ *(negative|positive)  (0\.\d{4}|1\.0000)  (.+)$", out, re.M)
    assert len(answers) == 8
    assert answers[:4] == answers[4:], "HTTP and gRPC agree"
    assert out.endswith("stopped with exit code 0\n")


def test_a_wrong_model_is_one_message(tool, tmp_path, capfd):
    code, _, err = tool("serve_demo", "--model", tmp_path)
    assert code == 2
    assert "Traceback" not in err
    assert str(tmp_path) in err


@pytest.mark.parametrize("arguments", [["extra"], ["--model"]])
def test_wrong_use(tool, arguments):
    assert tool("serve_demo", *arguments)[0] == 2
