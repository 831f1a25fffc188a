"""Measure artifacts side by side: milliseconds a sentence, one at a time and in batches, on rows of real length."""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path

from ernie_kqat import benchmark, cli, files
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/benchmark.py -c configs/quickstart.yaml
  python tools/benchmark.py --model output/RUN/inference --data dev.tsv
  python tools/benchmark.py --model INT8 --model FP32 --data dev.tsv --repeats 9 --output result.json
  python tools/benchmark.py --model FP32_FOLDER --data DIR --against openvino,onnxruntime,paddleslim --output results.json

DATA is a file (.tsv .csv .jsonl, or .txt with a sentence a line) or a folder with a dev file. Labels are not needed. The
models take turns, pass by pass, so that what else the machine does falls on all of them. Give the same model twice to see
the noise.
`spread` is (slowest pass - fastest pass) / median: smaller differences mean nothing. Tokenization is not included.
`load` is the time from the folder to a predictor that is ready, its files' hashes checked.
The last line of the output is JSON with all figures, the machine and the versions.

--against: the model is an fp32 folder (of PaddleNLP), DIR has train and dev files. Every engine is made of that one model,
the INT8 ones calibrated on the same rows, ours by SmoothQuant unless -c or -o say another Slim section; then they take turns
over batches of 1, 8 and 32 sentences, of natural and of fixed length. Peers are installed at first use, each into a virtual
environment of its own. FILE.svg beside --output FILE.json is the figure."""


def main() -> None:
    parser = cli.parser(__doc__, EPILOG)
    parser.add_argument(
        "--model",
        action="append",
        metavar="ARTIFACT",
        help="a folder of tools/export.py; may be repeated; default: the one of -c's run",
    )
    parser.add_argument("--data", metavar="DATA", help="rows to measure on; default: -c's dev set")
    parser.add_argument("--text", metavar="COLUMN", help="column of the sentence, if it is not found by its name")
    parser.add_argument("--text-pair", metavar="COLUMN", help="column of the second sentence, likewise")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="the first N rows of the file (default 1000; 256 with --against)"
    )
    parser.add_argument(
        "--batch", action="append", type=int, metavar="N", help="a batch size; may be repeated (default 1 and 32)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="passes over the rows (default 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="cores of one forward (default 1)")
    parser.add_argument(
        "--engine", action="append", choices=["auto", "paddle", "native"], help="of each --model, in turn"
    )
    parser.add_argument(
        "--against", metavar="PEERS", help="race peers: of openvino, onnxruntime, paddleslim; with commas"
    )
    parser.add_argument("--output", "--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    if arguments.against is not None:
        race(parser, arguments)
        return
    if arguments.engine and len(arguments.engine) != len(arguments.model or [""]):
        parser.error("--engine: give none, or one for each --model")
    arguments.rows = 1000 if arguments.rows is None else arguments.rows
    if arguments.rows < 1:
        parser.error(f"--rows {arguments.rows} is under 1")
    arguments.model = arguments.model or [cli.artifact_of(arguments)]
    arguments.data = arguments.data or cli.settings(arguments).Data.path
    if not arguments.data:
        parser.error("which rows? --data DATA, or -c CONFIG with Data.path")
    sizes = sorted(set(arguments.batch or [1, 32]))
    result = measure(arguments, sizes)
    print("\n".join(table(result["models"], sizes)))
    if arguments.output:
        files.write_json(arguments.output, result)
    print(json.dumps(result, ensure_ascii=False))


def race(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """--against."""
    if not arguments.model or len(arguments.model) != 1 or not arguments.data:
        parser.error("--against: needs one --model FP32_FOLDER and --data DIR")
    if arguments.batch or arguments.engine:
        parser.error("--against: has batches and engines of its own; leave --batch and --engine out")
    from ernie_kqat.peers import candidates, report
    from ernie_kqat.peers.race import run

    slim = cli.settings(arguments).Slim
    found = run(
        arguments.model[0],
        arguments.data,
        [peer for peer in arguments.against.split(",") if peer],
        slim if slim.quant else candidates.RECIPE,
        arguments.rows or 256,
        arguments.repeats,
        arguments.threads,
    )
    print("\n".join(report.table(found)))
    if arguments.output:
        files.write_json(arguments.output, found)
        report.draw(found, str(Path(arguments.output).with_suffix(".svg")))
    print(json.dumps(found["summary"]))


def measure(arguments: argparse.Namespace, sizes: list[int]) -> dict:
    """All that the JSON holds."""
    from ernie_kqat.data.dataset import find_file
    from ernie_kqat.predictor import Predictor  # Paddle takes a second to load; --help should not wait for it

    predictors, encoded, tokens, loads = {}, {}, {}, {}
    engines = arguments.engine or ["auto"] * len(arguments.model)
    for number, (folder, engine) in enumerate(zip(arguments.model, engines), 1):
        name = f"{folder} ({number})" if folder in predictors else folder
        loads[name] = partial(Predictor, folder, arguments.threads, allow_unverified=True, engine=engine)
        predictors[name] = loads[name]()
    task = next(iter(predictors.values())).task
    path = Path(arguments.data)
    path = find_file(path, "dev", None, task.suffixes) if path.is_dir() else path
    found = task.read(path, arguments.text, arguments.text_pair, None, require_label=False)
    examples = list(itertools.islice(found, arguments.rows))
    texts, pairs = [example.text for example in examples], [example.text_pair for example in examples]
    for name in predictors:
        if predictors[name].pair and None in pairs:
            raise UserError(f"{name}: a model of pairs, and {arguments.data} has no second sentence (--text-pair)")
        rows = predictors[name].encode(texts, pairs if predictors[name].pair else None)
        encoded[name] = [window for row in rows for window in row.windows]
        tokens[name] = sum(len(ids) for ids, _ in encoded[name]) / len(encoded[name])
    load_ms = benchmark.load_ms(loads, arguments.repeats)
    found = benchmark.latency_ms(predictors, encoded, sizes, arguments.repeats)
    return {
        "data": str(path),
        "rows": len(examples),
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "machine": benchmark.machine(),
        "versions": benchmark.versions(),
        "models": {
            name: {
                "engine": _engine(predictors[name]),
                "mean_tokens": round(tokens[name], 1),
                "load_ms": load_ms[name],
                **figures,
            }
            for name, figures in found.items()
        },
    }


def _engine(predictor) -> str:
    return "native" if predictor.engine == "native" else predictor.manifest["engine"]


def table(models: dict[str, dict], sizes: list[int]) -> list[str]:
    """Milliseconds a sentence; one model a line."""
    titles = {"engine": "engine", "load_ms": "load: ms"}
    for size in sizes:
        titles[f"batch_{size}"] = f"batch {size}: ms"
        if size == 1:
            titles.update(batch_1_p90="p90", batch_1_p99="p99")
        titles[f"batch_{size}_spread"] = "spread"
        titles[f"batch_{size}_per_second"] = "per second"
    rows = [["model", *titles.values()]]
    rows += [[name, *(_cell(key, figures[key]) for key in titles)] for name, figures in models.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _cell(key: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if key.endswith("_spread"):
        return f"{value:.0%}"
    return f"{value:.0f}" if key == "load_ms" or key.endswith("_per_second") else f"{value:.2f}"


if __name__ == "__main__":
    run_tool(main)
