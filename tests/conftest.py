"""Fixtures of the whole suite. `import ernie_kqat` comes first: it loads zlib before paddle does."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices; before paddle is imported

import ernie_kqat  # noqa: F401, I001
import paddle
import pytest

from ernie_kqat import native
from ernie_kqat.home import home

sys.path.insert(0, str(Path(__file__).parent))
import native_core
from artifacts import make_artifact
from running import guarded, server  # noqa: F401  fixtures
from tiny_ernie import make_tiny_ernie, make_tiny_task


@pytest.fixture(scope="session", autouse=True)
def users_home() -> Path:
    """The user's cache of archives, models and data as it was found; every test gets another one."""
    found = home()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE_KQAT_HOME", folder)
        yield found


@pytest.fixture(autouse=True)
def _seed():
    paddle.seed(0)


@pytest.fixture(scope="session")
def tiny_ernie(tmp_path_factory) -> Path:
    """A two-layer random ERNIE classifier of two labels; read only."""
    return make_tiny_ernie(tmp_path_factory.mktemp("tiny") / "ernie")


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory) -> Path:
    """256 train and 64 dev rows of toy sentiment; read only."""
    return make_tiny_task(tmp_path_factory.mktemp("tiny") / "task")


@pytest.fixture(scope="session")
def tiny_int8(tiny_ernie, tmp_path_factory) -> Path:
    """The tiny ERNIE as an INT8 artifact; read only."""
    return make_artifact(tmp_path_factory.mktemp("tiny") / "int8", tiny_ernie)


@pytest.fixture(scope="session")
def tiny_fp32(tiny_ernie, tmp_path_factory) -> Path:
    """The tiny ERNIE as an fp32 artifact; read only."""
    return make_artifact(tmp_path_factory.mktemp("tiny") / "fp32", tiny_ernie, "fp32")


@pytest.fixture
def tool(monkeypatch, capfd):
    """Run tools/NAME.py in this process; returns (exit code, stdout, stderr)."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(Path(__file__).parents[1] / "tools" / f"{name}.py"), run_name="__main__")
        out, err = capfd.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> Path:
    """The native encoder without Paddle, as a library."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler here")
    return native_core.build(tmp_path_factory.mktemp("core"), compiler)


@pytest.fixture(scope="session")
def native_library(users_home) -> Path:
    """The native library, from the user's cache where it is built; made once: a loaded library must not be written over."""
    theirs = users_home / "native" / native.library().parent.name / native.LIBRARY
    if theirs.is_file():
        native.library().parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(theirs, native.library())
    return native.build()
