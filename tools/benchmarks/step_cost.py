"""What a training step of each low-bit method costs, as a ratio to an fp32 step on the same batches, in turn, in one process.

Ends with one JSON line: for each method the median of (its step / the fp32 step before it), and quartiles; also in CPU time."""

import inspect
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import paddle

import ernie_kqat
from ernie_kqat import cli, config, machine
from ernie_kqat.calibration import calibrate
from ernie_kqat.errors import run_tool
from ernie_kqat.run_folder import RunFolder
from ernie_kqat.trainer import Trainer

LSQ = {"weight": {"quantizer": "lsq", "bits": 4}, "activation": {"quantizer": "lsq", "calibration_batches": 1}}
MINMAX = {"weight": {"bits": 4, "range": "mse"}, "activation": {"range": "mse", "calibration_batches": 1}}
CAP = {"targets": {"cap": 2.5}, "apply": "decoupled"}
FP32, STATIC, VIEWS = "fp32", "fp32, to_static", "fp32, views"


def sections(teacher: str) -> dict[str, dict]:
    """Slim's sections, by what the table calls them."""
    logits = {"teacher": teacher, "task": 0.0}

    def low(quantizer: str, bits: int) -> dict:
        return {"quant": {**MINMAX, "weight": {"quantizer": quantizer, "bits": bits}}}

    return {
        FP32: {},
        STATIC: {},
        VIEWS: {},  # without strides.dense
        "min-max": {"quant": MINMAX},
        "min-max, absmax": {"quant": {"weight": {"bits": 8}, "activation": {"calibration_batches": 1}}},
        "LSQ": {"quant": LSQ},
        "LSQ + cap": {"quant": LSQ, "kurtosis": CAP},
        "LSQ + KD, logits": {"quant": LSQ, "distill": logits},
        "LSQ + KD": {"quant": LSQ, "distill": {**logits, "hidden": 1.0, "attention": 1.0}},
        "SQuAT": {"quant": LSQ, "squat": {}},
        "ternary": low("ternary", 2),
        "binary": low("binary", 1),
    }


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="the task's folder: train.tsv and dev.tsv")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    parser.add_argument("--repeats", type=int, default=20, help="steps of each method")
    parser.add_argument("--max-length", type=int, default=64, help="tokens")
    arguments = parser.parse_args()
    wanted = {
        name: section
        for name, section in sections(arguments.model).items()
        if name == FP32 or not arguments.methods or name in arguments.methods
    }
    trainers = {name: made(section, arguments) for name, section in wanted.items()}
    if STATIC in trainers:
        trainers[STATIC].model = paddle.jit.to_static(trainers[STATIC].model)
    wall: dict[str, list[float]] = {name: [] for name in trainers}
    busy: dict[str, list[float]] = {name: [] for name in trainers}
    steps = [list(itertools.islice(one._remaining_steps(), arguments.repeats + 2)) for one in trainers.values()]
    for repeat, batches in enumerate(zip(*steps)):
        for (name, trainer), batch in zip(trainers.items(), batches):
            step = inspect.unwrap(Trainer._step) if name == VIEWS else Trainer._step
            began = time.perf_counter(), time.process_time()
            step(trainer, batch)
            trainer.progress.step += 1
            if repeat >= 2:  # the first two warm up
                wall[name].append(time.perf_counter() - began[0])
                busy[name].append(time.process_time() - began[1])
    found = {
        "ratios": {name: ratios(wall, name) for name in trainers},
        "cpu_time_ratios": {name: ratios(busy, name) for name in trainers},
        "fp32_step_ms": round(1e3 * statistics.median(wall[FP32]), 1),
        "settings": {"repeats": arguments.repeats, "max_length": arguments.max_length},
        "ernie_kqat": ernie_kqat.__version__,
        "paddle": paddle.__version__,
        "machine": machine.machine()["cpu"],
    }
    print(json.dumps(found))
    return 0


def made(section: dict, arguments) -> Trainer:
    """A trainer that is calibrated and ready to step; every one meets the same batches."""
    override = [f"Model.name_or_path={arguments.model}", f"Data.path={arguments.data}", "Model.dropout=0.0"]
    override += [f"Data.max_length={arguments.max_length}", "Data.dev_rows=32", "Data.train_rows=12800"]
    override += [f"Slim.{key}={json.dumps(value)}" for key, value in section.items()]
    settings = config.from_overrides([*override, *arguments.override])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(settings, RunFolder(Path(scratch, "run"), settings))
    if trainer.qat is not None:
        count = trainer.qat.calibration_batches()
        calibrate(trainer.model, map(trainer._batch, trainer._order(0)[:count]), trainer.methods)
    trainer.model.train()
    return trainer


def ratios(times: dict[str, list[float]], name: str) -> list[float]:
    """Lower quartile, median, upper quartile of the ratios to the fp32 step of the same batches."""
    pairs = [a / b for a, b in zip(times[name], times[FP32])]
    return [round(value, 3) for value in statistics.quantiles(pairs, n=4)] if len(pairs) > 1 else pairs


if __name__ == "__main__":
    run_tool(main)
