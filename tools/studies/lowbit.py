"""Low-bit methods on SST-2 from a fine-tuned fp32 model: bits x method x seed, the last step's model.

  select  some methods of fp32, W4A8, W2A8 and W1A8, seed 0, 6,400 rows; judged on movie reviews that SST-2 has in neither train
          nor dev (a part of train would not do: the fp32 model has learnt it by heart)
  train   every cell, method and seed at the cell's learning rate, 12,800 rows; judged on dev: simulated, deployed, sharpness,
          packed size
  full    one method of some cells, all of train; judged on dev and on those reviews

Each finished row goes to docs/results/lowbit_runs.json; rows already there are skipped. `--jobs 2` makes two at a time, each row
in a process of its own. A row that begins with another row's model makes that first. tools/studies/lowbit_tables.py makes the
tables."""

import json
import multiprocessing
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from kurtosis import split_data
from ledger import ROOT, Ledger, alone, trained

from ernie_kqat import cli, files
from ernie_kqat.data.batching import collate, eval_batches
from ernie_kqat.data.dataset import load_eval_split
from ernie_kqat.data.readers import read_examples
from ernie_kqat.errors import UserError, run_tool
from ernie_kqat.evaluate import accuracy, comparison, logits_of
from ernie_kqat.export import exporter
from ernie_kqat.methods.squat import sharpness
from ernie_kqat.models.folder import labels_of
from ernie_kqat.narrow import narrow_folder
from ernie_kqat.packed.pack import pack
from ernie_kqat.predictor import Predictor
from ernie_kqat.quickstart import LABELS, prepare_movie_reviews
from ernie_kqat.restore import restore_run
from ernie_kqat.tokenizer import load_tokenizer

WORK = Path("output/studies/lowbit")
CONFIG = "configs/ernie_sst2_minilm_lsq.yaml"
CELLS = {  # name -> bits of weights and activations
    "fp32": (32, 32),
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W2A8": (2, 8),
    "W1A8": (1, 8),
    "W3A8": (3, 8),
    "W4A4": (4, 4),
}
UNSEEN = "unseen.tsv"
TEACH = {"task": 0.0, "logits": 1.0, "hidden": 1.0, "attention": 1.0}
TEACH_HALF = {**TEACH, "attention": 0.0}  # half the heads
STATES, LOGITS = {**TEACH, "logits": 0.0}, {"task": 0.0, "logits": 1.0}  # BinaryBERT's two stages
LSQ = {"quantizer": "lsq"}
LEAST_SQUARES = {"range": "mse"}
OFFSET = {"quantizer": "lsq", "offset": True}  # LSQ+
SPLIT = {"quantizer": "binary", "split": True}
ONE_BIT_WORDS = {"quantizer": "binary", "bits": 1, "tables": [["position", {"quantizer": "minmax", "bits": 8}]]}
SMALLEST = {**ONE_BIT_WORDS, "tables": [["position", {"quantizer": "minmax", "bits": 4, "range": "mse"}]]}


@dataclass(frozen=True)
class Recipe:
    """A method of the study; `start`: the recipe whose model it begins with, or one of NARROW; `teacher`: one of NARROW."""

    cells: tuple[str, ...]
    weight: Optional[dict[str, Any]] = field(default_factory=lambda: LSQ)
    activation: dict[str, Any] = field(default_factory=lambda: LSQ)
    methods: dict[str, Any] = field(default_factory=dict)
    embedding: Optional[dict[str, Any]] = None
    start: Optional[str] = None
    teacher: Optional[str] = None  # None: the fp32 model
    epochs: int = 1  # of the stage's steps each
    listed: bool = True  # False: no row of its own; only to select among, or to begin another with


NARROW = {"half": (0.5, 0.5), "narrow FFN": (1.0, 0.5625)}  # shares of the fp32 model's heads and neurons
BITS = ("W8A8", "W4A8", "W2A8", "W3A8", "W4A4")
METHODS = {
    "none": Recipe(("fp32",), weight=None),
    "none, 3 epochs": Recipe(("fp32",), weight=None, epochs=3),
    "min-max": Recipe(BITS, LEAST_SQUARES, LEAST_SQUARES),
    "LSQ": Recipe(BITS),
    "LSQ + KD": Recipe(BITS, methods={"distill": TEACH}),
    "LSQ + KD, 3 epochs": Recipe(("W4A8",), methods={"distill": TEACH}, epochs=3),
    "LSQ+ + KD": Recipe(("W8A8", "W4A8"), activation=OFFSET, methods={"distill": TEACH}),
    "SmoothQuant + LSQ+ + KD": Recipe(
        ("W4A8",), activation=OFFSET, methods={"smoothquant": {"alpha": 0.7}, "distill": TEACH}, listed=False
    ),
    "SmoothQuant + LSQ + KD": Recipe(("W8A8", "W4A8"), methods={"smoothquant": {"alpha": 0.7}, "distill": TEACH}),
    "SQuAT": Recipe(BITS, methods={"squat": {}}),
    "SQuAT + KD": Recipe(("W4A8",), methods={"squat": {}, "distill": TEACH}, listed=False),
    "SQuAT, rho 0.02": Recipe(("W2A8",), methods={"squat": {"rho": 0.02}}, listed=False),
    "SQuAT, rho 0.01": Recipe(("W2A8",), methods={"squat": {"rho": 0.01}}, listed=False),
    "SQuAT, no turns": Recipe(("W2A8",), methods={"squat": {"alternate": "off"}}, listed=False),
    "SQuAT, no turns, rho 0.02": Recipe(("W3A8", "W2A8"), methods={"squat": {"alternate": "off", "rho": 0.02}}),
    "SQuAT, no turns, rho 0.01": Recipe(("W2A8",), methods={"squat": {"alternate": "off", "rho": 0.01}}, listed=False),
    "PreQuant": Recipe(("W4A8",), LEAST_SQUARES, LEAST_SQUARES, {"prequant": {}}),
    "LSQ + cap 2.5": Recipe(BITS, methods={"kurtosis": {"targets": {"cap": 2.5}, "apply": "decoupled"}}),
    "ternary + KD": Recipe(("W2A8",), {"quantizer": "ternary"}, LEAST_SQUARES, {"distill": TEACH}),
    "binary + KD": Recipe(("W1A8",), {"quantizer": "binary"}, LEAST_SQUARES, {"distill": TEACH}, ONE_BIT_WORDS),
    "binary + KD, 3 epochs": Recipe(
        ("W1A8",), {"quantizer": "binary"}, LEAST_SQUARES, {"distill": TEACH}, ONE_BIT_WORDS, epochs=3
    ),
    "half-width ternary + KD": Recipe(
        ("W2A8",),
        {"quantizer": "ternary"},
        LEAST_SQUARES,
        {"distill": TEACH_HALF},
        ONE_BIT_WORDS,
        start="half",
        listed=False,
    ),
    "half-width split + KD": Recipe(
        ("W1A8",), SPLIT, LEAST_SQUARES, {"distill": TEACH_HALF}, ONE_BIT_WORDS, start="half-width ternary + KD"
    ),
    # As BinaryBERT's authors train it, the half-width fp32 model being the teacher.
    "half-width ternary, states": Recipe(
        ("W2A8",),
        {"quantizer": "ternary"},
        LEAST_SQUARES,
        {"distill": STATES},
        ONE_BIT_WORDS,
        start="half",
        teacher="half",
    ),
    "half-width ternary, logits": Recipe(
        ("W2A8",),
        {"quantizer": "ternary"},
        LEAST_SQUARES,
        {"distill": LOGITS},
        ONE_BIT_WORDS,
        start="half-width ternary, states",
        teacher="half",
    ),
    "half-width split, states": Recipe(
        ("W1A8",),
        SPLIT,
        LEAST_SQUARES,
        {"distill": STATES},
        ONE_BIT_WORDS,
        start="half-width ternary, logits",
        teacher="half",
    ),
    "half-width split, logits": Recipe(
        ("W1A8",),
        SPLIT,
        LEAST_SQUARES,
        {"distill": LOGITS},
        ONE_BIT_WORDS,
        start="half-width split, states",
        teacher="half",
    ),
    "narrow-FFN ternary + KD": Recipe(
        ("W2A8",),
        {"quantizer": "ternary"},
        LEAST_SQUARES,
        {"distill": TEACH},
        SMALLEST,
        start="narrow FFN",
        listed=False,
    ),
    "narrow-FFN split + KD": Recipe(
        ("W1A8",), SPLIT, LEAST_SQUARES, {"distill": TEACH}, SMALLEST, start="narrow-FFN ternary + KD"
    ),
}
SELECTED = {  # learning rates to choose from; another method has those of its cell's first one with a teacher, or without
    "fp32": {"none": (5e-6, 1e-5, 2e-5)},
    "W8A8": {"LSQ + KD": (5e-6, 1e-5, 2e-5, 5e-5), "SmoothQuant + LSQ + KD": (5e-6, 1e-5, 2e-5, 5e-5)},
    "W4A8": {
        "LSQ": (1e-5, 2e-5, 5e-5),
        "LSQ + KD": (5e-5, 1e-4, 2e-4),
        "LSQ+ + KD": (5e-5, 1e-4, 2e-4),
        "SmoothQuant + LSQ+ + KD": (5e-5, 1e-4),
        "SQuAT + KD": (5e-5, 1e-4, 2e-4),
        "SQuAT": (2e-5, 5e-5),  # weights move in every other step only
        "PreQuant": (3e-4, 1e-3, 3e-3),  # few weights move
    },
    "W2A8": {
        "LSQ": (5e-5, 1e-4, 2e-4),
        "LSQ + KD": (1e-4, 2e-4, 4e-4, 8e-4),
        "SQuAT": (1e-4, 2e-4, 4e-4),
        "SQuAT, rho 0.02": (2e-4,),
        "SQuAT, rho 0.01": (2e-4,),
        "SQuAT, no turns": (1e-4, 2e-4),
        "SQuAT, no turns, rho 0.02": (1e-4,),
        "SQuAT, no turns, rho 0.01": (1e-4,),
    },
    "W1A8": {
        "binary + KD": (2e-4, 4e-4, 8e-4),
        "half-width split + KD": (2e-4, 4e-4, 8e-4),
        "narrow-FFN split + KD": (2e-4, 4e-4, 8e-4),
    },
}
BORROWED = {"W8A8": "W4A8", "W4A4": "W4A8", "W3A8": "W2A8"}  # whose learning rates a cell has that has none of its own
STEPS = {"select": 200, "train": 400, "full": None}
FULL = {
    "fp32": ("none",),
    "W8A8": ("SmoothQuant + LSQ + KD",),
    "W4A8": ("LSQ + KD",),
    "W2A8": ("LSQ + KD",),
    "W1A8": ("narrow-FFN split + KD",),
}
SHARP_ROWS, RHO = 512, 0.05


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("stage", choices=list(STEPS))
    parser.add_argument("--fp32", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="GLUE's SST-2 folder")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), metavar="CELL", help="default: all of the stage")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help="default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    study = Study(parser.parse_args())
    # A process a row: Paddle's layers and optimizers are cycles, and a dozen of them fill the memory.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.arguments.jobs, spawn, max_tasks_per_child=1) as pool:
        rows = [pool.submit(study.do, *work) for work in study.plan()]
        try:
            for row in as_completed(rows):
                row.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return 0


class Study:
    """What each row needs: data, ledger, the learning rate that was chosen."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.ledger = Ledger(ROOT / "docs/results/lowbit_runs.json")
        source = Path(arguments.data)
        self.data = source if arguments.stage == "full" else split_data(source, WORK / "data")
        if arguments.stage != "train":
            write_unseen(source, WORK / "data" / UNSEEN)
        self.steps = STEPS[arguments.stage]

    def plan(self) -> Iterator[tuple[str, str, int, float]]:
        """(cell, method, seed, learning rate) of each row that is missing; a seed is whole before the next begins."""
        arguments = self.arguments
        selecting = arguments.stage == "select"
        cells = {"select": SELECTED, "full": FULL}.get(arguments.stage) or dict.fromkeys(CELLS, arguments.methods)
        for seed in [0] if selecting else arguments.seeds:
            for cell in [cell for cell in cells if cell in (arguments.cells or CELLS)]:
                for method in cells[cell]:
                    recipe = METHODS[method]
                    if cell in recipe.cells and method in arguments.methods and (selecting or recipe.listed):
                        for rate in SELECTED[cell][method] if selecting else [chosen(self.ledger.rows(), cell, method)]:
                            if not self.ledger.has(self.key(cell, method, seed, rate)):
                                yield cell, method, seed, rate

    def key(self, cell: str, method: str, seed: int, rate: float) -> dict[str, Any]:
        return {"stage": self.arguments.stage, "cell": cell, "method": method, "seed": seed, "learning_rate": rate}

    def do(self, cell: str, method: str, seed: int, rate: float) -> None:
        """Train, measure, append one row."""
        bits, act_bits = CELLS[cell]
        folder, common = self.trained(cell, method, seed, rate)
        described = {"task": "SST-2", "weight_bits": bits, "act_bits": act_bits}
        self.ledger.append(
            {**self.key(cell, method, seed, rate), **described, **self.measure(folder, method), **common}
        )
        if not any(recipe.start == method for recipe in METHODS.values()):
            shutil.rmtree(folder / "best_model")

    def trained(self, cell: str, method: str, seed: int, rate: float) -> tuple[Path, dict]:
        """The run of one row, made or found, and what its row says of it."""
        name = f"{cell}-{method}-{seed}-{rate:g}-{self.steps or 'full'}"
        folder = WORK / "runs" / name.replace(" + ", "+").replace(" ", "_")
        recipe, fp32 = METHODS[method], self.arguments.fp32
        start = fp32 if recipe.start is None else str(self.start(recipe.start, seed))
        override = [f"Global.output_dir={folder}", f"Global.seed={seed}", f"Data.path={self.data}"]
        override += [f"Model.name_or_path={start}", f"Train.learning_rate={rate}", *self.length(recipe.epochs)]
        override += self.arguments.override
        bits, act_bits = CELLS[cell]
        quant = None
        if recipe.weight is not None:
            activation = LSQ if act_bits < 8 else recipe.activation
            quant = {"weight": {**recipe.weight, "bits": bits}, "activation": {**activation, "bits": act_bits}}
            quant.update({"embedding": recipe.embedding} if recipe.embedding else {})
        override.append(f"Slim.quant={json.dumps(quant)}")
        for name, options in recipe.methods.items():
            if name == "distill":
                options = {**options, "teacher": str(self.narrow(recipe.teacher, seed)) if recipe.teacher else fp32}
            override.append(f"Slim.{name}={json.dumps(options)}")
        return folder, trained(folder, CONFIG, override, {fp32: "FP32", str(self.data): "DATA"})

    def length(self, epochs: int = 1) -> list[str]:
        """The keys that say how much is trained."""
        longer = [] if epochs == 1 else [f"Train.epochs={epochs}"]
        return [*longer, "Data.train_rows=null" if self.steps is None else f"Train.max_steps={epochs * self.steps}"]

    def start(self, name: str, seed: int) -> Path:
        """The model folder that a row begins with, made or found."""
        if name in NARROW:
            return self.narrow(name, seed)
        (cell,) = METHODS[name].cells
        return self.trained(cell, name, seed, chosen(self.ledger.rows(), cell, name))[0] / "best_model"

    def narrow(self, name: str, seed: int) -> Path:
        """The fp32 model with fewer heads and neurons, fine-tuned again by configs/ernie_sst2_minilm_half.yaml."""
        heads, ffn = NARROW[name]
        name, fp32 = name.replace(" ", "_"), self.arguments.fp32
        source = WORK / name
        with alone(WORK / f"{name}.lock"):
            if not source.is_dir():
                narrow_folder(fp32, str(self.data), heads, ffn, source, rows=2000)
        folder = WORK / "runs" / f"{name}-{seed}-{self.steps or 'full'}"
        override = [f"Global.output_dir={folder}", f"Global.seed={seed}", f"Data.path={self.data}"]
        override += [f"Model.name_or_path={source}", f"Slim.distill.teacher={fp32}", *self.length()]
        override += ["Train.select=last", f"Slim.distill.attention={float(heads == 1)}"]
        override += self.arguments.override
        trained(folder, "configs/ernie_sst2_minilm_half.yaml", override, {})
        return folder / "best_model"

    def measure(self, folder: Path, method: str) -> dict:
        """Simulated accuracy; on dev also the deployed program, its packed size, and the sharpness on train rows."""
        restored = restore_run(folder)
        split = self.split(UNSEEN if self.arguments.stage == "select" else "dev.tsv")
        simulated = logits_of(restored.model, split, restored.pad_token_id)
        found: dict[str, Any] = {"simulated": accuracy(simulated, split.labels)}
        if self.arguments.stage == "full":
            unseen = self.split(UNSEEN)
            found["unseen"] = accuracy(logits_of(restored.model, unseen, restored.pad_token_id), unseen.labels)
        if self.arguments.stage != "select" and METHODS[method].weight is not None:
            found.update(deployed(restored, split, simulated))
            found["fp32_bytes"] = Path(self.arguments.fp32, "model_state.pdparams").stat().st_size
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

    def split(self, name: str, rows: Optional[int] = None):
        fp32 = self.arguments.fp32
        folder = WORK / "data" if name == UNSEEN else self.data
        return load_eval_split(folder / name, load_tokenizer(fp32), labels_of(Path(fp32)), 64, rows=rows)


def chosen(rows: list[dict[str, Any]], cell: str, method: str) -> float:
    """The learning rate with the best accuracy on the unseen rows; of equals the first."""

    def taught(name: str) -> bool:
        return "distill" in METHODS[name].methods

    for where in (cell, BORROWED.get(cell)):
        alike = [name for name in SELECTED.get(where, {}) if taught(name) == taught(method)]
        if alike:
            key = {"stage": "select", "cell": where, "method": method if method in alike else alike[0]}
            found = [row for row in rows if all(row.get(name) == value for name, value in key.items())]
            if found:
                return max(found, key=lambda row: row["simulated"])["learning_rate"]
    raise UserError(f"{cell}, {method}: no learning rate was selected; run `select` first")


def write_unseen(sst2: Path, path: Path) -> None:
    """Movie reviews of `make quickstart` without those that SST-2 has."""

    def key(text: str) -> str:
        return re.sub("[^a-z0-9]", "", text.lower())  # SST-2's are tokenized

    own = {key(row.text) for name in ("train.tsv", "dev.tsv") for row in read_examples(sst2 / name)}
    reviews = prepare_movie_reviews()
    rows = [
        row for name in ("train.tsv", "dev.tsv") for row in read_examples(reviews / name) if key(row.text) not in own
    ]
    lines = [f"{row.text}\t{LABELS.index(row.label)}" for row in rows]
    files.write_text(path, "\n".join(["text\tlabel", *lines]) + "\n")


def deployed(restored, split, simulated) -> dict[str, Any]:
    """What Paddle Inference computes from the exported INT8 program, and how small it can be shipped."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder, "artifact")
        exporter.write_unverified(restored, load_tokenizer(restored.vocabulary), split, artifact)
        logits = Predictor(artifact, allow_unverified=True).logits(list(zip(split.input_ids, split.token_type_ids)))
        packed = pack(artifact, Path(folder, "packed"))
    near = comparison(logits, simulated)
    return {
        "deployed": accuracy(logits, split.labels),
        "deployed_agreement": near["agreement"],
        "deployed_rms_over_std": near["rms_over_std"],
        "packed_bytes": packed["size_bytes"],
    }


if __name__ == "__main__":
    run_tool(main)
