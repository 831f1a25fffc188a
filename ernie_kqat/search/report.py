"""A search as a table and as a figure: what its trials reached, and at what size and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..analysis.report import BLUE, GREY, RED, canvas

COSTS = (("packed_bytes", 1e6, "packed file, MB"), ("latency_ms", 1.0, "ms a sentence, one at a time"))


def table(found: dict[str, Any]) -> list[str]:
    """The trials that no other beats, smallest first; then how the others ended."""
    rows = sorted(
        (row for row in found["trials"] if row.get("folder") in found["front"]), key=lambda row: row["packed_bytes"]
    )
    tested = any("test" in row for row in rows)
    lines = [
        f"| trial | values | dev | deployed |{' test |' if tested else ''} packed MB | ms | INT8 program MB |",
        "|---" * (7 + tested) + "|",
    ]
    for row in rows:
        values = ", ".join(
            f"{key.split('.', 1)[-1]} {_short(value)}" for key, value in {**row["study"], **row["values"]}.items()
        )
        figures = [f"{row['dev']:.2%}", f"{row['deployed']:.2%}"]
        figures += [f"{row['test']:.2%}"] if tested else []
        figures += [f"{row['packed_bytes'] / 1e6:.2f}", f"{row['latency_ms']:.2f}", f"{row['size_bytes'] / 1e6:.1f}"]
        lines.append(f"| {row['folder']} | {values} | {' | '.join(figures)} |")
    states = [row["state"] for row in found["trials"]]
    ended = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return [*lines, "", f"{len(states)} trials: {ended}"]


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy of the deployed program against packed size and against time, as SVG or PNG by the name."""
    rows = [row for row in found["trials"] if row["state"] == "complete"]
    if not rows:
        return
    figure, panels = canvas(3.2, columns=2, width=9)
    for axes, (cost, unit, title) in zip(panels, COSTS):
        for row in rows:
            best = row["folder"] in found["front"]
            axes.plot(row[cost] / unit, 100 * row["deployed"], "o", color=RED if best else GREY, ms=5 if best else 3)
        line = _steps([(row[cost] / unit, 100 * row["deployed"]) for row in rows])
        axes.step(*zip(*line), where="post", color=BLUE, lw=1)
        axes.set_xlabel(title)
    panels[0].set_ylabel(f"100 x {rows[0]['metric']}, deployed")
    figure.savefig(path, bbox_inches="tight")


def _steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The best accuracy at each cost or less."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(one)}" for key, one in value.items()) + "}"
    return "off" if value is None else str(value)
