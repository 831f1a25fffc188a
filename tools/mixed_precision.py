"""Choose bits for each layer by measured sensitivity: the smallest model over an accuracy, or the best one in a size."""

from ernie_kqat import cli, config
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/mixed_precision.py --model FP32_FOLDER --data held.tsv --test dev.tsv --floor 0.885 --output DIR
  python tools/mixed_precision.py --model FP32_FOLDER --data held.tsv --budget-ratio 0.16 --range mse --output DIR

DIR gets plan.yaml (a config for tools/train.py -c and tools/export.py -c), frontier.json, frontier.csv, and measured.json,
from which a second call, also with another bound, goes on where the first was stopped. -c may set Data and
Slim.quant.activation. The rows of --data choose the plan, so its accuracy on them is optimistic: --test measures it again
on others. Sizes are of the Linears' weights with their bits packed, and their steps."""


def main() -> int:
    arguments = parser().parse_args()
    settings = cli.settings(arguments)
    from ernie_kqat.analysis import mixed, mixed_sections, tables

    quant = settings.Slim.quant or config.Quant()
    if quant.layers:
        raise UserError("Slim.quant.layers: leave it out; the rules are what this tool finds")
    names = ("model", "data", "calibration", "test", "floor", "budget_bytes", "budget_ratio", "rows", "points", "seed")
    options = mixed.Options(
        **{name: getattr(arguments, name) for name in names},
        bits=tuple(arguments.bits),
        granularity=arguments.granularity,
        range=arguments.range,
        activation=quant.activation,
        columns=settings.Data if arguments.config or arguments.override else None,
    )
    results = mixed.search(options, arguments.output)
    print(tables.text_of(mixed_sections.frontier_table(results)))
    print(*mixed_sections.findings(results), f"{arguments.output}/{mixed.PLAN}", sep="\n")
    return 0


def parser():
    """The tool's options."""
    made = cli.parser(__doc__, EPILOG)
    made.add_argument("--model", metavar="DIR", required=True, help="a fine-tuned fp32 model folder")
    made.add_argument(
        "--data", metavar="DATA", required=True, help="labelled rows that choose: a file, or a folder's dev"
    )
    made.add_argument("--test", metavar="DATA", help="labelled rows to measure the chosen plan on")
    made.add_argument("--calibration", metavar="DATA", help="rows that set input ranges; default: train beside --data")
    made.add_argument("--floor", type=float, metavar="ACCURACY", help="the smallest plan at or above it, as 0.885")
    made.add_argument("--budget-bytes", type=int, metavar="N", help="the most accurate plan of at most N bytes")
    made.add_argument("--budget-ratio", type=float, metavar="R", help="the same, as a share of the fp32 bytes")
    made.add_argument("--bits", type=int, nargs=2, default=[8, 4], metavar=("WIDE", "NARROW"), help="default: 8 4")
    made.add_argument(
        "--granularity",
        "--weight-granularity",
        choices=["channel", "tensor"],
        default="channel",
        help="default: channel",
    )
    made.add_argument(
        "--range", "--weight-range", choices=["absmax", "mse", "percentile"], default="mse", help="default: mse"
    )
    made.add_argument("--rows", type=int, metavar="N", help="choose on the first N rows; default: all")
    made.add_argument(
        "--points", type=int, default=12, metavar="N", help="plans to measure before the bound's; default 12"
    )
    made.add_argument(
        "--seed", type=int, default=42, help="orders the calibration rows; default 42, as tools/export.py's"
    )
    made.add_argument("--output", metavar="DIR", required=True, help="the folder to write to")
    return made


if __name__ == "__main__":
    run_tool(main)
