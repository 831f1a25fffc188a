"""Leave out the least important attention heads and feed-forward neurons of a fine-tuned model (DynaBERT's way)."""

from pathlib import Path

from ernie_kqat import cli
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/narrow.py --model output/ernie_sst2_minilm_fp32/best_model --data SST2_FOLDER --heads 0.5 --ffn 0.5 --output DIR
  python tools/train.py -c configs/ernie_sst2_minilm_half.yaml -o Model.name_or_path=DIR      (fine-tune it again)

DIR is an fp32 model folder for every tool here. With fewer heads its config.json has the key head_dim, which PaddleNLP's own
from_pretrained does not know; with --heads 1 it is an ordinary PaddleNLP folder. -c may set Data (max_length, columns)."""


def main() -> int:
    arguments = parser().parse_args()
    settings = cli.settings(arguments)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output}: already there and not an empty folder")
    if arguments.rows < 1:
        raise UserError(f"--rows: {arguments.rows} is under 1")
    from ernie_kqat.narrow import narrow_folder

    lines = narrow_folder(
        arguments.model,
        arguments.data,
        arguments.heads,
        arguments.ffn,
        output,
        arguments.rows,
        arguments.seed,
        settings.Data if arguments.config or arguments.override else None,
    )
    print(*lines, output, sep="\n")
    return 0


def parser():
    """The tool's options."""
    made = cli.parser(__doc__, EPILOG)
    made.add_argument("--model", metavar="DIR", required=True, help="a fine-tuned fp32 model folder")
    made.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help="labelled rows that say what is important: a file, or a folder's train",
    )
    made.add_argument(
        "--heads", type=float, default=0.5, metavar="SHARE", help="of the heads of each layer; default 0.5"
    )
    made.add_argument(
        "--ffn", type=float, default=0.5, metavar="SHARE", help="of the neurons of each layer; default 0.5"
    )
    made.add_argument("--rows", type=int, default=2000, metavar="N", help="rows to measure on, by --seed; default 2000")
    made.add_argument("--seed", type=int, default=42, help="chooses the rows; default 42")
    made.add_argument("--output", metavar="DIR", required=True, help="folder to write; must be new or empty")
    return made


if __name__ == "__main__":
    run_tool(main)
