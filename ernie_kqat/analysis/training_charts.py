"""Figures of a run: what was logged over training, and the trade-off it ended at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .charts import legend, made
from .report import BLUE, COLORS, GREEN, GREY, ORANGE, Figure, canvas, log_axis
from .training import Curve, Training

KINDS = ("q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2")


def training(run: Training) -> list[Figure]:
    """Kurtosis and distance to target, loss and accuracy, gradient norms: as far as the run logged them."""
    made = []
    if run.kurtosis:
        made += [_kurtosis_curves(run), _distance(run)]
    if run.loss:
        made.append(_curves({"loss": run.loss}, "training loss", "Loss of the logged batches."))
    if run.accuracy:
        percent = [(step, 100 * value) for step, value in run.accuracy]
        made.append(_curves({"accuracy": percent}, "accuracy on dev, %", "Accuracy at each evaluation.", "o-"))
    if run.norms:
        names = {"kurtosis_grad_norm": "kurtosis term", "task_grad_norm": "task"}
        curves = {names[name]: curve for name, curve in run.norms.items()}
        made.append(_curves(curves, "gradient norm", "Gradient norms over the regularized layers.", "-", log=True))
    return made


def trade_off(rows: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Accuracy against latency of one sentence; None where no latency was measured."""
    timed = {name: row for name, row in rows.items() if "batch_1" in row and "accuracy" in row}
    if not timed:
        return None
    figure, (axes,) = canvas(2.4)
    for color, (name, row) in zip((GREY, BLUE), timed.items()):
        axes.plot(row["batch_1"], 100 * row["accuracy"], "o", color=color, ms=8, label=name)
    if "accuracy" in rows.get("simulated", {}):
        axes.axhline(100 * rows["simulated"]["accuracy"], color=ORANGE, lw=1, ls="--", label="simulated")
    axes.set_xlim(left=0, right=1.15 * max(row["batch_1"] for row in timed.values()))
    axes.margins(y=0.4)
    axes.set_xlabel("ms a sentence, batch 1")
    axes.set_ylabel("accuracy, %")
    legend(figure, axes)
    return made(figure, "Accuracy against latency.")


def _kurtosis_curves(run: Training) -> Figure:
    figure, (axes,) = canvas(3.4)
    for name, curve in run.kurtosis.items():
        kind = name.rsplit(".", 1)[-1]
        color = COLORS[KINDS.index(kind)] if kind in KINDS else GREY
        axes.plot(*zip(*curve), color=color, lw=1, alpha=0.8)
    first, last = _span(list(run.kurtosis.values()))
    for target in sorted(set(run.targets.values())):
        axes.plot([first, last], [target, target], color="#22262c", lw=0.7, ls=":", zorder=1)
    for color, kind in zip(COLORS, KINDS):
        if any(name.endswith(kind) for name in run.kurtosis):
            axes.plot([], [], color=color, label=kind)
    axes.plot([], [], color="#22262c", lw=0.7, ls=":", label="targets")
    log_axis(axes, "y")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("kurtosis")
    legend(figure, axes, 3)
    return made(figure, "Kurtosis of each regularized layer over training.")


def _distance(run: Training) -> Figure:
    values: dict[int, list[float]] = {}
    for name, curve in run.kurtosis.items():
        for step, k in curve:
            values.setdefault(step, []).append(100 * abs(k / run.targets[name] - 1))
    curves = {
        "worst layer": [(step, max(of)) for step, of in values.items()],
        "mean": [(step, float(np.mean(of))) for step, of in values.items()],
    }
    return _curves(curves, "|K / T - 1|, %", "Distance of the kurtosis from its targets.", ".-", log=True)


def _curves(curves: Mapping[str, Curve], axis: str, caption: str, style: str = "-", log: bool = False) -> Figure:
    figure, (axes,) = canvas(2.6)
    for color, (label, curve) in zip((BLUE, ORANGE, GREEN), curves.items()):
        axes.plot(*zip(*curve), style, color=color, ms=4, label=label)
    if log:
        log_axis(axes, "y")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(axis)
    if len(curves) > 1:
        legend(figure, axes)
    return made(figure, caption)


def _span(curves: Sequence[Curve]) -> tuple[int, int]:
    steps = [step for curve in curves for step, _ in curve]
    return min(steps), max(steps)
