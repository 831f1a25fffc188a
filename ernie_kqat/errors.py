"""The one error for what a user can mend, and how a tool reports it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable


class UserError(Exception):
    """Wrong input. The message names the file, key or row, what was found and what is allowed."""


INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: 0 done, 1 refused, 2 wrong input, 130 interrupted; no traceback for a user's mistake."""
    logging.basicConfig(format="%(message)s")  # of libraries, warnings only
    logging.getLogger("ernie_kqat").setLevel(logging.INFO)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:  # a full disk, a read-only folder, a file in place of a folder
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
