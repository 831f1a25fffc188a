"""Kurtosis regularization from a fine-tuned fp32 model, on SST-2 or another task: which policy, which ranges, which bits.

  select  seed 0, every candidate, fine-tuned without quantizers, then rounded; judged on rows held back from train
  ptq     the fp32 model, and it fine-tuned with each policy (KURE's own use), rounded at every cell; judged on dev
  qat     quantization-aware training at every cell, with each policy; judged on dev

Each finished row goes to docs/results/kurtosis_runs.json; rows already there are skipped. `--worker 1/2` and `--worker 2/2`
share the rows between two processes. tools/studies/kurtosis_tables.py makes the tables and figures."""

import gc
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from ledger import ROOT, Ledger, trained

from ernie_kqat import cli, config, files
from ernie_kqat.calibration import calibrate_rows
from ernie_kqat.data.dataset import Split, load_eval_split
from ernie_kqat.data.readers import read_examples
from ernie_kqat.errors import run_tool
from ernie_kqat.evaluate import accuracy, comparison, logits_of
from ernie_kqat.export import exporter
from ernie_kqat.models.folder import labels_of
from ernie_kqat.predictor import Predictor
from ernie_kqat.restore import restore_folder, restore_run
from ernie_kqat.tokenizer import load_tokenizer

WORK = Path("output/studies/kurtosis")
CONFIG = "configs/ernie_sst2_minilm_cap.yaml"
HELD, TRAIN = 1000, 12800  # rows of train: held back for choosing, and to train on
SEEDS = [1, 2, 3]
STEPS = {"fine-tuning": 150, "qat": 60}

LOSS = {"apply": "loss", "loss": "squared"}
DECOUPLED = {"apply": "decoupled"}
POLICIES = {
    "none": None,
    "fixed 1.8, loss, lambda 1": {"targets": {"fixed": 1.8}, **LOSS, "lambda": 1.0},
    "fixed 1.8, loss, lambda 1e-3": {"targets": {"fixed": 1.8}, **LOSS, "lambda": 1e-3},
    "fixed 1.8, loss, lambda 1e-5": {"targets": {"fixed": 1.8}, **LOSS, "lambda": 1e-5},
    "fixed 1.8, relative loss, lambda 1": {"targets": {"fixed": 1.8}, "loss": "relative", "lambda": 1.0},
    "fixed 1.8, relative loss, balance 0.3": {"targets": {"fixed": 1.8}, "balance": 0.3, "lambda": 1e3},
    "pretrained, loss, lambda 1": {"targets": "pretrained", "lambda": 1.0},
    "cap 2.5, relative loss, balance 0.3": {"targets": {"cap": 2.5}, "balance": 0.3, "lambda": 1e3},
    "fixed 1.8, decoupled": {"targets": {"fixed": 1.8}, **DECOUPLED},
    "shrink 0.5, decoupled": {"targets": {"shrink": 0.5}, **DECOUPLED},
    "shrink 0.9, decoupled": {"targets": {"shrink": 0.9}, **DECOUPLED},
    "anneal 2.2, decoupled": {"targets": {"anneal": 2.2}, "anneal_steps": 100, **DECOUPLED},
    "cap 4, decoupled": {"targets": {"cap": 4}, **DECOUPLED},
    "cap 3, decoupled": {"targets": {"cap": 3}, **DECOUPLED},
    "cap 2.5, decoupled": {"targets": {"cap": 2.5}, **DECOUPLED},
    "cap 2.2, decoupled": {"targets": {"cap": 2.2}, **DECOUPLED},
    "cap 2, decoupled": {"targets": {"cap": 2.0}, **DECOUPLED},
    "cap 2.2 per channel, decoupled": {"targets": {"cap": 2.2}, "granularity": "channel", **DECOUPLED},
}
CELLS = [  # weight bits, granularity, range: the order of the work
    (bits, granularity, range_)
    for bits, granularity in (
        (2, "channel"),
        (4, "tensor"),
        (3, "channel"),
        (2, "tensor"),
        (4, "channel"),
        (8, "channel"),
    )
    for range_ in ("mse", "absmax")
]


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("stage", choices=["select", "ptq", "qat"])
    parser.add_argument("--fp32", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="the task's folder: train.tsv and dev.tsv")
    parser.add_argument("--task", default="SST-2", help="what the rows are to say of --data")
    parser.add_argument("--max-length", type=int, default=64, help="tokens")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="as 4-tensor-mse; default: all")
    parser.add_argument("--worker", default="1/1", metavar="I/N", help="take every N-th row, beginning with the I-th")
    arguments = parser.parse_args()
    study = Study(arguments)
    index, count = map(int, arguments.worker.split("/"))
    for work in list(study.plan())[index - 1 :: count]:
        study.do(work)
    return 0


class Study:
    """What each row needs: data split three ways, settings, figures."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.ledger = Ledger(ROOT / "docs/results/kurtosis_runs.json")
        self.work = WORK / arguments.task
        self.data = split_data(Path(arguments.data), self.work / "data")
        self.cells = [cell for cell in CELLS if not arguments.cells or "-".join(map(str, cell)) in arguments.cells]
        self.tokenizer = load_tokenizer(arguments.fp32)
        self.labels = labels_of(Path(arguments.fp32))
        self.fp32: dict[Path, np.ndarray] = {}  # logits of the models that are rounded at many cells

    def plan(self):
        """(policy, seed, cell) of each row; cell None: fine-tuned without quantizers."""
        policies, stage = self.arguments.policies, self.arguments.stage
        if stage == "select":
            yield from ((policy, 0, None) for policy in policies)
        if stage == "ptq":
            yield ("start", 0, None)
            yield from ((policy, seed, None) for policy in policies for seed in self.arguments.seeds)
        if stage == "qat":
            for cell in self.cells:
                yield from ((policy, seed, cell) for seed in self.arguments.seeds for policy in policies)

    def do(self, work) -> None:
        """Train, measure, append the rows."""
        policy, seed, cell = work
        stage = self.arguments.stage
        wanted = [cell] if cell else self.cells
        if stage == "select":
            wanted = [(4, "tensor", "absmax"), (3, "channel", "absmax"), (2, "channel", "mse")]
        if not [one for one in wanted if not self.has(policy, seed, one)]:
            return
        if policy == "start":
            folder, common = Path(self.arguments.fp32), {"command": "-"}
        else:
            folder, common = self.trained(policy, seed, cell)
        for one in wanted:
            if not self.has(policy, seed, one):
                self.ledger.append({**self.key(policy, seed, one), **self.measure(folder, one, stage, seed), **common})
            gc.collect()  # Paddle's layers and optimizers are cycles; a dozen of them fill the memory

    def trained(self, policy: str, seed: int, cell) -> tuple[Path, dict]:
        """The run of one row (made, or found), and what all its rows say of it."""
        name = "-".join([*map(str, cell or ["fp32"]), policy, str(seed)]).replace(", ", "-").replace(" ", "_")
        folder = self.work / "runs" / name
        override = [f"Global.output_dir={folder}", f"Global.seed={seed}", f"Data.path={self.data}"]
        override += [f"Data.max_length={self.arguments.max_length}", "Data.dev_rows=100"]  # nothing is chosen by dev
        override += [f"Model.name_or_path={self.arguments.fp32}", "Data.train_rows=null", *self.arguments.override]
        if cell:
            weight = dict(zip(("bits", "granularity", "range"), cell))
            quant = {"weight": weight, "activation": {"bits": 8, "range": "mse"}}
            override += [f"Slim.quant={json.dumps(quant)}"]
            override += ["Train.learning_rate=5e-5"]
        steps = STEPS["qat" if cell else "fine-tuning"]
        override += [f"Train.max_steps={steps}", f"Train.eval_steps={steps}"]
        override.append(f"Slim.kurtosis={json.dumps(POLICIES[policy])}")
        return folder, trained(folder, CONFIG, override, {self.arguments.fp32: "FP32", str(self.data): "DATA"})

    def measure(self, folder: Path, cell, stage: str, seed: int) -> dict:
        """Simulated and (first seed) deployed accuracy of one model at one cell; without quantizers, where that is a model."""
        split = self.split("held.tsv" if stage == "select" else "dev.tsv")
        if stage == "qat":
            restored = restore_run(folder)
            simulated = logits_of(restored.model, split, restored.pad_token_id)
            found = {"simulated": accuracy(simulated, split.labels)}
        else:
            where = folder / "best_model" if (folder / "best_model").is_dir() else folder
            plain = restore_folder(where, config.Data(max_length=self.arguments.max_length))
            if where not in self.fp32:
                self.fp32[where] = logits_of(plain.model, split, plain.pad_token_id)
            restored = plain.quantized(quant_of(cell))
            calibrate_rows(restored, self.split("train.tsv"), seed)
            simulated = logits_of(restored.model, split, restored.pad_token_id)
            found = {
                "fp32": accuracy(self.fp32[where], split.labels),
                "simulated": accuracy(simulated, split.labels),
                **{f"{key}_with_fp32": value for key, value in comparison(simulated, self.fp32[where]).items()},
            }
        if stage != "select" and seed <= 1:
            deployed = deployed_logits(restored, split)
            found["deployed"] = accuracy(deployed, split.labels)
            found["deployed_agreement"] = comparison(deployed, simulated)["agreement"]
        if stage == "qat":
            shutil.rmtree(folder / "best_model")  # 120 of them would fill a disk; summary.json stays
        return found

    def split(self, name: str) -> Split:
        return load_eval_split(self.data / name, self.tokenizer, self.labels, self.arguments.max_length)

    def key(self, policy: str, seed: int, cell) -> dict:
        kurtosis = POLICIES.get(policy) or {}
        stage = {"select": "kure+ptq (held-back)", "qat": "qat", "ptq": "ptq" if policy == "start" else "kure+ptq"}
        return {
            "task": self.arguments.task,
            "stage": stage[self.arguments.stage],
            "policy": policy,
            "lambda": kurtosis.get("lambda") if kurtosis.get("apply") != "decoupled" else None,
            "seed": seed,
            "weight_bits": cell[0],
            "weight_granularity": cell[1],
            "weight_range": cell[2],
            "act_bits": 8,
        }

    def has(self, policy: str, seed: int, cell) -> bool:
        return self.ledger.has(self.key(policy, seed, cell))


def quant_of(cell) -> config.Quant:
    weight = config.WeightQuant(bits=cell[0], granularity=cell[1], range=cell[2])
    return config.Quant(weight=weight, activation=replace(config.ActivationQuant(), range="mse"))


def deployed_logits(restored, split: Split) -> np.ndarray:
    """What Paddle Inference computes from the exported INT8 program."""
    with tempfile.TemporaryDirectory() as folder:
        exporter.write_unverified(restored, load_tokenizer(restored.vocabulary), split, Path(folder, "artifact"))
        predictor = Predictor(Path(folder, "artifact"), allow_unverified=True)
        return predictor.logits(list(zip(split.input_ids, split.token_type_ids)))


def split_data(source: Path, target: Path) -> Path:
    """Folder with train.tsv, held.tsv (rows that train.tsv has not) and dev.tsv, the same for every row of the study."""
    if not (target / "dev.tsv").is_file():
        train, dev = (read_examples(source / name) for name in ("train.tsv", "dev.tsv"))
        order = np.random.default_rng(0).permutation(len(train))[: HELD + TRAIN]
        chosen = [train[index] for index in order]
        for name, rows in (("held.tsv", chosen[:HELD]), ("train.tsv", chosen[HELD:]), ("dev.tsv", dev)):
            names = ["text", "text_pair", "label"] if rows[0].text_pair is not None else ["text", "label"]
            lines = ["\t".join(names), *("\t".join(getattr(row, name) for name in names) for row in rows)]
            files.write_text(target / name, "\n".join(lines) + "\n")
    return target


if __name__ == "__main__":
    run_tool(main)
