"""Low-bit methods on SST-2 from a fine-tuned fp32 model: bits x method x seed, 12,800 rows each, the last step's model.

  select  W1A8, W2A8 and W4A8, seed 0, learning rates of each method; judged on 1,000 rows held back from train
  train   every cell and seed at the chosen learning rate; judged on dev: simulated, deployed, sharpness

Each finished row goes to docs/results/lowbit_runs.json; rows already there are skipped. A split row needs its seed's ternary
row, and makes it. tools/studies/lowbit_tables.py makes the tables."""

import gc
import json
import shutil
from pathlib import Path

from kurtosis import deployed_logits, split_data
from ledger import ROOT, Ledger, trained

from ernie_kqat import cli
from ernie_kqat.data.batching import collate, eval_batches
from ernie_kqat.data.dataset import load_eval_split
from ernie_kqat.errors import UserError, run_tool
from ernie_kqat.evaluate import accuracy, comparison, logits_of
from ernie_kqat.methods.squat import sharpness
from ernie_kqat.models.folder import labels_of
from ernie_kqat.restore import restore_run
from ernie_kqat.tokenizer import load_tokenizer

WORK = Path("output/studies/lowbit")
CONFIG = "configs/ernie_sst2_minilm_lsq.yaml"
CELLS = {  # name -> bits of weights and activations
    "W2A8": (2, 8),
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W1A8": (1, 8),
    "W3A8": (3, 8),
    "W4A4": (4, 4),
}
TEACH = {"task": 0.0, "logits": 1.0, "hidden": 1.0, "attention": 1.0}
METHODS = {  # name -> (weight quantizer, activation quantizer, methods, allowed weight bits)
    "min-max": ({"range": "mse"}, {"range": "mse"}, {}, range(2, 9)),
    "LSQ": ({"quantizer": "lsq"}, {"quantizer": "lsq"}, {}, range(2, 9)),
    "LSQ + KD": ({"quantizer": "lsq"}, {"quantizer": "lsq"}, {"distill": TEACH}, range(2, 9)),
    "SQuAT": ({"quantizer": "lsq"}, {"quantizer": "lsq"}, {"squat": {}}, range(2, 9)),
    "LSQ + cap 2.5": (
        {"quantizer": "lsq"},
        {"quantizer": "lsq"},
        {"kurtosis": {"targets": {"cap": 2.5}, "apply": "decoupled"}},
        range(2, 9),
    ),
    "ternary + KD": ({"quantizer": "ternary"}, {"range": "mse"}, {"distill": TEACH}, [2]),
    "binary + KD": ({"quantizer": "binary"}, {"range": "mse"}, {"distill": TEACH}, [1]),
    "split + KD": ({"quantizer": "binary", "split": True}, {"range": "mse"}, {"distill": TEACH}, [1]),
}
RATES = (2e-5, 5e-5, 1e-4, 2e-4)
SHARP_ROWS, RHO = 512, 0.05


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("stage", choices=["select", "train"])
    parser.add_argument("--fp32", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="GLUE's SST-2 folder")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), metavar="CELL", help="default: all")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates (select)")
    study = Study(parser.parse_args())
    for work in study.plan():
        study.do(*work)
    return 0


class Study:
    """What each row needs: data, ledger, the learning rate that was chosen."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.ledger = Ledger(ROOT / "docs/results/lowbit_runs.json")
        self.data = split_data(Path(arguments.data), WORK / "data")
        self.tokenizer = load_tokenizer(arguments.fp32)
        self.labels = labels_of(Path(arguments.fp32))

    def plan(self):
        """(cell, method, seed, learning rate) of each row."""
        arguments = self.arguments
        selecting = arguments.stage == "select"
        for cell in arguments.cells or (["W2A8", "W4A8", "W1A8"] if selecting else CELLS):
            for seed in [0] if selecting else arguments.seeds:
                for method in arguments.methods:
                    if CELLS[cell][0] in METHODS[method][3]:
                        for rate in arguments.rates if selecting else [self.chosen(cell, method)]:
                            yield cell, method, seed, rate

    def chosen(self, cell: str, method: str) -> float:
        """The learning rate with the best accuracy on the held-back rows, of W2A8 for 2 and 3 bits, of W4A8 for 4 and more."""
        where = {1: "W1A8", 2: "W2A8", 3: "W2A8"}.get(CELLS[cell][0], "W4A8")
        key = {"stage": "select", "cell": where, "method": method}
        found = [row for row in self.ledger.rows() if all(row.get(name) == value for name, value in key.items())]
        if not found:
            raise UserError(f"{method}: no learning rate was selected at {where}; run `select` first")
        return max(found, key=lambda row: row["simulated"])["learning_rate"]

    def do(self, cell: str, method: str, seed: int, rate: float) -> None:
        """Train, measure, append one row."""
        bits, act_bits = CELLS[cell]
        stage = self.arguments.stage
        key = {"stage": stage, "cell": cell, "method": method, "seed": seed, "learning_rate": rate}
        if self.ledger.has(key):
            return
        folder, common = self.trained(cell, method, seed, rate)
        found = self.measure(folder, stage)
        described = {"task": "SST-2", "weight_bits": bits, "weight_granularity": "channel", "act_bits": act_bits}
        self.ledger.append({**key, **described, **found, **common})
        if method != "ternary + KD":  # the split rows begin there
            shutil.rmtree(folder / "best_model")
        gc.collect()  # Paddle's layers and optimizers are cycles; a dozen of them fill the memory

    def trained(self, cell: str, method: str, seed: int, rate: float) -> tuple[Path, dict]:
        """The run of one row, made or found, and what its row says of it."""
        folder = WORK / "runs" / f"{cell}-{method}-{seed}-{rate:g}".replace(" + ", "+").replace(" ", "_")
        start = self.arguments.fp32
        if method == "split + KD":
            start = str(self.ternary(seed) / "best_model")
        override = [f"Global.output_dir={folder}", f"Global.seed={seed}", f"Data.path={self.data}"]
        override += [f"Model.name_or_path={start}", f"Train.learning_rate={rate}", *self.arguments.override]
        weight, activation, methods, _ = METHODS[method]
        bits, act_bits = CELLS[cell]
        activation = activation if act_bits == 8 else {"quantizer": "lsq"}
        quant = {"weight": {**weight, "bits": bits}, "activation": {**activation, "bits": act_bits}}
        override.append(f"Slim.quant={json.dumps(quant)}")
        for name, options in methods.items():
            options = {**options, "teacher": self.arguments.fp32} if name == "distill" else options
            override.append(f"Slim.{name}={json.dumps(options)}")
        return folder, trained(folder, CONFIG, override, {self.arguments.fp32: "FP32", str(self.data): "DATA"})

    def ternary(self, seed: int) -> Path:
        """The ternary run that this seed's split row begins with."""
        return self.trained("W2A8", "ternary + KD", seed, self.chosen("W2A8", "ternary + KD"))[0]

    def measure(self, folder: Path, stage: str) -> dict:
        """Simulated accuracy; on dev also the deployed program and the sharpness on train rows."""
        restored = restore_run(folder)
        split = self.split("held.tsv" if stage == "select" else "dev.tsv")
        simulated = logits_of(restored.model, split, restored.pad_token_id)
        found = {"simulated": accuracy(simulated, split.labels)}
        if stage == "train":
            deployed = deployed_logits(restored, split)
            found["deployed"] = accuracy(deployed, split.labels)
            found["deployed_agreement"] = comparison(deployed, simulated)["agreement"]
            found["sharpness"] = sharpness(restored.model, self.losses(restored), RHO)
        return found

    def losses(self, restored):
        """A loss of each batch of the first train rows."""
        import paddle
        import paddle.nn.functional as F

        split = self.split("train.tsv", SHARP_ROWS)
        for rows in eval_batches([len(row) for row in split.input_ids], 64):
            batch = collate(split, rows, restored.pad_token_id)

            def loss(batch=batch):
                logits = restored.model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
                return F.cross_entropy(logits, paddle.to_tensor(batch["labels"]))

            yield loss

    def split(self, name: str, rows: int | None = None):
        return load_eval_split(self.data / name, self.tokenizer, self.labels, 64, rows=rows)


if __name__ == "__main__":
    run_tool(main)
