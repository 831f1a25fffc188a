"""Tables of tools/studies/lowbit.py and ptq.py: docs/results/lowbit.json (one row for the seeds of each cell and method),
lowbit.md's, the README's."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import ptq
from ledger import percent
from lowbit import METHODS, chosen

from ernie_kqat import cli, files
from ernie_kqat.errors import run_tool

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
PAGES = (RESULTS / "lowbit.md", ROOT / "README.md", ROOT / "README_cn.md")
ORDER = ("fp32", "W8A8", "W4A8", "W4A4", "W3A8", "W2A8", "W1A8")
GENTLE = "SQuAT, no turns, rho 0.02"
AGAINST_FP32 = (
    ("W8A8", "LSQ + KD", 0.0),
    ("W8A8", "SmoothQuant + LSQ + KD", 0.0),
    ("W8A8", "LSQ+ + KD", 0.0),
    ("W4A8", "LSQ + KD", -0.3),
    ("W4A8", "LSQ + KD, 3 epochs", -0.3),
    ("W4A8", "LSQ+ + KD", -0.3),
    ("W4A8", "SmoothQuant + LSQ + KD", -0.3),
    ("W2A8", "LSQ + KD", -2.0),
    ("W1A8", "narrow-FFN split + KD", -3.0),
)
AGAINST_EACH_OTHER = (
    ("W4A8", "SQuAT", "LSQ"),
    ("W3A8", "SQuAT", "LSQ"),
    ("W3A8", GENTLE, "LSQ"),
    ("W2A8", "SQuAT", "LSQ"),
    ("W2A8", GENTLE, "LSQ"),
    ("W1A8", "half-width split + KD", "binary + KD"),
    ("W1A8", "half-width split, logits", "binary + KD, 3 epochs"),
    ("W1A8", "narrow-FFN split + KD", "binary + KD"),
    ("W1A8", "narrow-FFN split + KD", "binary + KD, 3 epochs"),
)
RECIPES = (  # what to choose at which bits: configs/ernie_sst2_minilm_….yaml, and what to say otherwise
    ("fp32", "none", "", ""),
    ("W8A8", "SmoothQuant + LSQ + KD", "smoothkd", ""),
    ("W4A8", "LSQ + KD, 3 epochs", "kdlsq", " `-o Slim.quant.weight.bits=4 Train.learning_rate=1e-4 Train.epochs=3`"),
    ("W3A8", "LSQ + KD", "kdlsq", " `-o Slim.quant.weight.bits=3`"),
    ("W2A8", "LSQ + KD", "kdlsq", ""),
    ("W1A8", "binary + KD, 3 epochs", "binary", ""),
    ("W1A8", "narrow-FFN split + KD", "w1_3_split", ""),
)
SMALLER, AGREEMENT = 24.0, 0.995
ALL = "all of train, "


def main() -> int:
    cli.parser(__doc__).parse_args()
    rows = json.loads((RESULTS / "lowbit_runs.json").read_text(encoding="utf-8"))
    rows = [
        row
        for row in rows
        if row["stage"] == "select" or row["learning_rate"] == chosen(rows, row["cell"], row["method"])
    ]
    rows.sort(key=lambda row: (ORDER.index(row["cell"]), list(METHODS).index(row["method"])))
    cells, full = (list(cells_of([row for row in rows if row["stage"] == stage])) for stage in ("train", "full"))
    files.write_json(RESULTS / "lowbit.json", cells + full)
    tables = {
        "goals": list(goals(rows, cells, full)),
        "select": selection([row for row in rows if row["stage"] == "select"]),
        "grid": grid(cells),
        "squat": paired(rows, "SQuAT", "LSQ"),
        "gentle": paired(rows, GENTLE, "LSQ"),
        "offset": paired(rows, "LSQ+ + KD", "LSQ + KD"),
        "kurtosis": paired(rows, "LSQ + cap 2.5", "LSQ"),
        "half": paired(rows, "half-width split + KD", "binary + KD"),
        "narrow": paired(rows, "narrow-FFN split + KD", "binary + KD"),
        "direct": paired(rows, "narrow-FFN split + KD", "binary + KD, 3 epochs"),
        "prequant": paired(rows, "PreQuant", "LSQ"),
        "deployed": deployed(cells),
        "full": deployed(full),
        "calibration": ptq.table(calibrated()),
        "recipes": recipes(cells, "| bits | method | config | accuracy | packed, x smaller |"),
        "recipes, Chinese": recipes(cells, "| 位数 | 方法 | 配置 | 准确率 | 打包后缩小倍数 |"),
    }
    for name, lines in tables.items():
        print("\n".join([f"{name}:", *lines, ""]))
    for page in PAGES:
        files.write_text(page, filled(page.read_text(encoding="utf-8"), tables))
    return 0


def calibrated() -> list[dict]:
    """The rows of tools/studies/ptq.py on dev, of its own settings."""
    rows = json.loads((RESULTS / "ptq_runs.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["judged_on"] == "dev.tsv" and not row["options"]]


def filled(text: str, tables: dict[str, list[str]]) -> str:
    """The page with each table between its marks."""
    for name, lines in tables.items():
        block = "\n".join([f"<!-- table: {name} -->", *lines, "<!-- end -->"])
        text = re.sub(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S)
    return text


def cells_of(rows: list[dict]) -> Iterator[dict]:
    """One row for the seeds of each (cell, method), figures as means."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["method"]), []).append(row)
    for (cell, method), found in groups.items():
        first = found[0]
        accuracy = [row["simulated"] for row in found]
        yield {
            "task": first["task"],
            "cell": cell,
            "weight_bits": first["weight_bits"],
            "weight_granularity": "channel",
            "act_bits": first["act_bits"],
            "stage": "qat",
            "method": method,
            "learning_rate": first["learning_rate"],
            "train_steps": first["train_steps"],
            "seeds": [row["seed"] for row in found],
            "accuracy_mean": round(statistics.mean(accuracy), 5),
            "accuracy_std": spread(accuracy),
            "runs": {what: mean(found, what) for what in ("simulated", "unseen", "deployed") if what in first},
            "deployed_agreement_min": min(row.get("deployed_agreement", 1.0) for row in found),
            **({"sharpness": mean(found, "sharpness")} if "sharpness" in first else {}),
            "size_ratio": round(first["fp32_bytes"] / mean(found, "packed_bytes"), 2)
            if "packed_bytes" in first
            else 1.0,
            "command": first["command"],
        }


def mean(rows: list[dict], name: str) -> float:
    return round(statistics.mean(row[name] for row in rows), 5)


def spread(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 5) if len(values) > 1 else None


def selection(rows: list[dict]) -> list[str]:
    """Seed 0 on the held-back rows, by learning rate; the chosen one in bold."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines = [f"| cell | method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 2) + "|"]
    for cell, method in dict.fromkeys((row["cell"], row["method"]) for row in rows):
        own = {row["learning_rate"]: row["simulated"] for row in rows if (row["cell"], row["method"]) == (cell, method)}
        best = max(own, key=lambda rate: own[rate])
        texts = [f"{100 * own[rate]:.1f}" if rate in own else "-" for rate in rates]
        marked = [f"**{text}**" if rate == best else text for rate, text in zip(rates, texts)]
        lines.append(f"| {cell} | {method} | {' | '.join(marked)} |")
    return lines


def grid(cells: list[dict]) -> list[str]:
    """Methods by cells; simulated accuracy on dev, mean ± standard deviation over the seeds, in percent."""
    columns = [name for name in ORDER if any(cell["cell"] == name for cell in cells)]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in sorted({cell["method"] for cell in cells}, key=list(METHODS).index):
        own = {cell["cell"]: cell for cell in cells if cell["method"] == method}
        lines.append(f"| {method} | {' | '.join(_figure(own.get(name)) for name in columns)} |")
    return lines


def _figure(cell: dict | None) -> str:
    if cell is None:
        return "-"
    deviation = "" if cell["accuracy_std"] is None else f" ± {100 * cell['accuracy_std']:.2f}"
    few = "" if len(cell["seeds"]) > 2 else f" ({len(cell['seeds'])})"
    return f"{100 * cell['accuracy_mean']:.2f}{deviation}{few}"


def recipes(cells: list[dict], header: str) -> list[str]:
    """What to choose at which bits."""
    lines = [header, "|---" * 5 + "|"]
    found = {(cell["cell"], cell["method"]): cell for cell in cells}
    for bits, method, config, override in RECIPES:
        cell = found[bits, method]
        columns = ["-", "-", _figure(cell), "-"]
        if config:
            link = f"[{config}](configs/ernie_sst2_minilm_{config}.yaml){override}"
            columns = [method, link, _figure(cell), f"{cell['size_ratio']:.1f}"]
        lines.append(f"| {bits} | {' | '.join(columns)} |")
    return lines


def matched(
    rows: list[dict], one: tuple[str, str], other: tuple[str, str], stage: str = "train"
) -> tuple[list[dict], list[dict]]:
    """The rows of two (cell, method) with the seeds that both have."""
    pair = [
        {row["seed"]: row for row in rows if (row["stage"], row["cell"], row["method"]) == (stage, *key)}
        for key in (one, other)
    ]
    seeds = sorted(set(pair[0]) & set(pair[1]))
    return [pair[0][seed] for seed in seeds], [pair[1][seed] for seed in seeds]


def goals(rows: list[dict], train: list[dict], full: list[dict]) -> Iterator[str]:
    """What was wanted of the study, and what came out; differences seed by seed."""
    yield "| goal | measured | seeds | reached |"
    yield "|---|---|---|---|"
    wanted = [
        (stage, cell, method, ("fp32", "none" if METHODS[method].epochs == 1 else "none, 3 epochs"), least)
        for stage in ("train", "full")
        for cell, method, least in AGAINST_FP32
    ]
    wanted += [("train", cell, method, (cell, other), 0.0) for cell, method, other in AGAINST_EACH_OTHER]
    for stage, cell, method, other, least in wanted:
        pair = matched(rows, (cell, method), other, stage)
        if pair[0]:
            points = [one["simulated"] - two["simulated"] for one, two in zip(*pair)]
            name = other[1].replace("none", "fp32")
            where = ALL if stage == "full" else ""
            yield _goal(
                f"{where}{cell}, {method}: accuracy minus that of {name} {least:g} points or more",
                percent(points),
                len(points),
                100 * statistics.mean(points) >= least,
            )
            if method.startswith("SQuAT"):
                sharp = [statistics.mean(row["sharpness"] for row in found) for found in pair]
                text = f"{sharp[0]:.3f} and {sharp[1]:.3f}"
                yield _goal(f"{cell}, {method}: flatter than {name}", text, len(points), sharp[0] < sharp[1])
    for where, cells in (("", train), (ALL, full)):
        for cell in cells:
            if cell["cell"] == "W1A8":
                ratio = cell["size_ratio"]
                goal = f"{where}W1A8, {cell['method']}: {SMALLER:g} x smaller"
                yield _goal(goal, f"{ratio:.1f} x", len(cell["seeds"]), ratio >= SMALLER)
    agreement = min((cell["deployed_agreement_min"] for cell in train + full), default=1.0)
    runs = sum(len(cell["seeds"]) for cell in train + full if "deployed" in cell["runs"])
    yield _goal(
        f"every deployed program agrees with its simulation on {AGREEMENT:.1%} or more",
        f"{agreement:.2%} at least",
        f"{runs} runs",
        agreement >= AGREEMENT,
    )


def _goal(goal: str, measured: str, seeds: int | str, reached: bool) -> str:
    return f"| {goal} | {measured} | {seeds} | {'yes' if reached else '**no**'} |"


def paired(rows: list[dict], method: str, other: str) -> list[str]:
    """Accuracy and sharpness of two methods, and their difference seed by seed."""
    lines = [
        f"| cell | {method} | {other} | difference, points | sharpness, {method} | sharpness, {other} | seeds |",
        "|---" * 7 + "|",
    ]
    for cell in ORDER:
        first, second = matched(rows, (cell, method), (cell, other))
        if first:
            accuracy = [[row["simulated"] for row in found] for found in (first, second)]
            sharp = [f"{statistics.mean(row['sharpness'] for row in found):.3f}" for found in (first, second)]
            difference = percent([a - b for a, b in zip(*accuracy)])
            figures = [*map(percent, accuracy), difference, *sharp, str(len(first))]
            lines.append(f"| {cell} | {' | '.join(figures)} |")
    return lines


def deployed(cells: list[dict]) -> list[str]:
    """Paddle Inference's INT8 program against the simulation, and the packed file against the fp32 one."""
    extra = any("unseen" in cell["runs"] for cell in cells)
    names = ["cell", "method", "simulated", "deployed", "least agreement", "packed, x smaller"]
    names += ["unseen reviews, simulated"] * extra
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for cell in cells:
        figures = [f"{cell['runs']['simulated']:.2%}", "-", "-", "-"]
        if "deployed" in cell["runs"]:
            figures[1:] = (
                f"{cell['runs']['deployed']:.2%}",
                f"{cell['deployed_agreement_min']:.2%}",
                f"{cell['size_ratio']:.1f}",
            )
        if extra:
            figures.append(f"{cell['runs']['unseen']:.2%}")
        lines.append(f"| {cell['cell']} | {cell['method']} | {' | '.join(figures)} |")
    return lines


if __name__ == "__main__":
    run_tool(main)
