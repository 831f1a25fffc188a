"""A peer's own virtual environment, from its lock file, made at first use and kept in `$ERNIE_KQAT_HOME/peers`."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from ..errors import UserError
from ..home import home

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.lock")))

log = logging.getLogger(__name__)


def python_of(name: str) -> str:
    """The Python of peer `name`'s environment.

    Raises UserError for an unknown peer, and where pip fails.
    """
    if name not in NAMES:
        raise UserError(f"peer {name!r}: not one of {', '.join(NAMES)}")
    lock, folder = HERE / f"{name}.lock", _folder(name)
    python = folder / "bin/python"
    if not (folder / ".installed").is_file():
        log.warning("%s: installing it into %s (a minute or two) …", name, folder)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--require-hashes"]
        done = subprocess.run([*pip, "-r", str(lock)], env=plain(), check=False, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{name}: pip could not install it: {done.stderr.strip()[-400:]}")
        (folder / ".installed").touch()
    return str(python)


def _folder(name: str) -> Path:
    key = hashlib.sha256((HERE / f"{name}.lock").read_bytes() + sys.version.encode()).hexdigest()[:8]
    return home() / "peers" / f"{name}-{key}"


def plain() -> dict[str, str]:
    """This process's variables but for those that would lead another Python to our packages."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
