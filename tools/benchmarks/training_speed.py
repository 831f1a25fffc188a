"""Samples a second of quantization-aware training (W8A8): ours against PaddleNLP's Trainer.compress(strategy="qat").

The same rows from the same fp32 model, batches of the same size, one thread. Each takes its own batches of them (ours of like
lengths, PaddleNLP's at random), in a process of its own, in turn. The time is that of the steps, from the first to the last, data
included.
Ends with one JSON line: samples a second (medians), their ratio, also in CPU time, and the peak memory of each process."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ernie_kqat import cli
from ernie_kqat.errors import run_tool

WARM_UP = 3  # steps that are not counted
WAYS = ("ours", "paddlenlp")


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="the task's folder: train.tsv and dev.tsv")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of one process; default 40")
    parser.add_argument("--batch-size", type=int, default=32, help="rows; default 32")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each; default 3")
    parser.add_argument("--max-length", type=int, default=64, help="tokens; default 64")
    parser.add_argument("--one", choices=WAYS, help="(for the child processes)")
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            clock = {"ours": ours, "paddlenlp": paddlenlp}[arguments.one](arguments, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**clock.speeds(arguments.batch_size), "peak_mb": round(peak)}))
        return 0
    found = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way in WAYS:
            found[way].append(child(way))
            print(way, found[way][-1], flush=True)
    print(json.dumps(summary(found, arguments)))
    return 0


def child(way: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *sys.argv, "--one", way], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: dict[str, list[dict]], arguments) -> dict:
    from ernie_kqat import __version__, machine

    names = ("samples_per_s", "samples_per_cpu_s", "peak_mb")
    medians = {
        way: {name: statistics.median(row[name] for row in rows) for name in names} for way, rows in found.items()
    }
    speeds = {way: [row["samples_per_s"] for row in rows] for way, rows in found.items()}
    return {
        **medians,
        "ratio": round(medians["ours"]["samples_per_s"] / medians["paddlenlp"]["samples_per_s"], 3),
        "cpu_time_ratio": round(medians["ours"]["samples_per_cpu_s"] / medians["paddlenlp"]["samples_per_cpu_s"], 3),
        "spread": {way: round(max(each) / min(each) - 1, 3) for way, each in speeds.items()},
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "repeats": arguments.repeats,
        "ernie_kqat": __version__,
        "machine": machine.machine()["cpu"],
    }


class Clock:
    """When each step began."""

    def __init__(self):
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def speeds(self, batch_size: int) -> dict[str, float]:
        counted = self.marks[WARM_UP:]
        wall, busy = (counted[-1][which] - counted[0][which] for which in (0, 1))
        rows = batch_size * (len(counted) - 1)
        return {"samples_per_s": round(rows / wall, 2), "samples_per_cpu_s": round(rows / busy, 2)}


def ours(arguments, folder: Path) -> Clock:
    from ernie_kqat.calibration import calibrate
    from ernie_kqat.run_folder import RunFolder
    from ernie_kqat.trainer import Trainer

    trainer = Trainer(made := settings(arguments, folder), RunFolder(folder / "run", made))
    calibrate(trainer.model, [trainer._batch(trainer._order(0)[0])])
    trainer.model.train()
    clock = Clock()
    for batches in trainer._remaining_steps():
        clock.mark()
        trainer._step(batches)
        trainer.progress.step += 1
    clock.mark()
    return clock


def settings(arguments, folder: Path):
    from ernie_kqat import config

    tree = {
        "Global": {"output_dir": str(folder / "run"), "seed": 1},
        "Model": {"name_or_path": arguments.model},
        "Data": {
            "path": arguments.data,
            "max_length": arguments.max_length,
            "train_rows": arguments.steps * arguments.batch_size,
            "dev_rows": 32,
        },
        "Slim": {"quant": {"weight": {"bits": 8}, "activation": {"calibration_batches": 1}}},
        "Train": {"epochs": 1, "batch_size": arguments.batch_size},
    }
    return config.from_tree(tree, "benchmark")


def paddlenlp(arguments, folder: Path) -> Clock:
    """Its own loop, on the rows that ours reads, tokenized before."""
    import paddle
    from paddlenlp.data import DataCollatorWithPadding
    from paddlenlp.trainer import CompressionArguments, Trainer
    from paddlenlp.transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ernie_kqat.data.dataset import load_task_data
    from ernie_kqat.tokenizer import load_tokenizer

    made = settings(arguments, folder)
    rows = load_task_data(made.Data, load_tokenizer(Path(arguments.model)), made.Global.seed)
    clock, loss = Clock(), paddle.nn.CrossEntropyLoss()

    def criterion(logits, labels):
        if paddle.is_grad_enabled():
            clock.mark()
        return loss(logits, labels)

    options = CompressionArguments(
        output_dir=str(folder / "compressed"),
        strategy="qat",
        device="cpu",
        max_steps=arguments.steps,
        save_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        logging_steps=10**6,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(arguments.model),
        criterion=criterion,
        args=options,
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(arguments.model)),
        train_dataset=listed(rows.train),
        eval_dataset=listed(rows.dev),
    )
    trainer.compress()
    return clock


def listed(split) -> list[dict]:
    return [
        {"input_ids": list(map(int, ids)), "token_type_ids": list(map(int, types)), "labels": int(label)}
        for ids, types, label in zip(split.input_ids, split.token_type_ids, split.labels)
    ]


if __name__ == "__main__":
    run_tool(main)
