"""Convert a BERT-family folder (config.json, vocab.txt, model.safetensors or pytorch_model.bin) to a PaddleNLP ERNIE folder,
or, with --to bert, an ERNIE folder to a BERT one (safetensors) that computes the same."""

import argparse
from pathlib import Path

from ernie_kqat import files
from ernie_kqat.errors import UserError, run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of the model")
    parser.add_argument("target", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--to", choices=["ernie", "bert"], default="ernie", help="what to make; default: ernie")
    arguments = parser.parse_args()
    if arguments.target.exists() and (not arguments.target.is_dir() or any(arguments.target.iterdir())):
        raise UserError(f"{arguments.target}: already there and not an empty folder")
    from ernie_kqat.models.convert import convert_bert  # Paddle takes seconds to load; a wrong path should not wait
    from ernie_kqat.models.to_bert import convert_ernie

    with files.replacing_folder(arguments.target) as new:
        remarks = (convert_bert if arguments.to == "ernie" else convert_ernie)(arguments.source, new)
    for remark in remarks:
        print(f"note: {remark}")
    print(arguments.target)


if __name__ == "__main__":
    run_tool(main)
