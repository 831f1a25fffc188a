"""Write docs/configuration.md, the reference of every config key, from the dataclasses that read them."""

import argparse
from pathlib import Path

from ernie_kqat import config, files
from ernie_kqat.errors import run_tool

PAGE = Path(__file__).resolve().parents[1] / "docs/configuration.md"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, epilog="A test fails where the page is stale. Run it after any change of a config key."
    ).parse_args()
    files.write_text(PAGE, config.reference())
    print(PAGE)


if __name__ == "__main__":
    run_tool(main)
