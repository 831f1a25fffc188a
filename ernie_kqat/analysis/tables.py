"""An analysis as records, for JSON and CSV, and as tables, for the terminal and the report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..machine import machine, versions
from .analyze import Analysis, Options
from .report import Table
from .weights import WAYS, Way

LayerRecords = dict[str, dict[str, Any]]


def tree(options: Options, found: Sequence[Analysis]) -> dict[str, Any]:
    """What analysis.json holds: settings, machine, versions, and each model's layers; None for what is not finite."""
    return _plain(
        {
            "settings": asdict(options),
            "machine": machine(),
            "versions": versions(),
            "models": [_model(analysis) for analysis in found],
        }
    )


def csv_text(found: Sequence[Analysis]) -> str:
    """What layers.csv holds: one row a layer and model."""
    rows = []
    for analysis in found:
        for name, record in layers(analysis).items():
            del record["weights"]["histogram"]
            rows.append(_plain({"model": analysis.model, "layer": name, **_flat(record)}))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def layers(analysis: Analysis) -> LayerRecords:
    """{layer: {weights: …, input: …, only: …, all_but: …}}; the last three where measured."""
    found: LayerRecords = {}
    for of in analysis.weights:
        record = asdict(of)
        del record["name"], record["histogram_peak"]
        record["absmax_over_std"] = of.absmax_over_std
        record["sqnr"] = {"_".join(way): values for way, values in of.sqnr.items()}
        record["histogram"] = {"peak": of.histogram_peak, "counts": of.histogram.tolist()}
        record["shape"] = {"in": of.shape[0], "out": of.shape[1]}
        found[of.name] = {"weights": record}
    for seen in analysis.activations:
        record = asdict(seen)
        del record["name"]
        record["absmax"] = {"mean": sum(seen.absmax) / len(seen.absmax), "max": max(seen.absmax)}
        found[seen.name]["input"] = record
    if analysis.sensitivity is not None:
        for which in ("only", "all_but"):
            for name, score in getattr(analysis.sensitivity, which).items():
                found[name][which] = asdict(score)
    return found


def layer_table(options: Options, found: Sequence[Analysis], count: int | None = None) -> Table:
    """One row a layer, worst SQNR at `options.bits` of any model first; embeddings, which stay in fp32, after the rest.

    `count` cuts it.
    """
    worst: dict[str, float] = {}
    for analysis in found:
        for of in analysis.weights:
            worst[of.name] = min(worst.get(of.name, math.inf), of.sqnr[options.way][options.bits])
    order = sorted(worst, key=lambda name: ("embeddings" in name, worst[name]))
    header, columns = ["layer"], []
    for title, cell in _columns(options, found):
        header.append(title)
        columns.append(cell)
    rows = [[name, *(cell(name) for cell in columns)] for name in order[:count]]
    return Table(header, rows)


def trade_off_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """fp32, simulated and deployed of a run."""
    columns = (
        ("accuracy", "accuracy %", 100.0, ".2f"),
        ("agreement_with_fp32", "= fp32 %", 100.0, ".2f"),
        ("batch_1", "ms, batch 1", 1.0, ".2f"),
        ("batch_32", "ms a sentence, batch 32", 1.0, ".2f"),
        ("size_bytes", "MB on disk", 1e-6, ".1f"),
    )
    cells = [
        [name, *(format(scale * row[key], spec) if key in row else "" for key, _, scale, spec in columns)]
        for name, row in rows.items()
    ]
    return Table(["model", *(title for _, title, _, _ in columns)], cells)


def text_of(table: Table) -> str:
    """A table in plain characters: first column left, the others right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def decibels(value: float) -> str:
    """One decimal; `inf` where nothing is lost."""
    return f"{value:.1f}"


def _columns(options: Options, found: Sequence[Analysis]):
    """(title, layer -> cell) of the layer table."""
    if len(found) == 1:
        of = {layer.name: layer for layer in found[0].weights}
        yield "shape", lambda name: "x".join(map(str, of[name].shape))
    for analysis in found:
        yield "K" + _mark(analysis), _cell(analysis, lambda layer: f"{layer.kurtosis:.4g}")
    if len(found) == 1:
        yield "max/std", _cell(found[0], lambda layer: f"{layer.absmax_over_std:.1f}")
    ways = WAYS if len(found) == 1 else dict.fromkeys((options.way, (options.granularity, "mse")))
    for way in ways:
        for analysis in found:
            yield _short(way) + _mark(analysis), _cell(analysis, _sqnr(way, options.bits))
    for analysis in found:
        if analysis.sensitivity is not None:
            yield "acc" + _mark(analysis), _only(analysis)


def _cell(analysis: Analysis, show):
    layers_of = {layer.name: layer for layer in analysis.weights}
    return lambda name: show(layers_of[name]) if name in layers_of else ""


def _sqnr(way: Way, bits: int):
    return lambda layer: decibels(layer.sqnr[way][bits])


def _only(analysis: Analysis):
    of = analysis.sensitivity
    assert of is not None
    return lambda name: f"{100 * (of.only[name].accuracy - of.fp32.accuracy):+.1f}" if name in of.only else ""


def _mark(analysis: Analysis) -> str:
    return {"": "", "before": " <", "after": " >"}[analysis.label]


def _short(way: Way) -> str:
    return f"{ {'tensor': 'T', 'channel': 'C'}[way[0]] } {way[1]}"


def _model(analysis: Analysis) -> dict[str, Any]:
    of = analysis.sensitivity
    return {
        "model": analysis.model,
        "label": analysis.label,
        "kind": analysis.kind,
        "rows": analysis.rows,
        "fp32": None if of is None else asdict(of.fp32),
        "everything": None if of is None else asdict(of.everything),
        "layers": layers(analysis),
        "training": None if analysis.training is None else asdict(analysis.training),
        "trade_off": analysis.trade_off,
    }


def _plain(value: Any) -> Any:
    """Ready for JSON: string keys, lists, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat.update(_flat(item, f"{name}_") if isinstance(item, Mapping) else {name: item})
    return flat
