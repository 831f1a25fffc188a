"""Make .venv from the lock files, hashes checked; does nothing if it is up to date. Needs only CPython and pip."""

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
SOURCES = ("requirements.lock", "requirements-serving.lock", "requirements-serving-paddle.txt", "setup.py")


def main() -> int:
    if not (3, 9) <= sys.version_info[:2] <= (3, 11):
        print(f"error: CPython 3.9, 3.10 or 3.11 is needed, this is {sys.version.split()[0]}; make PYTHON=python3.11 …")
        return 2
    wanted = (
        hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SOURCES)).hexdigest()
        + f" {sys.version_info[:2]}"
    )
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"making {VENV.name} from the lock files (a minute or two) …", flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    for arguments in (
        ["--require-hashes", "-r", "requirements.lock", "-r", "requirements-serving.lock"],
        ["--require-hashes", "--no-deps", "-r", "requirements-serving-paddle.txt"],
        ["--no-deps", "--no-build-isolation", "-e", "."],
    ):
        if subprocess.run(pip + arguments, cwd=ROOT, check=False).returncode:
            print("error: pip failed; its message is above. Is a package index within reach?", file=sys.stderr)
            return 2
    STAMP.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
