"""The race as text and as a figure."""

from __future__ import annotations

from typing import Any

from ..analysis.report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, canvas
from .candidates import FP32, OURS, PLAIN

COLOR = {"ours": ORANGE, "paddle": BLUE, "openvino": GREEN, "onnxruntime": PURPLE, "paddleslim": RED}
MARKER = {"bf16": "s", "int8+bf16": "D", "native": "*"}


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: milliseconds a sentence of each engine in each cell, its accuracy; then the summary."""
    cells, about = found["cells"], found["engines"]
    titles = [f"{cell['length']} x {cell['batch']}" for cell in cells]
    lines = [f"| ms a sentence (tokens x batch) | accuracy | {' | '.join(titles)} |", "|---" * (len(cells) + 2) + "|"]
    for name, one in about.items():
        accuracy = "-" if one["accuracy"] is None else f"{one['accuracy']:.2%}"
        times = (cell["engines"][name]["ms"] for cell in cells)
        lines.append(f"| {name} | {accuracy} | {' | '.join(f'{ms:.2f}' for ms in times)} |")
    spreads = [figures["spread"] for cell in cells for figures in cell["engines"].values()]
    lines += ["", f"largest spread of a cell's passes: {max(spreads):.0%}"]
    lines += [
        f"{key}: {value if isinstance(value, str) else format(value, '.2f')}" for key, value in found["summary"].items()
    ]
    limit = found["roofline"]
    lines.append(f"measured peak: {limit['int8_gops']:.0f} GOPS of INT8, {limit['copy_gb']:.1f} GB/s")
    lines += [
        f"share of the INT8 peak at {cell['length']} x {cell['batch']}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in cell["share"].items())
        for cell in limit["cells"]
    ]
    return lines


def draw(found: dict[str, Any], path: str) -> None:
    """Speed of each engine in each cell against the fastest peer's (or Paddle's fp32, without peers), as SVG or PNG."""
    from matplotlib.ticker import NullLocator

    cells, names = found["cells"], list(found["engines"])
    peers = [name for name in names if name not in OURS] or [FP32]
    figure, (axes,) = canvas(0.34 * len(cells) + 1.1, width=7.5)
    places = range(len(cells))
    for name in names:
        speeds = [min(cell["engines"][peer]["ms"] for peer in peers) / cell["engines"][name]["ms"] for cell in cells]
        family, _, precision = name.partition(" ")
        color = COLOR[family] if name != PLAIN else BLUE
        face = color if "int8" in precision or family == "ours" else "none"
        axes.plot(speeds, places, MARKER.get(precision, "o"), color=color, mfc=face, ms=5, label=name)
    axes.set_yticks(places, [f"{_length(cell)}, batch {cell['batch']}" for cell in cells])
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.125, 0.25, 0.5, 1, 2, 4], ["1/8", "1/4", "1/2", "1", "2", "4"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sentences a second, over those of the fastest peer")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def _length(cell: dict[str, Any]) -> str:
    return f"{cell['length']} tokens" if cell["length"].isdigit() else f"{cell['length']} lengths"
