"""Tables and figures of tools/studies/kurtosis.py: docs/results/kurtosis.json (cells), the tables in the docs, figures."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import ernie_kqat  # noqa: F401  first: it loads zlib before paddle
from ernie_kqat import cli, files
from ernie_kqat.analysis import robustness
from ernie_kqat.errors import run_tool
from ernie_kqat.methods.kurtosis import kurtosis
from ernie_kqat.models.loading import pretrained_matrices

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
PAGES = (RESULTS / "kurtosis.md", ROOT / "docs/decoupled-kurtosis.md")
BITS = [(8, "channel"), (4, "channel"), (4, "tensor"), (3, "channel"), (2, "channel"), (2, "tensor")]
BARS = ("W4t absmax", "W3c absmax")
LETTER = {"channel": "c", "tensor": "t"}


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--pretrained", metavar="DIR", help="the original weights; draws kurtosis by layer")
    parser.add_argument("--runs", metavar="DIR", default="output/studies/kurtosis/SST-2/runs", help="of the study")
    arguments = parser.parse_args()
    rows = json.loads((RESULTS / "kurtosis_runs.json").read_text(encoding="utf-8"))
    cells = list(cells_of(rows))
    files.write_json(RESULTS / "kurtosis.json", cells)
    tables = {
        "select": selection([cell for cell in cells if cell["task"] == "SST-2"]),
        "qat": grid([cell for cell in cells if cell["stage"] == "qat" and cell["task"] == "SST-2"]),
        "bars": grid(
            [
                c
                for c in cells
                if "ptq" in c["stage"] and where(c) in BARS and c["task"] == "SST-2" and "held" not in c["stage"]
            ]
        ),
        "difference": differences(rows),
        "deployed": deployed(rows),
        **{
            f"ptq {task}": grid([c for c in cells if c["stage"] in ("ptq", "kure+ptq") and c["task"] == task])
            for task in dict.fromkeys(cell["task"] for cell in cells)
        },
    }
    curves = RESULTS / "kurtosis_robustness.json"
    if curves.is_file():
        tables["robustness"] = robust(json.loads(curves.read_text(encoding="utf-8")))
    places = 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for name, lines in tables.items():
            block = "\n".join([f"<!-- table: {name} -->", *lines, "<!-- end -->"])
            page, found = re.subn(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, b=block: b, page, flags=re.S)
            places += found
        files.write_text(path, page)
    print("\n".join(line for name, lines in tables.items() for line in [f"{name}:", *lines, ""]))
    print(f"{len(tables)} tables, {places} places in {', '.join(path.name for path in PAGES)}")
    draw(arguments, cells)
    return 0


def cells_of(rows: list[dict]) -> Iterator[dict]:
    """One row for the seeds of each (stage, policy, bits, granularity, range)."""
    names = ("task", "weight_bits", "weight_granularity", "act_bits", "weight_range", "stage", "policy", "lambda")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    for key, found in groups.items():
        accuracy = [row["simulated"] for row in found]
        runs = {what: mean_of(found, what) for what in ("fp32", "simulated", "deployed") if what in found[0]}
        yield {
            **dict(zip(names, key)),
            "seeds": [row["seed"] for row in found],
            "accuracy_mean": round(statistics.mean(accuracy), 5),
            "accuracy_std": round(statistics.stdev(accuracy), 5) if len(accuracy) > 1 else None,
            "runs": runs,
            "command": found[0]["command"],
        }


def mean_of(rows: list[dict], what: str) -> float:
    return round(statistics.mean(row[what] for row in rows if what in row), 5)


def percent(cell: dict) -> str:
    spread = "" if cell["accuracy_std"] is None else f" ± {100 * cell['accuracy_std']:.2f}"
    return f"{100 * cell['accuracy_mean']:.2f}{spread}"


def selection(cells: list[dict]) -> list[str]:
    """Seed 0 on the held-back rows."""
    found = [cell for cell in cells if cell["stage"].endswith("(held-back)")]
    places = list(dict.fromkeys(where(cell) for cell in found))
    lines = [f"| policy | fp32 | {' | '.join(places)} |", "|---" * (len(places) + 2) + "|"]
    for policy in dict.fromkeys(cell["policy"] for cell in found):
        own = {where(cell): cell for cell in found if cell["policy"] == policy}
        fp32 = next(iter(own.values()))["runs"]["fp32"]
        values = [percent(own[place]) if place in own else "-" for place in places]
        lines.append(f"| {policy} | {100 * fp32:.2f} | {' | '.join(values)} |")
    return lines


def where(cell: dict) -> str:
    return f"W{cell['weight_bits']}{LETTER[cell['weight_granularity']]} {cell['weight_range']}"


def grid(cells: list[dict]) -> list[str]:
    """Policies by cells; simulated accuracy on dev, mean ± standard deviation over the seeds, in percent."""
    places = [
        place
        for bits, granularity in BITS
        for range_ in ("absmax", "mse")
        if (place := f"W{bits}{LETTER[granularity]} {range_}") in {where(cell) for cell in cells}
    ]
    fp32 = any("fp32" in cell["runs"] for cell in cells)
    lines = [f"| policy |{' fp32 |' if fp32 else ''} {' | '.join(places)} |", "|---" * (len(places) + 1 + fp32) + "|"]
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        own = {where(cell): cell for cell in cells if cell["policy"] == policy}
        values = [percent(own[place]) if place in own else "-" for place in places]
        if fp32:
            values.insert(0, f"{100 * next(iter(own.values()))['runs']['fp32']:.2f}")
        lines.append(f"| {policy} | {' | '.join(values)} |")
    return lines


def differences(rows: list[dict]) -> list[str]:
    """What a policy adds to the same training without it, seed by seed."""
    lines = ["| task | stage | cell | policy | difference to none, points | seeds |", "|---|---|---|---|---|---|"]

    def place_of(row: dict) -> tuple:
        return row["task"], row["stage"], where(row), row["seed"]

    plain = {place_of(row): row["simulated"] for row in rows if row["policy"] == "none"}
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        base = plain.get(place_of(row))
        if base is not None and row["policy"] != "none" and not row["stage"].endswith("(held-back)"):
            groups.setdefault((*place_of(row)[:3], row["policy"]), []).append(100 * (row["simulated"] - base))
    for (task, stage, place, policy), found in sorted(groups.items()):
        if place[1] in "23" and len(found) > 1:
            spread = f"{statistics.mean(found):+.2f} ± {statistics.stdev(found):.2f}"
            lines.append(f"| {task} | {stage} | {place} | {policy} | {spread} | {len(found)} |")
    return lines


def deployed(rows: list[dict]) -> list[str]:
    """Paddle Inference's INT8 program against the simulation, first seed."""
    lines = ["| task | stage | cell | policy | simulated | deployed | equal labels |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "deployed" in row:
            figures = f"{row['simulated']:.2%} | {row['deployed']:.2%} | {row['deployed_agreement']:.2%}"
            lines.append(f"| {row['task']} | {row['stage']} | {where(row)} | {row['policy']} | {figures} |")
    return lines


def robust(results: dict) -> list[str]:
    """Area under accuracy over the step, and the power-of-two step, by model."""
    lines = ["| model | fp32 | trained step | area, step x 0.5 to 1.5 | step 2^n |", "|---|---|---|---|---|"]
    groups: dict[str, list[list[float]]] = {}
    for curve in robustness.curves(results):
        name = re.sub(r",? seed \d+", "", curve.label)
        points = (("fp32", None), ("factor", 1.0), None, ("power of two", None))
        found = [curve.area if point is None else curve.accuracy(point) for point in points]
        if all(value is not None for value in found):
            groups.setdefault(name, []).append(found)
    for name, seeds in groups.items():
        columns = [[100 * value for value in column] for column in zip(*seeds)]
        cells = [f"{statistics.mean(c):.2f}" + (f" ± {statistics.stdev(c):.2f}" if len(c) > 1 else "") for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(arguments, cells: list[dict]) -> None:
    """The figures of kurtosis.md, as SVG beside it."""
    if arguments.pretrained:
        by_layer(
            {name: kurtosis(w) for name, w in pretrained_matrices(arguments.pretrained).items() if ".encoder." in name}
        )
    logs = RESULTS / "kurtosis_training.json"
    found = json.loads(logs.read_text(encoding="utf-8")) if logs.is_file() else {}
    for run in sorted(Path(arguments.runs).glob("fp32-*-0/metrics.jsonl")):
        series = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
        found[run.parent.name] = [{key: v for key, v in row.items() if key != "layers"} for row in series]
    files.write_json(logs, found)
    over_training(found)


def by_layer(found: dict[str, float]) -> None:
    """Kurtosis of each encoder matrix, and its share of KURE's loss."""
    figure, (left, right) = canvas(2)
    names = [re.sub(r"(ernie\.)?encoder\.layers\.|self_attn\.|\.weight", "", name) for name in found]
    values = list(found.values())
    left.barh(names, values, color="#2c5aa0")
    left.axvline(1.8, color="#c0392b", lw=1)
    left.set_xscale("log")
    left.set_xlabel("kurtosis (line: 1.8)")
    total = sum((value - 1.8) ** 2 for value in values)
    right.barh(names, [(value - 1.8) ** 2 / total for value in values], color="#c0392b")
    right.set_xscale("log")
    right.set_xlabel("share of sum (K - 1.8)²")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=6)
    right.set_yticklabels([])
    save(figure, "kurtosis_layers.svg")


def over_training(logs: dict[str, list[dict]]) -> None:
    """Gradient norms and task loss of the runs that have the term in the loss, and the largest kurtosis of all."""
    figure, axes = canvas(3)
    plain = {row["step"]: row["loss"] for row in logs.get("fp32-none-0", []) if "loss" in row}
    for index, (name, rows) in enumerate(logs.items()):
        steps = [row for row in rows if "loss" in row]
        label, color = name[len("fp32-") : -2].replace("_", " ").replace("-", ", ", 1), f"C{index % 10}"
        x = [row["step"] for row in steps]
        if "kurtosis_grad_norm" in steps[0]:
            known = [row for row in steps if row.get("task_grad_norm")]
            norms = [row["kurtosis_grad_norm"] / row["task_grad_norm"] for row in known]
            axes[0].plot([row["step"] for row in known], norms, ".-", color=color, label=label)
        if "kurtosis_max" in steps[0]:
            axes[1].plot(x, [row.get("kurtosis_max", float("nan")) for row in steps], ".-", color=color, label=label)
        losses = [row["loss"] / plain.get(row["step"], float("nan")) for row in steps]  # the batches are the same
        axes[2].plot(x, losses, ".-", color=color, label=label)
    titles = ("gradient norm, kurtosis / task", "largest kurtosis", "task loss / without the term")
    for one, title in zip(axes, titles):
        one.set_xlabel("step")
        one.set_title(title, fontsize=9)
        one.set_yscale("log")
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    save(figure, "kurtosis_training.svg")


def canvas(columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.2)
    return figure, axes


def save(figure, name: str) -> None:
    import io

    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "ernie_kqat"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    files.write_text(RESULTS / name, buffer.getvalue())


if __name__ == "__main__":
    run_tool(main)
