"""A mixed-precision result, frontier.json, as tables, figures and sections of the report."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from .charts import legend, made, short
from .plan import described
from .report import BLUE, GREEN, GREY, ORANGE, Figure, Section, Table, canvas
from .rows import check

TOOL = "mixed_precision"


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The frontier and the bits of each layer. Raises UserError for results of another tool."""
    check(results, TOOL, "--mixed")
    text = (
        " ".join(findings(results))
        + f" One row is {100 / results['rows']:.2f} points. Sizes are of the Linears' weights with their bits packed, and"
        " their steps; embeddings and biases stay in fp32 and are not counted."
    )
    wide, narrow = results["settings"]["bits"]
    layers = (
        f"Noise of the logits when only this layer is at {narrow} bits, all others at {wide}, inputs in fp32. Layers are"
        " narrowed by the rise of the squared error per byte saved, so a large layer may be narrow where a small one of"
        " the same noise is not."
    )
    frontier = Section(
        "Mixed precision: frontier", text, (_frontier(results), _noise(results)), frontier_table(results)
    )
    return [frontier, Section("Mixed precision: bits of each layer", layers, (_layers(results),), layer_table(results))]


def findings(results: Mapping[str, Any]) -> list[str]:
    """What plan.yaml says at its head, without the command."""
    lines = described(results)
    return [lines[0], *lines[2:]]


def frontier_table(results: Mapping[str, Any]) -> Table:
    """One row a measured plan, fp32 first; the chosen one is marked."""
    header = ["layers narrowed", "size kB", "of fp32", "accuracy %", "loss", "= fp32 %", "rms/std", ""]
    rows = [_row("fp32", results["fp32"], "")]
    for plan in results["frontier"]:
        mark = "<- chosen" if plan == results["chosen"] else ""
        rows.append(_row(f"{plan['narrow_layers']} of {len(results['layers'])}", plan, mark))
    return Table(header, rows)


def layer_table(results: Mapping[str, Any]) -> Table:
    """One row a layer, in the order in which they are narrowed."""
    header = ["layer", "bits", "kB saved", "squared error / kB", "loss rise", "rms/std alone"]
    rows = [
        [
            layer["name"],
            str(layer["bits"]),
            f"{layer['bytes_saved'] / 1e3:.1f}",
            f"{1e3 * layer['rise_per_byte']:.2e}",
            f"{layer['loss_rise']:+.5f}",
            f"{layer['rms_over_std']:.4f}",
        ]
        for layer in results["layers"]
    ]
    return Table(header, rows)


def csv_text(results: Mapping[str, Any]) -> str:
    """frontier.csv: one row a measured plan."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(results["frontier"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["frontier"])
    return out.getvalue()


def _row(name: str, plan: Mapping[str, Any], mark: str) -> list[str]:
    size = [f"{plan['size_bytes'] / 1e3:.1f}", f"{plan['ratio']:.4f}", f"{100 * plan['accuracy']:.2f}"]
    return [name, *size, f"{plan['loss']:.4f}", f"{100 * plan['agreement']:.2f}", f"{plan['rms_over_std']:.4f}", mark]


def _frontier(results: Mapping[str, Any]) -> Figure:
    figure, axes = _plans(results, "accuracy", 100)
    axes.axhline(100 * results["fp32"]["accuracy"], color=GREY, lw=1, ls="--", label="fp32")
    floor = results["settings"]["floor"]
    if floor is not None:
        axes.axhline(100 * floor, color=GREEN, lw=1, ls=":", label="floor")
    axes.set_ylabel("accuracy, %")
    legend(figure, axes, 4)
    return made(figure, "Accuracy of the measured plans by size of the packed weights.")


def _noise(results: Mapping[str, Any]) -> Figure:
    figure, axes = _plans(results, "rms_over_std", 1)
    axes.set_ylabel("logits' rms difference / std")
    axes.set_ylim(bottom=0)
    legend(figure, axes, 4)
    return made(figure, "Noise of the logits of the same plans, against fp32.")


def _plans(results: Mapping[str, Any], what: str, scale: float):
    figure, (axes,) = canvas()
    plans, chosen = results["frontier"], results["chosen"]
    sizes = [plan["size_bytes"] / 1e6 for plan in plans]
    axes.plot(sizes, [scale * plan[what] for plan in plans], ".-", color=BLUE, ms=6, label="plans")
    axes.plot(chosen["size_bytes"] / 1e6, scale * chosen[what], "o", color=ORANGE, ms=7, label="chosen")
    axes.set_xlabel("packed weights, MB")
    return figure, axes


def _layers(results: Mapping[str, Any]) -> Figure:
    layers = sorted(results["layers"], key=lambda layer: layer["place"])
    figure, (axes,) = canvas(0.95 + 0.165 * len(layers))
    for bits, color in zip(results["settings"]["bits"], (BLUE, ORANGE)):
        places = [row for row, layer in enumerate(layers) if layer["bits"] == bits]
        axes.barh(places, [layers[row]["rms_over_std"] for row in places], 0.7, color=color, label=f"{bits} bits")
    axes.set_yticks(range(len(layers)), [short(layer["name"]) for layer in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("logits' rms difference / std, this layer narrow")
    legend(figure, axes)
    return made(figure, "Bits that the plan gives each layer, and the noise that it makes alone when narrow.")
