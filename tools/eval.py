"""Evaluate a run, a model folder or an exported artifact on labelled rows; ends with one JSON line."""

import json

from ernie_kqat import cli
from ernie_kqat.errors import run_tool

EPILOG = """examples:
  python tools/eval.py --model output/RUN --data dev.tsv            a run: its best model, quantized as trained
  python tools/eval.py --model output/RUN/best_model --data DIR     a PaddleNLP model folder, in fp32
  python tools/eval.py --model output/RUN/inference --data DIR      an artifact, by Paddle Inference
  python tools/eval.py --model model.kqat --data DIR                a packed artifact (tools/pack.py)
  python tools/eval.py -c configs/quickstart.yaml                   the run of that config on its dev set"""


def main() -> int:
    parser = cli.parser(__doc__, EPILOG)
    parser.add_argument("--model", metavar="DIR", help="a run, a model folder or an artifact; default: -c's run")
    parser.add_argument("--data", metavar="DATA", help="a file, or a folder with a dev file; default: -c's")
    arguments = parser.parse_args()
    settings = cli.settings(arguments)
    model = arguments.model or (settings.Global.output_dir if arguments.config else None)
    data = arguments.data or settings.Data.path
    if not model or not data:
        parser.error("--model DIR and --data DATA are needed, or -c CONFIG that names them")
    from ernie_kqat.measure import evaluate_any

    print(json.dumps(evaluate_any(model, data, settings.Data)))
    return 0


if __name__ == "__main__":
    run_tool(main)
