"""W8A8 on SST-2 from a fine-tuned fp32 model: PTQ, plain QAT, KURE 1.8, layer-wise targets; deployed INT8 accuracy.

The deployed model of a QAT row is the best of five evaluations on dev, the calibrated start among them; its step and the
accuracy at the last step stand beside it.

Each finished row (method, seed) is appended to docs/results/w8a8.json, and rows already there are skipped; the table is
docs/results/w8a8.md. Unfinished runs are resumed."""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import ernie_kqat
from ernie_kqat import benchmark, cli, files
from ernie_kqat.errors import UserError, run_tool

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/w8a8.json"
METHODS = {  # name -> config; the order of the table
    "PTQ (calibration only)": "ernie_sst2_minilm_ptq",
    "PTQ, least-squares ranges": "ernie_sst2_minilm_ptq_mse",
    "QAT": "ernie_sst2_minilm_qat",
    "QAT + KURE 1.8": "ernie_sst2_minilm_kure",
    "QAT + layer-wise targets": "ernie_sst2_minilm",
}


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--fp32", required=True, metavar="DIR", help="the fine-tuned fp32 model folder")
    parser.add_argument("--data", required=True, metavar="DIR", help="GLUE's SST-2 folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="only write the table again")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    for seed in arguments.seeds if not arguments.table else []:
        for method, name in METHODS.items():
            if not any((row["method"], row["seed"]) == (method, seed) for row in rows):
                rows.append(one_row(method, name, seed, arguments))
                files.write_json(RESULTS, rows)
    files.write_text(RESULTS.with_suffix(".md"), "\n".join(table(rows)) + "\n")
    print("\n".join(table(rows)))
    return 0


def one_row(method: str, name: str, seed: int, arguments) -> dict:
    """Train and export one cell."""
    output = Path("output/studies/w8a8", f"{name}-{seed}")
    override = [f"Global.output_dir={output}", f"Global.seed={seed}", f"Data.path={arguments.data}"]
    override += [f"Model.name_or_path={arguments.fp32}", *arguments.override]
    command = ["tools/train.py", "-c", f"configs/{name}.yaml", "-o", *override]
    if not (ROOT / output / "summary.json").is_file():
        run(command + (["--resume"] if (ROOT / output / "checkpoints").is_dir() else ["--overwrite"]))
    run(["tools/export.py", "--run", str(output)])
    summary = json.loads((ROOT / output / "summary.json").read_text(encoding="utf-8"))
    # The command as anyone would type it; the folders are the user's own.
    shown = [part.replace(arguments.data, "DATA").replace(arguments.fp32, "FP32") for part in command]
    kept = ("accuracy", "best_step", "steps", "train_rows", "seconds", "fp32", "simulated", "deployed")
    figures = {key: summary[key] for key in kept}
    figures["fp32"] = {key: value for key, value in figures["fp32"].items() if key != "model"}
    return {
        "method": method,
        "seed": seed,
        "command": "python " + shlex.join(shown),
        "ernie_kqat": ernie_kqat.__version__,
        "machine": benchmark.machine(),
        **figures,
    }


def run(command: list[str]) -> None:
    print("$ python", shlex.join(command), flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        raise UserError(f"{shlex.join(command)} failed; its message is above")


def table(rows: list[dict]) -> list[str]:
    """Markdown: mean and spread (min to max) of the seeds, in percent."""
    lines = [
        "| method | deployed INT8 | deployed - fp32 | best step | at the last step | = simulation | = fp32 | rms/std |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        found = [row for row in rows if row["method"] == method]
        if found:
            lines.append(f"| {method} | " + " | ".join(cells(found)) + " |")
    if rows:
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
        fp32 = f"{rows[0]['fp32']['accuracy']:.2%} of {rows[0]['deployed']['rows']} dev rows"
        lines += [
            "",
            f"Seeds {seeds}: mean (min to max), in percent. fp32: {fp32}. Machine: {rows[0]['machine']['cpu']}.",
        ]
    return lines


def cells(found: list[dict]) -> list[str]:
    """The table's figures of one method."""

    def spread(values: list[float], scale: float = 100.0, digits: int = 2, sign: str = "") -> str:
        values = [scale * value for value in values]
        return f"{statistics.mean(values):{sign}.{digits}f} ({min(values):{sign}.{digits}f} to {max(values):{sign}.{digits}f})"

    deployed = [row["deployed"] for row in found]
    return [
        spread([one["accuracy"] for one in deployed]),
        spread([row["deployed"]["accuracy"] - row["fp32"]["accuracy"] for row in found], sign="+"),
        ", ".join(str(row["best_step"]) for row in found),
        spread([row["accuracy"] for row in found]) + " simulated",
        spread([one["agreement_with_simulated"] for one in deployed]),
        spread([one["agreement_with_fp32"] for one in deployed]),
        spread([one["rms_over_std"] for one in deployed], 1.0, 4),
    ]


if __name__ == "__main__":
    run_tool(main)
