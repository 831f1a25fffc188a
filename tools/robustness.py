"""Accuracy when the weights' step is not the one trained for: step x 0.5 to 1.5, powers of two, other bit widths."""

from ernie_kqat import cli, config, strict
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/robustness.py --model FP32_FOLDER --data dev.tsv --range absmax --output robustness.json
  python tools/robustness.py --model PLAIN --model KURE --names plain KURE --data DATA --output r.json --report r.html

A model is a fine-tuned folder (weights by --bits, --granularity and --range) or a QAT run (its own steps and bits). Inputs are
quantized at calibrated ranges; -c may set Data and Slim.quant.activation. Every measured point is kept in the JSON, and a
second call measures only what is missing, so models can be added one by one."""


def main() -> int:
    arguments = parser().parse_args()
    settings = cli.settings(arguments)
    names = arguments.names or [model.rstrip("/").rpartition("/")[2] for model in arguments.model]
    if len(names) != len(arguments.model):
        raise UserError(f"--names: {len(names)} found where {len(arguments.model)} are needed, one for each --model")
    quant = settings.Slim.quant or config.Quant()
    if quant.layers:
        raise UserError("Slim.quant.layers: leave it out; a model folder is measured with one width for all layers")
    weight = {"bits": arguments.bits, "granularity": arguments.granularity, "range": arguments.range}
    from ernie_kqat.analysis import report, robustness, tables

    options = robustness.Options(
        data=arguments.data,
        quant=config.Quant(strict.build(config.WeightQuant, weight, "weight", "command line"), quant.activation),
        calibration=arguments.calibration,
        fp32_activations=arguments.fp32_activations,
        rows=arguments.rows,
        columns=settings.Data if arguments.config or arguments.override else None,
    )
    results = robustness.measure(dict(zip(arguments.model, names)), options, arguments.output)
    print(tables.text_of(robustness.table(robustness.curves(results))))
    if arguments.report:
        title = "Robustness to the quantization step"
        report.write(arguments.report, title, f"Measured on {arguments.data}.", robustness.sections(results))
    return 0


def parser():
    """The tool's options."""
    made = cli.parser(__doc__, EPILOG)
    made.add_argument(
        "--model", metavar="DIR", action="append", required=True, help="a model folder or run; repeatable"
    )
    made.add_argument(
        "--names", metavar="NAME", nargs="+", help="what to call the models; default: their folders' names"
    )
    made.add_argument(
        "--data", metavar="DATA", required=True, help="labelled rows: a file, or a folder with a dev file"
    )
    made.add_argument("--calibration", metavar="DATA", help="rows that set input ranges; default: train beside --data")
    made.add_argument("--bits", type=int, default=4, metavar="N", help="of a model folder's weights, 2..8; default 4")
    made.add_argument(
        "--granularity", "--weight-granularity", choices=["channel", "tensor"], default="tensor", help="default: tensor"
    )
    made.add_argument(
        "--range", "--weight-range", choices=["absmax", "mse", "percentile"], default="absmax", help="default: absmax"
    )
    made.add_argument("--fp32-activations", action="store_true", help="leave the layers' inputs in fp32")
    made.add_argument("--rows", type=int, metavar="N", help="measure on the first N rows; default: all")
    made.add_argument("--output", metavar="FILE.json", required=True, help="where the points are kept")
    made.add_argument(
        "--report", metavar="FILE.html", help="also write a page with the curves of all models in the JSON"
    )
    return made


if __name__ == "__main__":
    run_tool(main)
