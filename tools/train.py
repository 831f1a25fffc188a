"""Train an ERNIE classifier: fp32, PTQ or QAT, by one config."""

from ernie_kqat import cli, config
from ernie_kqat.errors import run_tool

EPILOG = """examples:
  python tools/train.py -c configs/ernie_sst2.yaml
  python tools/train.py -c configs/ernie_sst2.yaml -o Model.name_or_path=DIR Data.path=DIR Train.epochs=1 -o seed=7
  python tools/train.py -c configs/ernie_sst2.yaml --resume

The run folder (Global.output_dir) gets resolved.yaml, plan.txt, train.log, metrics.jsonl, kurtosis.json, summary.json,
best_model/ (a PaddleNLP folder) and checkpoints/. Ctrl-C stops after the running step; --resume continues."""


def main() -> int:
    parser = cli.parser(__doc__, EPILOG)
    parser.add_argument("--resume", action="store_true", help="continue the run in Global.output_dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in Global.output_dir")
    parser.add_argument(
        "--keys", action="store_true", help="print every config key with its default and meaning, and exit"
    )
    arguments = parser.parse_args()
    if arguments.keys:
        print("\n".join(config.describe()))
        return 0
    if not arguments.config:
        parser.error("-c FILE is needed (see configs/)")
    settings = cli.settings(arguments)
    from ernie_kqat.trainer import train  # Paddle takes seconds to load; a wrong config should not wait for it

    train(settings, resume=arguments.resume, overwrite=arguments.overwrite)
    return 0


if __name__ == "__main__":
    run_tool(main)
