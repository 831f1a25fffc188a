"""Post-training quantization, calibration only: SmoothQuant, bias correction, BRECQ and I-BERT beside plain ranges; simulated.

Each setting and calibration seed is a row of docs/results/ptq_runs.json (rows already there are skipped); prints their means.
Calibration is on rows of train. `--held` judges on 2,000 rows of train that calibration never sees (to choose settings by);
without it, on dev."""

import json
import re
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from ledger import ROOT, Ledger, percent

from ernie_kqat import cli, config
from ernie_kqat.calibration import calibrate_rows
from ernie_kqat.data.dataset import Split, load_eval_split
from ernie_kqat.errors import run_tool
from ernie_kqat.evaluate import accuracy, comparison, logits_of
from ernie_kqat.restore import restore_folder
from ernie_kqat.tokenizer import load_tokenizer

HELD = 2000
MEASURED = ("agreement", "rms_over_std", "seconds")  # besides accuracy
MSE = {"activation": {"range": "mse"}}
INNER = {"alpha": [[r"[qkv]_proj|linear1", 0.5]]}
SETTINGS = {
    "W8A8 absmax": ({}, {}),
    "W8A8 mse": (MSE, {}),
    **{
        f"W8A8 {name}, SmoothQuant {alpha}": (quant, {"smoothquant": {"alpha": alpha}})
        for name, quant in (("absmax", {}), ("mse", MSE))
        for alpha in (0.3, 0.5, 0.7)
    },
    "W8A8 mse, SmoothQuant 0.5 of q k v linear1": (MSE, {"smoothquant": INNER}),
    "W8A8 mse, SmoothQuant 0.5 but linear2": (MSE, {"smoothquant": {"alpha": [["linear2", "skip"], ["encoder", 0.5]]}}),
    "W8A8 mse, I-BERT": (MSE, {"ibert": {}}),
    "W8A8 absmax, bias correction": ({}, {"bias_correction": {}}),
    "W8A8 mse, bias correction": (MSE, {"bias_correction": {}}),
    "W8A8 mse, SmoothQuant 0.5, bias correction": (MSE, {"smoothquant": {}, "bias_correction": {}}),
    **{
        f"W{bits}A8 mse{name}": ({"weight": {"bits": bits, "range": "mse"}, **MSE}, methods)
        for bits in (4, 3, 2)
        for name, methods in (
            ("", {}),
            (", bias correction", {"bias_correction": {}}),
            (", BRECQ", {"brecq": {}}),
            (", BRECQ, bias correction", {"brecq": {}, "bias_correction": {}}),
        )
    },
}


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--fp32", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="GLUE's SST-2 folder")
    parser.add_argument("--settings", default="", metavar="REGEX", help="only settings whose name it matches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--held", action="store_true", help="judge on rows of train")
    parser.add_argument("--max-length", type=int, default=64, help="tokens")
    arguments = parser.parse_args()
    ledger = Ledger(ROOT / "docs/results/ptq_runs.json")
    study = Study(arguments)
    for name in SETTINGS:
        for seed in arguments.seeds if re.search(arguments.settings, name) else []:
            key = {"setting": name, "options": arguments.override, "judged_on": study.judge.name, "seed": seed}
            if not ledger.has(key):
                ledger.append({**key, **study.row(name, seed)})
    print("\n".join(table(ledger.rows())))
    return 0


class Study:
    """The rows to calibrate and to judge on, and what fp32 makes of the latter."""

    def __init__(self, arguments):
        self.arguments = arguments
        plain = self.model()
        tokenizer = load_tokenizer(plain.vocabulary)
        train, dev = (
            load_eval_split(Path(arguments.data, file), tokenizer, plain.labels, arguments.max_length)
            for file in ("train.tsv", "dev.tsv")
        )
        order = np.random.default_rng(0).permutation(len(train))
        self.calibration = part_of(train, order[HELD:], "train")
        self.judge = part_of(train, order[:HELD], "held") if arguments.held else dev
        self.fp32 = logits_of(plain.model, self.judge, plain.pad_token_id)
        print(f"fp32: {accuracy(self.fp32, self.judge.labels):.4f} of {len(self.judge)} rows", flush=True)

    def model(self):
        return restore_folder(self.arguments.fp32, config.Data(max_length=self.arguments.max_length))

    def row(self, name: str, seed: int) -> dict[str, Any]:
        quant, methods = SETTINGS[name]
        tree = {"Slim": {"quant": json.loads(json.dumps(quant)), **json.loads(json.dumps(methods))}}
        slim = config.from_overrides(self.arguments.override, tree, name).Slim
        began = time.perf_counter()
        restored = self.model().quantized(slim.quant)
        for method in slim.methods.values():
            method.prepare(restored.model)
            method.attach(restored.model, dict)
        calibrate_rows(restored, self.calibration, seed, list(slim.methods.values()))
        seconds = time.perf_counter() - began
        logits = logits_of(restored.model, self.judge, restored.pad_token_id)
        near = comparison(logits, self.fp32)
        words = ["tools/studies/ptq.py", "--fp32", "FP32", "--data", "DATA", "--settings", f"^{name}$", "--seeds", seed]
        words += ["--held"] * self.arguments.held + [word for pair in self.arguments.override for word in ("-o", pair)]
        return {
            "accuracy": accuracy(logits, self.judge.labels),
            **near,
            "seconds": round(seconds, 1),
            "command": f"python {shlex.join(map(str, words))}",
        }


def part_of(split: Split, rows: np.ndarray, name: str) -> Split:
    """Some rows of a split."""
    ids, types = ([values[row] for row in rows] for values in (split.input_ids, split.token_type_ids))
    return Split(ids, types, split.labels[rows], [split.texts[row] for row in rows], None, 0, name)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds."""
    lines = ["| setting | accuracy | labels as fp32's | rms/std to fp32 | s | seeds |", "|---" * 6 + "|"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: list(SETTINGS).index(row["setting"])):
        held = ["(held back)"] * (row["judged_on"] == "held")
        groups.setdefault((row["setting"], *row["options"], *held), []).append(row)
    for setting, found in groups.items():
        same, near, seconds = (statistics.mean(row[name] for row in found) for name in MEASURED)
        figures = f"{100 * same:.2f}% | {near:.3f} | {seconds:.0f} | {len(found)}"
        lines.append(f"| {' '.join(setting)} | {percent([row['accuracy'] for row in found])} | {figures} |")
    return lines


if __name__ == "__main__":
    run_tool(main)
