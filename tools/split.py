"""Make a train and a dev file of one file of labelled sentences: what tools/train.py -o Data.path=DIR reads."""

import argparse

from ernie_kqat.data.hold_back import hold_back
from ernie_kqat.errors import run_tool

EPILOG = """examples:
  python tools/split.py reviews.csv data
  python tools/split.py tickets.tsv data --text body --label team --dev 0.2

A share of the rows of each label goes to dev. Rows with equal texts all stay in train, so that dev holds nothing that was
trained on. The file is .csv (with a header line), .tsv or .jsonl; DIR gets train.jsonl and dev.jsonl."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FILE", help="labelled sentences, or pairs of sentences")
    parser.add_argument("output", metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--dev", type=float, default=0.1, metavar="SHARE", help="of the rows of each label; default 0.1"
    )
    parser.add_argument("--text", metavar="COLUMN", help="column of the sentence, if it is not found by its name")
    parser.add_argument("--text-pair", metavar="COLUMN", help="column of the second sentence, likewise")
    parser.add_argument("--label", metavar="COLUMN", help="column of the label, likewise")
    parser.add_argument("--seed", type=int, default=42, help="which rows; default 42")
    arguments = parser.parse_args()
    columns = (arguments.text, arguments.text_pair, arguments.label)
    print("\n".join(hold_back(arguments.source, arguments.output, arguments.dev, arguments.seed, columns)))
    return 0


if __name__ == "__main__":
    run_tool(main)
