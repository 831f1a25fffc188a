"""Settings of the service: strict, and named by their options."""

import argparse
from pathlib import Path

import pytest

from ernie_kqat import UserError
from ernie_kqat.serving import settings


def parse(*options):
    parser = argparse.ArgumentParser()
    settings.add_options(parser)
    return settings.from_options(parser.parse_args(["--model", "a/b", *options]))


def test_defaults_are_safe():
    found = parse()
    assert found.models == {"default": Path("a/b")}
    assert found.host == "127.0.0.1"
    assert not found.log_texts
    assert found.token() is None
    assert found.worker_count() >= 1


def test_models_by_name():
    assert parse("--model", "new-2=c=d").models == {"default": Path("a/b"), "new-2": Path("c=d")}
    assert parse("--model", "x=/p").models["x"] == Path("/p")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "c"), "--model c: 'default' is named twice"),
        (("--model", "a b=c"), "'a b' is no name"),
        (("--port", "70000"), r"--port: 70000 is not in 0\.\.65535"),
        (("--max-batch", "12"), "--max-batch: 12 is not a power of two"),
        (("--max-queue", "10"), "--max-texts: 256 is over --max-queue, 10"),
        (("--timeout-s", "nan"), "--timeout-s: nan is not in"),
        (("--threads", "0"), "--threads: 0 is not in"),
        (("--port", "8867"), "--port, --grpc-port, --metrics-port: "),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        parse(*options)


def test_ports_may_all_be_chosen_by_the_system():
    found = parse("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
    assert (found.port, found.grpc_port, found.metrics_port) == (0, 0, 0)


def test_tokens(tmp_path):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    assert parse("--token-file", str(file)).token() == b"0123456789abcdef"
    for content in ("", "short", "two words of some length", "0123456789abcdef\n0123456789abcdef"):
        file.write_text(content)
        with pytest.raises(UserError, match="one line of 16 to 512"):
            parse("--token-file", str(file)).token()
    with pytest.raises(UserError, match="No such file"):
        parse("--token-file", str(tmp_path / "absent")).token()
