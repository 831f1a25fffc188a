"""Both READMEs: every command names a tool, a config, options and keys that exist; the Python example runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie_kqat import config
from ernie_kqat.export import program

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README_cn.md"]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def commands(path):
    joined = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def headings(path):
    return [
        line.split()[0]
        for line in re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S).splitlines()
        if line.startswith("#")
    ]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_commands_name_what_exists(path):
    found = commands(path)
    assert "make quickstart" in found
    assert "make test" in found
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    keys = {line.split()[0] for line in config.describe()}
    for command in found:
        words = shlex.split(command)
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
        elif words[:1] == ["python"] and words[1].startswith("tools/"):
            sources = (words[1], "ernie_kqat/cli.py", "ernie_kqat/serving/settings.py")  # where options are named
            text = "".join((ROOT / source).read_text(encoding="utf-8") for source in sources)
            for word in words[2:]:
                if word.startswith("--"):
                    assert f'"{word}"' in text, f"{command}: {word}"
                if word.startswith("configs/"):
                    assert (ROOT / word).is_file(), command
                if re.match(r"^(Global|Model|Data|Slim|Train|Export)\.", word):
                    assert word.split("=")[0] in keys, command


def test_both_readmes_have_the_same_shape_and_commands():
    assert headings(READMES[0]) == headings(READMES[1])
    assert commands(READMES[0]) == commands(READMES[1])
    assert blocks(READMES[0], "python") == blocks(READMES[1], "python")


def test_relative_links_lead_somewhere():
    for path in READMES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{path.name}: {target}"


def test_the_drop_in_example_runs_and_is_short(tmp_path, tiny_ernie, monkeypatch):
    (code,) = blocks(READMES[0], "python")
    assert len(code.strip().splitlines()) <= 20
    ids = np.random.default_rng(0).integers(5, 90, (4, 9))
    batch = paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids)), paddle.to_tensor(np.array([0, 1, 0, 1]))
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("MODEL", str(tiny_ernie)), "README.md", "exec"), {"batches": [batch, batch]})
    inputs, _ = program.names(tmp_path / "inference/model")
    assert inputs == ["input_ids", "token_type_ids"]
