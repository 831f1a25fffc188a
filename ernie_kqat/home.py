"""Where the project caches what it fetches and computes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$ERNIE_KQAT_HOME`, or ~/.cache/ernie_kqat."""
    return Path(os.environ.get("ERNIE_KQAT_HOME") or Path("~/.cache/ernie_kqat")).expanduser()
