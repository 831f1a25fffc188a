"""Choose which layers of a ternary run to split into two binary weights in a size budget (BinaryBERT's adaptive splitting)."""

from ernie_kqat import cli
from ernie_kqat.errors import run_tool

EPILOG = """examples:
  python tools/adaptive_split.py --model TERNARY_RUN --data held.tsv --budget-ratio 0.045 --output DIR
  python tools/train.py -c DIR/mixed.yaml                            the chosen layers ternary, the others binary
  python tools/train.py -c DIR/plan.yaml -o Model.name_or_path=MIXED_RUN/best_model      the chosen layers split

DIR gets plan.yaml and mixed.yaml (the run's own config with other quantizers, from its best model on), splitting.json, and
measured.json, from which a second call, also with another budget, goes on where the first was stopped. All layers binary are
1/32 of fp32, all split 1/16. Sizes are of the quantized Linears' weights with their bits packed, and their steps: what the
artifact stores of a split weight is one int8 matrix. -c may set Data."""


def main() -> int:
    arguments = parser().parse_args()
    settings = cli.settings(arguments)
    from ernie_kqat.analysis import splitting, tables

    names = ("model", "data", "budget_bytes", "budget_ratio", "rows")
    options = splitting.Options(
        **{name: getattr(arguments, name) for name in names},
        columns=settings.Data if arguments.config or arguments.override else None,
    )
    results = splitting.search(options, arguments.output)
    print(tables.text_of(splitting.table(results)))
    print(*splitting.described(results), f"{arguments.output}/{splitting.PLAN}", sep="\n")
    return 0


def parser():
    """The tool's options."""
    made = cli.parser(__doc__, EPILOG)
    made.add_argument("--model", metavar="RUN", required=True, help="a run folder with ternary weights")
    made.add_argument(
        "--data", metavar="DATA", required=True, help="labelled rows that choose: a file, or a folder's dev"
    )
    made.add_argument("--budget-bytes", type=int, metavar="N", help="bytes of all quantized layers' packed weights")
    made.add_argument("--budget-ratio", type=float, metavar="R", help="the same, as a share of the fp32 bytes")
    made.add_argument("--rows", type=int, metavar="N", help="choose on the first N rows; default: all")
    made.add_argument("--output", metavar="DIR", required=True, help="the folder to write to")
    return made


if __name__ == "__main__":
    run_tool(main)
