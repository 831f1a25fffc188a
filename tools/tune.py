"""Find how many predictors of how many threads answer fastest on this machine, and keep it in the artifact."""

from __future__ import annotations

import json
from pathlib import Path

from ernie_kqat import cli
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/tune.py -c configs/quickstart.yaml
  python tools/tune.py --model output/RUN/inference --data dev.tsv --cores 4

Afterwards `Predictor(ARTIFACT)` and tools/infer.py use what was found, on a machine with that CPU. What they are told goes
before it. A call of many sentences is shared by the instances; single sentences gain nothing from them."""


def main() -> None:
    parser = cli.parser(__doc__, EPILOG)
    parser.add_argument("--model", metavar="ARTIFACT", help="a folder of tools/export.py; default: the one of -c's run")
    parser.add_argument("--data", metavar="DATA", help="rows to measure on, a file or a folder; default: -c's dev set")
    parser.add_argument("--rows", type=int, default=512, metavar="N", help="the first N rows of it (default 512)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="sentences of a batch, at most (default 32)")
    parser.add_argument("--cores", type=int, metavar="N", help="default: all that this process may use")
    arguments = parser.parse_args()
    folder = Path(cli.artifact_of(arguments))
    data = arguments.data or cli.settings(arguments).Data.path
    if not data:
        parser.error("which rows? --data DATA, or -c CONFIG with Data.path")
    if folder.is_file():
        raise UserError(f"{folder}: a packed artifact has no place for it; tune the folder that it was packed from")
    from ernie_kqat import tuning
    from ernie_kqat.data.dataset import load_eval_split
    from ernie_kqat.machine import machine
    from ernie_kqat.predictor import Predictor

    reader = Predictor(folder)
    split = load_eval_split(
        data, reader.tokenizer, None, reader.max_length, rows=arguments.rows, pair=reader.pair, task=reader.task
    )
    rows = list(zip(split.input_ids, split.token_type_ids))
    found = tuning.measure(folder, rows, arguments.cores or machine()["cores"], arguments.batch)
    print("instances  threads  sentences/s  spread")
    for one in found["tried"]:
        print(
            f"{one['instances']:9d}  {one['threads']:7d}  {one['sentences_per_s']:11.0f}  {one['spread']:6.0%}",
            flush=True,
        )
    tuning.save(folder, found)
    print(f"kept in {folder / 'manifest.json'}")
    print(json.dumps(found))


if __name__ == "__main__":
    run_tool(main)
