"""Checks of an installation, each with how to mend what it finds. Imports Paddle only in processes that may die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .home import home
from .machine import exact_int8, installed, machine

OK, WARN, BAD = "ok", "warn", "bad"
PYTHONS = ((3, 9), (3, 11))
MEMORY_GB, DISK_GB = 4, 5  # what training the quickstart's model takes, with room to spare
EXACT = 1e-5  # rms error / std of the INT8 probe, whose arithmetic is exact where products are summed in 32 bits
TIMEOUT_SECONDS = 300
HARMFUL = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "oneDNN may build its primitives anew in each call, which is slow",
    "DNNL_PRIMITIVE_CACHE_CAPACITY": "oneDNN may build its primitives anew in each call, which is slow",
    "ONEDNN_MAX_CPU_ISA": "it may take VNNI away, without which INT8 is not exact",
    "DNNL_MAX_CPU_ISA": "it may take VNNI away, without which INT8 is not exact",
}

PADDLE = """
import ernie_kqat, json, zlib, paddle
from paddle.base import core
assert zlib.decompress(zlib.compress(bytes(99))) == bytes(99)
print(json.dumps({"version": paddle.__version__, "onednn": core.is_compiled_with_mkldnn()}))
"""
HUB = """
import ernie_kqat, json, urllib.request
from paddlenlp.transformers import ErnieTokenizer
url = ErnieTokenizer.pretrained_resource_files_map["vocab_file"]["ernie-2.0-base-en"]
urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20)
print(json.dumps({}))
"""
NATIVE = "import ernie_kqat, json; from ernie_kqat import native; print(json.dumps({'reason': native.why_not()}))"
IMPORT = "import ernie_kqat, {0}; print('{{}}')"


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok, warn or bad; `mend` says what to do unless it is ok."""

    name: str
    status: str
    found: str
    mend: str = ""


def checks(requirements: Path, network: bool = False) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    """The checks by title. `requirements`: requirements.in, which holds the versions that are tested."""
    listed: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("packages", partial(_packages, requirements)),
        ("paddle", _paddle),
        ("paddlenlp", partial(_import, "paddlenlp")),
        ("paddleslim", partial(_import, "paddleslim")),
        ("cpu", _cpu),
        ("int8", _int8),
        ("native", _native),
        ("settings", _settings),
        ("memory", _memory),
        ("folders", _folders),
    ]
    return [*listed, ("network", _hub)] if network else listed


def examine(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """What one check finds; a check that fails itself is a finding, and the others still run."""
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001  whatever a broken installation raises
        return [Check(name, BAD, f"the check failed: {type(error).__name__}: {error}", "make venv")]


def _python() -> Iterator[Check]:
    version = sys.version_info[:2]
    low, high = (".".join(map(str, bound)) for bound in PYTHONS)
    status = OK if PYTHONS[0] <= version <= PYTHONS[1] else BAD
    yield Check(
        "python", status, sys.version.split()[0], f"Paddle 2.6 has wheels for {low} to {high}: make venv PYTHON=…"
    )


def _packages(requirements: Path) -> Iterator[Check]:
    if not requirements.is_file():
        yield Check(
            "packages", WARN, f"no {requirements}: versions are not compared", "run tools/doctor.py of a checkout"
        )
        return
    text = requirements.read_text(encoding="utf-8").partition("# Development.")[0]
    for name, operator, wanted, reason in re.findall(r"(?m)^([\w.-]+)(?:(==|<)([\w.]+))?[ \t]*(?:#[ \t]*(.*))?$", text):
        found = installed(name)
        because = f" ({reason})" if reason else ""
        if found is None:
            yield Check(name, BAD, "not installed", f"make venv, or pip install '{name}{operator}{wanted}'{because}")
        elif not _as_wanted(found, operator, wanted):
            mend = f"tested with {operator}{wanted}{because}: make venv, or pip install '{name}{operator}{wanted}'"
            yield Check(name, WARN, found, mend)
        else:
            yield Check(name, OK, found)


def _as_wanted(found: str, operator: str, wanted: str) -> bool:
    if operator == "<":
        return _numbers(found) < _numbers(wanted)
    return found == wanted or not operator


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _paddle() -> Iterator[Check]:
    found, error = _run("-c", PADDLE)
    if error:
        yield Check("paddle loads", BAD, error, "make venv; Paddle 2.6 needs numpy below 2 and a CPU with AVX")
        return
    yield Check("paddle loads", OK, f"{found['version']}, after zlib")
    status, engine = (OK, "compiled in") if found["onednn"] else (BAD, "not compiled in")
    yield Check("oneDNN", status, engine, "INT8 needs it: install paddlepaddle's own wheel (make venv)")


def _import(package: str) -> Iterator[Check]:
    _, error = _run("-c", IMPORT.format(package))
    mend = f"{package} trains and exports; serving works without it: make venv"
    yield Check(f"{package} loads", BAD if error else OK, error or "", mend)


def _cpu() -> Iterator[Check]:
    found = machine()
    sets = found["instruction_sets"]
    listed = f"{found['cpu']}, {found['cores']} cores; {', '.join(sets) or 'no known instruction sets'}"
    if not sets:
        yield Check("cpu", WARN, listed, "unknown to this check; the INT8 check below says what counts")
    elif exact_int8(sets):
        yield Check("cpu", OK, listed)
    else:
        mend = (
            "without VNNI INT8 is neither exact nor much faster than fp32; serve on a CPU with avx512_vnni or avx_vnni"
        )
        yield Check("cpu", WARN, listed, mend)


def _int8() -> Iterator[Check]:
    found, error = _run("-m", "ernie_kqat.export.int8_probe")
    if error:
        yield Check("INT8", BAD, error, "neither export nor an INT8 model works here: mend what is bad above")
    elif not found["int8_ops"]:
        yield Check("INT8", BAD, "the compiled program ran in fp32", "oneDNN has no INT8 kernel for this CPU")
    elif found["error"] > EXACT:
        mend = (
            "this CPU adds products in 16 bits, which overflow: a deployed model answers differently here than where it "
            "was verified (1.6 % of SST-2 dev). Serve on a CPU with VNNI, or the fp32 model"
        )
        yield Check("INT8", WARN, f"rms error {found['error']:.2g} of the std on large values", mend)
    else:
        yield Check("INT8", OK, f"equals integer arithmetic (rms error {found['error']:.1g} of the std)")


def _native() -> Iterator[Check]:
    found, error = _run("-c", NATIVE)
    reason = error or found["reason"]
    mend = "artifacts with a native program run the plain one, which is slower: python tools/build_native.py"
    yield Check("native operator", WARN if reason else OK, reason or "built", mend)


def _settings() -> Iterator[Check]:
    set_here = [name for name in HARMFUL if name in os.environ]
    for name in set_here:
        yield Check(name, WARN, os.environ[name], f"{HARMFUL[name]}: unset it")
    if not any("CACHE" in name for name in set_here):
        yield Check(
            "primitive cache", OK, "ernie_kqat keeps every shape; Paddle's own default (10 shapes) is 3 times slower"
        )


def _memory() -> Iterator[Check]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        yield Check("memory", WARN, "unknown: no /proc/meminfo", f"have {MEMORY_GB} GB free for training")
        return
    free = int(re.findall(r"MemAvailable:\s+(\d+)", text)[0]) * 1024 / 1e9
    status = OK if free >= MEMORY_GB else WARN
    yield Check("memory", status, f"{free:.1f} GB free", f"training wants {MEMORY_GB} GB: a smaller Train.batch_size")


def _folders() -> Iterator[Check]:
    hub = Path(os.environ.get("PPNLP_HOME") or "~/.paddlenlp").expanduser()
    for name, variable, folder in (
        ("cache", "ERNIE_KQAT_HOME", home()),
        ("PaddleNLP's cache", "PPNLP_HOME", hub),
    ):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e9
        found = f"{folder}, {free:.0f} GB free"
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield Check(name, BAD, f"{existing}: {error.strerror}", f"set {variable} to a folder that can be written")
            continue
        yield Check(
            name, OK if free >= DISK_GB else WARN, found, f"{DISK_GB} GB are wanted; {variable} names the folder"
        )


def _hub() -> Iterator[Check]:
    _, error = _run("-c", HUB)
    mend = "models by name need PaddleNLP's hub; a local folder (Model.name_or_path) or a filled PPNLP_HOME does not"
    yield Check("PaddleNLP's hub", WARN if error else OK, error or "reachable", mend)


def _run(*arguments: str) -> tuple[dict[str, Any], str]:
    """What a Python process printed as JSON on its last line, and the error that ended it ("" if none)."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer in {TIMEOUT_SECONDS} s"
    if done.returncode < 0:
        return {}, f"killed by {signal.Signals(-done.returncode).name}"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no output"]
    return ({}, lines[-1][:300]) if done.returncode else (json.loads(lines[-1]), "")
