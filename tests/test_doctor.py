"""The doctor: sound here, and still standing where packages are missing, wrong or deadly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_kqat import doctor
from ernie_kqat.export.int8_ops import int8_ops_run

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements.in"


def by_name(checks):
    return {check.name: check for check in checks}


def run_tool(*arguments, **environment):
    command = [sys.executable, str(ROOT / "tools/doctor.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600
    )


def test_this_installation_is_sound():
    done = run_tool("--json")
    result = json.loads(done.stdout)
    found = {check["name"]: check for check in result["checks"]}
    assert done.returncode == 0, done.stdout
    assert result["bad"] == 0
    for name in ("python", "paddlepaddle", "paddle loads", "oneDNN", "paddlenlp loads", "paddleslim loads"):
        assert found[name]["status"] == "ok", found[name]
    assert found["INT8"]["status"] in ("ok", "warn")
    assert {"memory", "cache", "PaddleNLP's cache", "cpu", "primitive cache"} <= set(found)
    assert all(check["mend"] for check in result["checks"] if check["status"] != "ok")


def test_every_requirement_is_checked():
    lines = REQUIREMENTS.read_text().partition("# Development.")[0].splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert len(doctor.examine("packages", lambda: doctor._packages(REQUIREMENTS))) == len(wanted) > 10


def test_versions_are_compared(tmp_path):
    path = tmp_path / "requirements.in"
    path.write_text(
        "numpy==9.9  # why\ntqdm\ntokenizers<0.1\nPyYAML<99\nno-such-package==1  # reason\n# Development.\nabsent\n"
    )
    found = by_name(doctor._packages(path))
    assert found["numpy"].status == "warn"
    assert "(why)" in found["numpy"].mend
    assert "pip install 'numpy==9.9'" in found["numpy"].mend
    assert found["tqdm"].status == "ok"
    assert found["tokenizers"].status == "warn"
    assert found["PyYAML"].status == "ok"
    assert found["no-such-package"].status == "bad"
    assert "absent" not in found


def fake_package(folder, name, code):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return str(folder)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('numpy 2 is not for me')", "ImportError: numpy 2 is not for me"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    ],
)
def test_a_package_that_fails_is_one_finding_among_others(tmp_path, code, message):
    path = fake_package(tmp_path, "paddle", code)
    done = run_tool(PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr == ""
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    assert len(bad) == 4, done.stdout  # paddle, paddlenlp, paddleslim, INT8
    assert message in bad[0]
    assert "make venv" in done.stdout
    assert "\nok   memory" in done.stdout or "\nwarn memory" in done.stdout


def test_a_check_that_fails_itself_is_bad():
    def broken():
        yield doctor.Check("first", doctor.OK, "")
        raise ValueError("what is this")

    [check] = doctor.examine("mine", broken)
    assert check.status == doctor.BAD
    assert "ValueError: what is this" in check.found


def test_int8_of_this_cpu_against_one_without_vnni(monkeypatch):
    if not doctor.exact_int8(doctor.machine()["instruction_sets"]):
        pytest.skip("this CPU has no VNNI")
    [exact] = doctor._int8()
    assert exact.status == "ok"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    [saturating] = doctor._int8()
    assert saturating.status == "warn"
    assert "overflow" in saturating.mend
    assert [check.status for check in doctor._settings()] == ["warn", "ok"]


def test_int8_operators_are_counted(tiny_int8, tiny_fp32):
    import numpy as np

    ids = np.array([[1, 2, 3]])
    feed = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
    counts = [int8_ops_run(f / "inference.pdmodel", f / "inference.pdiparams", feed) for f in (tiny_int8, tiny_fp32)]
    assert counts == [2 * 6 + 2, 0]
    with pytest.raises(RuntimeError, match="failed with code"):
        int8_ops_run(tiny_int8 / "none", tiny_int8 / "none", feed)


def test_folders_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "new/folder"))
    found = by_name(doctor._folders())
    assert found["cache"].status == "bad"
    assert "ERNIE_KQAT_HOME" in found["cache"].mend
    assert found["PaddleNLP's cache"].status in ("ok", "warn")
    assert not (tmp_path / "new").exists()


def test_an_older_python_and_an_unknown_cpu(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 12, 0))
    [check] = doctor._python()
    assert check.status == "bad"
    monkeypatch.setattr(doctor, "machine", lambda: {"cpu": "x", "cores": 1, "instruction_sets": []})
    assert next(iter(doctor._cpu())).status == "warn"
    monkeypatch.setattr(doctor, "machine", lambda: {"cpu": "x", "cores": 1, "instruction_sets": ["avx2"]})
    assert "VNNI" in next(iter(doctor._cpu())).mend


def test_the_network_is_only_asked_for_with_the_option(monkeypatch):
    assert "network" not in dict(doctor.checks(REQUIREMENTS))
    monkeypatch.setattr(doctor, "_run", lambda *arguments: ({}, "Name or service not known"))
    [check] = dict(doctor.checks(REQUIREMENTS, network=True))["network"]()
    assert check.status == "warn"
    assert "Name or service" in check.found
