"""Analyze what quantization does to a model, or to two: weights, activations, sensitivity of each layer; an HTML report."""

from ernie_kqat import cli
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/analyze.py --model ernie-2.0-base-en --output DIR             weights only; no data needed
  python tools/analyze.py --model FP32_FOLDER --data DATA --output DIR       and activations, and each layer's sensitivity
  python tools/analyze.py --model FP32_FOLDER --compare output/RUN --data DATA --output DIR             before and after
  python tools/analyze.py -c configs/ernie_sst2.yaml --rows 256 --output DIR                  the run of that config

DATA is a labelled file or a folder with train and dev files; rows without labels give activations, no sensitivity.
DIR gets layers.csv, analysis.json, report.html (one page, needs no network), and sensitivity.json, from which a second call
with the same settings goes on where the first was stopped."""


def main() -> int:
    arguments = parser().parse_args()
    settings = cli.settings(arguments)
    model = arguments.model or (settings.Global.output_dir if arguments.config else None)
    if not model:
        raise UserError("which model? --model MODEL, or -c CONFIG for its run")
    data = arguments.data or (settings.Data.path if arguments.config else None)
    from ernie_kqat.analysis import analyze, sections, tables

    options = analyze.Options(
        model=model,
        compare=arguments.compare,
        data=data,
        calibration=arguments.calibration,
        rows=arguments.rows,
        bits=arguments.bits,
        granularity=arguments.granularity,
        range=arguments.range,
        sensitivity=not arguments.no_sensitivity,
        columns=settings.Data if arguments.config or arguments.override else None,
    )
    given = {"robustness": arguments.robustness, "mixed": arguments.mixed}
    extra = [section for kind, path in given.items() if path for section in analyze.extra_sections(kind, path)]
    found = analyze.analyze(options, arguments.output)
    path = sections.write(arguments.output, options, found, extra)
    print(tables.text_of(tables.layer_table(options, found, None if arguments.all else 10)))
    print("", *sections.findings(options, found), path, sep="\n")
    return 0


def parser():
    """The tool's options."""
    made = cli.parser(__doc__, EPILOG)
    made.add_argument("--model", metavar="MODEL", help="a PaddleNLP name, a model folder or a run; default: -c's run")
    made.add_argument("--compare", metavar="MODEL", help="a second one: the first is `before`, this is `after`")
    made.add_argument("--data", metavar="DATA", help="a file, or a folder with a dev file; default: -c's")
    made.add_argument(
        "--calibration", metavar="DATA", help="rows that set activation ranges; default: train beside --data"
    )
    made.add_argument("--rows", type=int, metavar="N", help="measure on the first N rows; default: all")
    made.add_argument("--bits", type=int, default=4, metavar="N", help="of the weights in the sensitivity; default 4")
    made.add_argument("--granularity", choices=["tensor", "channel"], default="tensor", help="default: tensor")
    made.add_argument("--range", choices=["absmax", "mse"], default="absmax", help="default: absmax")
    made.add_argument("--no-sensitivity", action="store_true", help="leave out what needs two evaluations a layer")
    made.add_argument("--robustness", metavar="FILE", help="JSON of tools/robustness.py to put into the report")
    made.add_argument("--mixed", metavar="FILE", help="JSON of tools/mixed_precision.py to put into the report")
    made.add_argument("--all", action="store_true", help="print all layers, not the 10 worst")
    made.add_argument("--output", metavar="DIR", required=True, help="the folder to write to")
    return made


if __name__ == "__main__":
    run_tool(main)
