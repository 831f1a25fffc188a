"""Build the native operator (docs/native.md) for this Paddle; needs g++ 11 or newer and some 20 seconds."""

import argparse

from ernie_kqat import native
from ernie_kqat.errors import run_tool

EPILOG = "Exit code 0: built, or already there. 1: built, but this CPU cannot use it. 2: it cannot be built here."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--again", action="store_true", help="build it even if it is there")
    arguments = parser.parse_args()
    print(native.build(arguments.again))
    reason = native.why_not()
    print(reason or "it can be used: export with -o Export.engine=native")
    return 1 if reason else 0


if __name__ == "__main__":
    run_tool(main)
