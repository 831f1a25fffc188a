"""Convert a BERT-family folder (config.json, model.safetensors, vocab.txt) to a PaddleNLP ERNIE folder."""

import argparse
from pathlib import Path

from ernie_kqat import files
from ernie_kqat.errors import UserError, run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of the BERT model")
    parser.add_argument("target", type=Path, help="folder to write; must be new or empty")
    arguments = parser.parse_args()
    if arguments.target.exists() and (not arguments.target.is_dir() or any(arguments.target.iterdir())):
        raise UserError(f"{arguments.target}: already there and not an empty folder")
    from ernie_kqat.models.convert import (
        convert_bert,
    )  # Paddle takes seconds to load; a wrong path should not wait for it

    with files.replacing_folder(arguments.target) as new:
        remarks = convert_bert(arguments.source, new)
    for remark in remarks:
        print(f"note: {remark}")
    print(arguments.target)


if __name__ == "__main__":
    run_tool(main)
