"""Export a trained run, or a plain model folder by PTQ, to an INT8 Paddle Inference model that is verified."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

from ernie_kqat import cli, config, run_folder
from ernie_kqat.errors import run_tool

EPILOG = """examples:
  python tools/export.py -c configs/quickstart.yaml               the run of that config, to its inference/ folder
  python tools/export.py --run output/RUN --output DIR
  python tools/export.py --model FP32_FOLDER --calibration DATA --weight-granularity channel --output DIR     (PTQ)
  python tools/export.py --model FP32_FOLDER --calibration DATA --output DIR -o Slim.smoothquant.alpha=0.5
  python tools/export.py --run output/RUN --target tensorrt --output DIR                             (NVIDIA GPUs)

DATA is a file (.tsv .csv .jsonl, or .txt with a sentence a line) or a folder with train and dev files.
Exit code 0: exported and verified. 1: refused, the artifact is marked unverified. 2: wrong input."""


def main() -> int:
    parser = cli.parser(__doc__, EPILOG)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="DIR", help="a run folder of tools/train.py")
    source.add_argument(
        "--model", metavar="DIR", help="a fine-tuned fp32 model folder, quantized by calibration only (PTQ)"
    )
    parser.add_argument("--calibration", metavar="DATA", help="rows that set the activation ranges (with --model)")
    parser.add_argument("--weight-granularity", choices=["channel", "tensor"], help="(with --model)")
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens a sentence is cut to (with --model; default 128)"
    )
    parser.add_argument(
        "--verify", metavar="DATA", help="rows to verify on; default: the run's dev set, or --calibration's"
    )
    parser.add_argument(
        "--fp32", metavar="DIR", help="the fp32 model to compare a run with; default: the one it began from"
    )
    parser.add_argument(
        "--target", choices=["onednn", "tensorrt"], help="what is to run it (Export.target; default: as configured)"
    )
    parser.add_argument("--output", metavar="DIR", help="the artifact folder; default: RUN/inference")
    arguments = parser.parse_args()
    settings = cli.settings(arguments)
    if arguments.model and not (arguments.calibration and arguments.output):
        parser.error("--model needs --calibration DATA and --output DIR")
    run = arguments.run or (settings.Global.output_dir if arguments.config else None)
    if not (arguments.model or run):
        parser.error("what to export? -c CONFIG, --run DIR or --model DIR")
    from ernie_kqat.export import exporter

    if arguments.model:
        quant = settings.Slim.quant or config.Quant()
        if arguments.weight_granularity:
            quant = replace(quant, weight=replace(quant.weight, granularity=arguments.weight_granularity))
        manifest = exporter.export_folder(
            arguments.model,
            arguments.calibration,
            arguments.output,
            aimed(settings.Export, arguments.target),
            quant,
            arguments.max_length,
            arguments.verify,
            methods=settings.Slim.methods,
            columns=settings.Data,
        )
    else:
        limits = settings.Export if arguments.config or arguments.override else run_folder.read_settings(run).Export
        output = arguments.output or str(Path(run, cli.ARTIFACT))
        limits = aimed(limits, arguments.target)
        manifest = exporter.export_run(run, output, limits, arguments.verify, arguments.fp32)
    return report(manifest)


def aimed(limits: config.Export, target: Optional[Literal["onednn", "tensorrt"]]) -> config.Export:
    """With --target where it is given."""
    return replace(limits, target=target) if target else limits


def report(manifest: dict) -> int:
    """Print the verification; 0 if it passed, 1 if not."""
    from ernie_kqat.export.exporter import describe

    print("\n".join(describe(manifest)))
    if not manifest["verification"]["passed"]:
        print(f"REFUSED: {manifest['folder']} is marked unverified", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_tool(main)
