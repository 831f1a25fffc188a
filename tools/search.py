"""Search config keys for accuracy, size by size: trials are trained, pruned when bad, exported, packed and compared."""

from pathlib import Path

from ernie_kqat import cli
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/search.py -c configs/ernie_sst2_minilm_lsq.yaml --space configs/search/sst2_minilm.yaml --trials 8 \\
      --output output/search -o Data.path=DIR

The space file has the keys that are searched (`search`: a list of values, or {low, high, log}), and those of which every
combination gets a search of its own, of --trials trials (`each`: weight bits, say: what accuracy is traded against).
Each trial is a run like tools/train.py's, in a folder of OUTPUT. One that is worse on dev than the median of the others at
the same step is ended. The others are exported (verified, or they count as failed) and packed. Stopped, it goes on with the
same command.
OUTPUT gets trials.json, pareto.svg, and of each trial its run with best_model/, inference/ and packed.

Dev chose the values, so it flatters them: --test measures the winners on rows that chose nothing."""


def main() -> int:
    parser = cli.parser(__doc__, EPILOG)
    parser.add_argument("--space", required=True, metavar="FILE", help="YAML: which keys, which values")
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="of each combination; default 10")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write to, or to go on in")
    parser.add_argument("--test", metavar="DATA", help="labelled rows to measure the winners on")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of values; the runs' own is Global.seed")
    arguments = parser.parse_args()
    if not arguments.config:
        raise UserError("which config? -c CONFIG: every trial begins with it")
    if arguments.trials < 1:
        raise UserError(f"--trials: {arguments.trials} is under 1")
    from ernie_kqat.search import report, run, space

    options = run.Options(
        path=arguments.config,
        overrides=arguments.override,
        space=space.read(arguments.space),
        trials=arguments.trials,
        output=Path(arguments.output),
        seed=arguments.seed,
        test=arguments.test,
    )
    found = run.search(options)
    report.draw(found, options.output / "pareto.svg")
    print("\n".join(report.table(found)), f"{options.output}/{run.TRIALS}", f"{options.output}/pareto.svg", sep="\n")
    return 0


if __name__ == "__main__":
    run_tool(main)
