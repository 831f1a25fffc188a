"""Pack an artifact into one small file, its weights at their true bit width; or expand such a file into a folder again."""

import argparse
from pathlib import Path

from ernie_kqat.errors import run_tool

EPILOG = """examples:
  python tools/pack.py --model output/RUN/inference --output model.kqat
  python tools/infer.py --model model.kqat "a dull film"          Predictor, eval and serve take the file, too
  python tools/pack.py --model model.kqat --output FOLDER         the artifact folder again, byte for byte

A packed file is expanded again before it is written: it answers as the artifact does, in every bit. size_ratio is 4 bytes for
each parameter, over the bytes of the file. Embeddings have few bits where Slim.quant.embedding says so.
Predictor, eval and serve expand the file once, into $ERNIE_KQAT_HOME/expanded. Exit code 0: done. 2: wrong input."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", metavar="ARTIFACT", required=True, help="a folder of tools/export.py, or a packed file"
    )
    parser.add_argument("--output", metavar="PATH", required=True, help="the file, or for a packed file the new folder")
    arguments = parser.parse_args()
    if Path(arguments.model).is_file():
        expand_into(arguments.model, Path(arguments.output))
        return 0
    from ernie_kqat.packed.pack import describe, pack

    print("\n".join(describe(pack(arguments.model, arguments.output))))
    return 0


def expand_into(file: str, folder: Path) -> None:
    """The artifact folder of a packed file; it may replace an artifact, and nothing else."""
    from ernie_kqat import UserError, artifact
    from ernie_kqat.packed.expand import expand

    if folder.exists() and not artifact.is_artifact(folder):
        raise UserError(f"{folder}: exists and is no artifact; name a new folder")
    expand(file, folder)
    print(f"artifact: {folder}")


if __name__ == "__main__":
    run_tool(main)
