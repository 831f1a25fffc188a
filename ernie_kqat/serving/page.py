"""The page at `/` and the policy that lets the browser run its own script and style and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def load() -> tuple[bytes, str]:
    """The page, and the value of its Content-Security-Policy header."""
    text = PAGE.read_text(encoding="utf-8")
    directives = {
        "default-src": "'none'",
        "script-src": _hashes(text, "script"),
        "style-src": _hashes(text, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, without which a browser asks for one
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text.encode("utf-8"), "; ".join(f"{name} {value}" for name, value in directives.items())


def _hashes(text: str, tag: str) -> str:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [hashlib.sha256(content.encode("utf-8")).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
