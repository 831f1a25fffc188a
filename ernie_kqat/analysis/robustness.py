"""How accuracy holds when the weights' step is not the one trained for: KURE's own claim (arXiv 2002.07686).

Each layer's step is multiplied by a factor, rounded to a power of two, or chosen anew at another bit width. The integers'
bounds stay those of the bit width, so a step that is too small clips, and one that is too large rounds coarsely. The ranges
of the inputs do not move with the factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import config, run_folder
from ..errors import UserError
from .charts import legend, made
from .grids import at_bits, at_powers_of_two
from .plan import told
from .report import COLORS, GREY, Figure, Section, Table, canvas
from .rows import Rows, calibration_file, check, data_file, digests
from .workbench import Score, Workbench, open_workbench

TOOL = "robustness"
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
WIDTHS = (2, 3, 4, 5, 6, 8)

Point = tuple[str, "float | None"]  # ("fp32", None), ("factor", 1.1), ("power of two", None), ("bits", 3)
FP32: Point = ("fp32", None)
POWER_OF_TWO: Point = ("power of two", None)
POINTS: tuple[Point, ...] = (
    FP32,
    *(("factor", factor) for factor in FACTORS),
    POWER_OF_TWO,
    *(("bits", bits) for bits in WIDTHS),
)


@dataclass(frozen=True)
class Options:
    """`quant`: of model folders; a QAT run has its own. `columns`: max_length and names of columns, if odd."""

    data: str
    quant: config.Quant
    calibration: str | None = None
    fp32_activations: bool = False
    rows: int | None = None
    seed: int = 42
    columns: config.Data | None = None


@dataclass(frozen=True)
class Curve:
    """Of one model under one setting; `scores` may lack points that are not measured yet."""

    label: str
    setting: Mapping[str, Any]
    scores: Mapping[Point, Mapping[str, float]]

    def accuracy(self, point: Point) -> float | None:
        return self.scores[point]["accuracy"] if point in self.scores else None

    @property
    def area(self) -> float | None:
        """Mean accuracy over the step, from half of it to one and a half."""
        found = [self.accuracy(("factor", factor)) for factor in FACTORS]
        known = [accuracy for accuracy in found if accuracy is not None]
        return area(FACTORS, known) if len(known) == len(FACTORS) else None


def area(places: Sequence[float], values: Sequence[float]) -> float:
    """Mean of a piecewise linear curve over its places (trapezoid rule)."""
    x, y = np.asarray(places, np.float64), np.asarray(values, np.float64)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (x[-1] - x[0]))


def weights_at(bench: Workbench, point: Point) -> dict[str, np.ndarray]:
    """The weights of every layer as `point` has them."""
    kind, value = point
    if kind == "fp32":
        return {}
    if kind == "power of two":
        return at_powers_of_two(bench)
    assert value is not None
    return bench.on_own_grid(factor=value) if kind == "factor" else at_bits(bench, int(value))


def measure(models: Mapping[str, str], options: Options, output: str | Path) -> dict[str, Any]:
    """Every point of each model of {folder or run: name}; returns what `output` (JSON) holds.

    A point goes to `output` as soon as it is measured; one that is there, of the same files and settings, is not measured
    again. Raises UserError for a model or data that cannot be read.
    """
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows: {options.rows} is under 1")
    data = data_file("--data", options.data)
    for model in models:
        if not Path(model).is_dir():
            raise UserError(f"--model: {model}: no such run or model folder")
    rows = Rows(output, TOOL)
    for model in models:
        calibration = None if _is_quantized_run(model) else calibration_file(options.calibration, data)
        rows.inputs(digests(model, data, calibration))
        setting = _setting(model, options, data, calibration)
        missing = [point for point in POINTS if rows.find(_key(setting, point)) is None]
        if missing:
            bench = open_workbench(model, data, options.quant, calibration, options.columns, options.rows, options.seed)
            _measure(bench, setting, missing, rows, models[model])
    rows.note("names", {**rows.tree.get("names", {}), **models})
    return rows.tree


def _measure(bench: Workbench, setting: dict[str, Any], points: list[Point], rows: Rows, name: str) -> None:
    inputs = () if setting["activation"] == "fp32" else tuple(bench.layers)
    for point in tqdm(points, desc=f"robustness of {name}", unit="point", disable=None):

        def score(point: Point = point) -> Score:
            return bench.fp32 if point == FP32 else bench.measure(weights_at(bench, point), inputs)

        rows.score(_key(setting, point), score)


def _is_quantized_run(model: str) -> bool:
    return run_folder.is_run(model) and run_folder.read_settings(model).Slim.quant is not None


def _setting(model: str, options: Options, data: Path, calibration: Path | None) -> dict[str, Any]:
    """What every score of `model` depends on, beside the point; a QAT run's bits and ranges are its own."""
    weight, activation, own = options.quant.weight, options.quant.activation, calibration is None
    inputs = "own" if own else told(activation)
    return {
        "model": model,
        "data": str(data),
        "rows": options.rows,
        "columns": None if options.columns is None else told(options.columns),
        "calibration": None if own else str(calibration),
        "seed": None if own else options.seed,
        "bits": None if own else weight.bits,
        "granularity": None if own else weight.granularity,
        "range": None if own else weight.range,
        "activation": "fp32" if options.fp32_activations else inputs,
    }


def _key(setting: Mapping[str, Any], point: Point) -> dict[str, Any]:
    return {**setting, "point": point[0], "value": point[1]}


def curves(results: Mapping[str, Any]) -> list[Curve]:
    """One for each model and setting in the JSON, in its order. Raises UserError for results of another tool."""
    check(results, TOOL, "--robustness")
    groups: dict[str, tuple[dict[str, Any], dict[Point, Any]]] = {}
    for row in results["rows"]:
        setting = {name: value for name, value in row["key"].items() if name not in ("point", "value")}
        _, scores = groups.setdefault(repr(setting), (setting, {}))
        scores[row["key"]["point"], row["key"]["value"]] = row["score"]
    names = results.get("names", {})
    labels = [names.get(setting["model"], setting["model"]) for setting, _ in groups.values()]
    settings = [setting for setting, _ in groups.values()]
    return [
        Curve(label if labels.count(label) == 1 else f"{label}, {_differing(setting, settings)}", setting, scores)
        for label, (setting, scores) in zip(labels, groups.values())
    ]


def _differing(setting: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What tells a setting from the others of its model, in words."""
    same = [other for other in others if other["model"] == setting["model"]] if len(others) > 1 else []
    differ = [name for name in setting if any(other[name] != setting[name] for other in same)]
    return ", ".join(f"{name} {setting[name]}" for name in differ) or str(setting["model"])


def table(found: Sequence[Curve]) -> Table:
    """Accuracy in percent by point, one column a model; `-` where not measured yet."""
    rows: list[list[str]] = []
    for point in POINTS:
        rows.append([_words(point), *(_percent(curve.accuracy(point)) for curve in found)])
        if point == ("factor", FACTORS[-1]):
            rows.append(["area over step", *(_percent(curve.area) for curve in found)])
    return Table(["accuracy, %", *(curve.label for curve in found)], rows)


def _words(point: Point) -> str:
    kind, value = point
    return {"fp32": "fp32", "factor": f"step x {value}", "bits": f"{value} bits, range anew"}.get(kind, "step 2^n")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def sections(results: Mapping[str, Any]) -> list[Section]:
    """Curves of all models and the table of their accuracies. Raises UserError for results of another tool."""
    found = curves(results)
    text = (
        "Accuracy when the step of every weight is multiplied by a factor, with inputs quantized at their own ranges unless"
        " the settings say fp32. Area: mean accuracy over the step from half of it to one and a half. 2^n: each step rounded"
        " to the nearest power of two. Other bits: the range found anew by the model's own rule. The claim of KURE (arXiv"
        " 2002.07686) is that a kurtosis near the uniform distribution's 1.8 keeps these curves flat."
    )
    said = [f"{curve.label}: {_described(curve.setting)}." for curve in found]
    figures = (
        _figure(found, "factor", "accuracy", "step / trained step", "Accuracy over the weights' step. Dotted: fp32."),
        _figure(found, "factor", "rms_over_std", "step / trained step", "Noise of the logits over the weights' step."),
        _figure(found, "bits", "accuracy", "bits of the weights", "Accuracy over the bit width. Dotted: fp32."),
    )
    return [Section("Robustness to the step", "\n\n".join([text, *said]), figures, table(found))]


def _described(setting: Mapping[str, Any]) -> str:
    if setting["bits"] is None:
        weights = "a QAT run, its own bits and steps"
    else:
        weights = f"{setting['bits']} bits per {setting['granularity']}, range {setting['range']}"
    inputs = "inputs in fp32" if setting["activation"] == "fp32" else "inputs quantized"
    return f"{weights}; {inputs}; {setting['rows'] or 'all'} rows of {setting['data']}"


def _figure(found: Sequence[Curve], kind: str, what: str, axis: str, caption: str) -> Figure:
    figure, (axes,) = canvas()
    scale = 100 if what == "accuracy" else 1
    for index, curve in enumerate(found):
        points = sorted(_places(curve, kind))
        color = COLORS[index % len(COLORS)]
        values = [scale * curve.scores[kind, place][what] for place in points]
        axes.plot(points, values, ".-", color=color, ms=6, label=curve.label)
        if what == "accuracy" and FP32 in curve.scores:
            axes.axhline(scale * curve.scores[FP32][what], color=color, lw=0.9, ls=":")
    if kind == "factor":
        axes.axvline(1, color=GREY, lw=0.7)
    axes.set_xlabel(axis)
    axes.set_ylabel("accuracy, %" if what == "accuracy" else "logits' rms difference / std")
    legend(figure, axes)
    return made(figure, caption)


def _places(curve: Curve, kind: str) -> Iterator[float]:
    return (value for point, value in curve.scores if point == kind and value is not None)
