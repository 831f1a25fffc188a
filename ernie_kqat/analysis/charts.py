"""Figures of the report. One row a layer in most; `before` is hollow or grey, `after`, or the only model, is filled."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .activations import ActivationStatistics
from .report import BLUE, COLORS, GREY, ORANGE, RED, Figure, canvas, log_axis, svg
from .sensitivity import Sensitivity
from .weights import Way, WeightStatistics

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

ROW = 0.165  # inches of a layer's row
Named = Mapping[str, Sequence[WeightStatistics]]  # {label of a model: its layers}, one or two


def short(name: str) -> str:
    """A layer's name as the figures have it: `0 q_proj`, `word embeddings`, `pooler`."""
    name = re.sub(r"^ernie\.|^encoder\.|\.dense$", "", name).replace("encoder.layers.", "").replace("self_attn.", "")
    if name.startswith("embeddings."):
        return name.split(".", 1)[1].replace("_embeddings", " embedding").replace("_", " ")
    return name.replace(".", " ")


def kurtosis(models: Named, targets: Mapping[str, float]) -> Figure:
    """K of each layer, and the targets of a run."""
    figure, axes, names = _dots(models, lambda of: of.kurtosis)
    shown = {name: targets[name] for name in names if name in targets}
    if shown:
        places = [names.index(name) for name in shown]
        axes.plot(list(shown.values()), places, "|", color=ORANGE, ms=9, mew=1.6, label="target")
    axes.set_xlabel("kurtosis (uniform 1.8, Gaussian 3)")
    for value in (1.8, 3):
        axes.axvline(value, color=GREY, lw=0.7, ls=":")
    log_axis(axes)
    legend(figure, axes)
    return made(figure, "Kurtosis of each weight matrix.")


def outliers(models: Named) -> Figure:
    """The largest weight of each layer in standard deviations."""
    figure, axes, _ = _dots(models, lambda of: of.absmax_over_std)
    axes.set_xlabel("max |w| / std")
    log_axis(axes)
    legend(figure, axes)
    return made(figure, "The largest weight of each matrix in standard deviations.")


def sqnr(models: Named, way: Way) -> Figure:
    """SQNR of each layer at each bit width, one way to choose the steps."""
    names = _names(models)
    figure, axes = _rows(names)
    widths = list(next(iter(models.values()))[0].sqnr[way])
    for style, layers in zip(_styles(models), models.values()):
        found = {of.name: of.sqnr[way] for of in layers}
        for color, bits in zip(COLORS, widths):
            values = [_finite(found[name][bits]) if name in found else np.nan for name in names]
            axes.plot(values, range(len(names)), **{**style, "color": color})
    for color, bits in zip(COLORS, widths):
        axes.plot([], [], "o", color=color, ms=4, label=f"{bits} bits")
    axes.set_xlabel("SQNR, dB (higher is better)")
    axes.axvline(0, color=GREY, lw=0.7)
    legend(figure, axes)
    hollow = f" Hollow: {next(iter(models))}." if len(models) > 1 else ""
    return made(figure, f"Weights per {way[0]}, range by {_range_words(way[1])}.{hollow}")


def histograms(models: Named, bits: int) -> list[Figure]:
    """Small multiples, one figure an encoder layer, one for the rest; counts on a logarithmic axis."""
    groups: dict[str, list[str]] = {}
    for name in _names(models):
        index = short(name).split(" ")[0]
        groups.setdefault(f"Encoder layer {index}" if index.isdigit() else "Embeddings and head", []).append(name)
    found = [{of.name: of for of in layers} for layers in models.values()]
    groups = dict(sorted(groups.items(), key=lambda group: not group[0].startswith("Encoder")))
    return [_histograms(title, names, list(models), found, bits) for title, names in groups.items()]


def activation_ranges(layers: Sequence[ActivationStatistics], label: str) -> Figure:
    """How far each Linear's input reaches, and the ranges a quantizer would give it."""
    names = [of.name for of in layers]
    figure, axes = _rows(names)
    rows = np.arange(len(names))
    axes.hlines(rows, [of.percentile for of in layers], [max(of.absmax) for of in layers], color=GREY, lw=1.2)
    axes.plot([of.percentile for of in layers], rows, "|", color=GREY, ms=7, mew=1.4, label="99.9 % of |x|")
    axes.plot([max(of.absmax) for of in layers], rows, ".", color=GREY, ms=6, label="max |x|")
    for way, color, marker in (("moving_average", BLUE, "o"), ("mse", ORANGE, "D")):
        axes.plot([of.ranges[way] for of in layers], rows, marker, color=color, ms=3.6, label=_range_words(way))
    log_axis(axes)
    axes.set_xlabel("|input|")
    legend(figure, axes)
    return made(figure, f"Inputs of each Linear and two ranges for them{_of(label)}.")


def activation_sqnr(layers: Sequence[ActivationStatistics], label: str) -> Figure:
    """SQNR of each Linear's input at 8 bits."""
    names = [of.name for of in layers]
    figure, axes = _rows(names)
    for way, color, marker in (("moving_average", BLUE, "o"), ("mse", ORANGE, "D")):
        values = [_finite(of.sqnr[way]) for of in layers]
        axes.plot(values, range(len(names)), marker, color=color, ms=3.6, label=_range_words(way))
    axes.set_xlabel("SQNR at 8 bits, dB (higher is better)")
    legend(figure, axes)
    return made(figure, f"What 8 bits leave of each Linear's input{_of(label)}.")


def sensitivity(models: Mapping[str, Sensitivity]) -> list[Figure]:
    """Bars a layer: accuracy and logit noise, when only it is quantized and when all but it are."""
    plots = (
        ("only", "accuracy", "accuracy - fp32, points", "Only this layer quantized: accuracy."),
        ("all_but", "accuracy", "accuracy - all quantized, points", "All but this layer quantized: accuracy regained."),
        ("only", "rms_over_std", "logits' rms difference / std", "Only this layer quantized: noise of the logits."),
        (
            "all_but",
            "rms_over_std",
            "all quantized - this, rms / std",
            "All but this layer quantized: noise taken away.",
        ),
    )
    return [_sensitivity(models, *plot) for plot in plots]


def _histograms(
    title: str, names: list[str], labels: list[str], found: list[dict[str, WeightStatistics]], bits: int
) -> Figure:
    from matplotlib.ticker import NullLocator

    columns = 2
    rows = -(-len(names) // columns)
    figure, grid = canvas(0.8 + 1.2 * rows, rows, columns)
    for axes, name in zip(grid, names):
        for index, layers in enumerate(found):
            if name in layers:
                _histogram(axes, layers[name], before=index < len(found) - 1)
        last = next(layers[name] for layers in reversed(found) if name in layers)
        for sign in (-1, 1):
            axes.axvline(sign * last.absmax, color=RED, lw=0.9)
            axes.axvline(sign * last.mse_range[bits], color=ORANGE, lw=0.9, ls="--")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(short(name), loc="left", pad=3, fontsize=9)
        axes.locator_params(axis="x", nbins=3)
    for axes in grid[len(names) :]:
        axes.remove()
    handles = [_patch(GREY, labels[0])] if len(labels) > 1 else []
    handles += [_patch(BLUE, labels[-1] if len(labels) > 1 else "weights", hollow=True)]
    handles += [_line(RED, "absmax", "-"), _line(ORANGE, f"least squares, {bits} bits", "--")]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, borderaxespad=0, fontsize=9)
    of = f" of {labels[-1]}" if len(labels) > 1 else ""
    return made(figure, f"{title}: number of weights by value, logarithmic counts; lines: ranges{of} per tensor.")


def _histogram(axes: matplotlib.axes.Axes, of: WeightStatistics, before: bool) -> None:
    edges = np.linspace(-of.histogram_peak, of.histogram_peak, len(of.histogram) + 1)
    if before:
        axes.stairs(of.histogram, edges, fill=True, color=GREY, alpha=0.45, lw=0)
    else:
        axes.stairs(of.histogram, edges, color=BLUE, lw=1)


def _sensitivity(models: Mapping[str, Sensitivity], which: str, what: str, axis: str, caption: str) -> Figure:
    names = list(dict.fromkeys(name for of in models.values() for name in of.only))
    figure, axes = _rows(names, 1 + 0.35 * (len(models) - 1))
    height = 0.8 / len(models)
    colors = (GREY, BLUE) if len(models) > 1 else (BLUE,)
    for index, (color, (label, of)) in enumerate(zip(colors, models.items())):
        scores = getattr(of, which)
        values = [getattr(scores[name], what) if name in scores else np.nan for name in names]
        if what == "accuracy":
            reference = of.fp32 if which == "only" else of.everything
            values = [100 * (value - reference.accuracy) for value in values]
        elif which == "all_but":
            values = [of.everything.rms_over_std - value for value in values]
        places = np.arange(len(names)) - 0.4 + height * (index + 0.5)
        axes.barh(places, values, height, color=color, label=label)
    axes.axvline(0, color=GREY, lw=0.7)
    axes.set_xlabel(axis)
    if len(models) > 1:
        legend(figure, axes)
    return made(figure, caption)


def _rows(names: Sequence[str], stretch: float = 1) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    """Axes with one row a layer, first layer on top; every other encoder layer on a band."""
    figure, (axes,) = canvas(0.95 + ROW * stretch * len(names))
    shown = [short(name) for name in names]
    axes.set_yticks(range(len(names)), shown)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    for row, name in enumerate(shown):
        index = name.split(" ")[0]
        if index.isdigit() and int(index) % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color="#f1f3f5", lw=0, zorder=0)
    return figure, axes


def _dots(
    models: Named, value: Callable[[WeightStatistics], float]
) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes, list[str]]:
    """A figure with a dot for each layer and model on a logarithmic axis, and the layers."""
    names = _names(models)
    figure, axes = _rows(names)
    for style, (label, layers) in zip(_styles(models), models.items()):
        found = {of.name: value(of) for of in layers}
        axes.plot([found.get(name, np.nan) for name in names], range(len(names)), label=label, **style)
    return figure, axes, names


def _styles(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    filled = {"marker": "o", "ls": "", "ms": 4, "color": BLUE}
    return [{**filled, "color": GREY, "mfc": "none", "ms": 5}, filled] if len(models) > 1 else [filled]


def _names(models: Named) -> list[str]:
    """Every layer of either model, in the order of the one with more."""
    lists = sorted(([of.name for of in layers] for layers in models.values()), key=len, reverse=True)
    return list(dict.fromkeys(name for names in lists for name in names))


def legend(figure: matplotlib.figure.Figure, axes: matplotlib.axes.Axes, columns: int = 2) -> None:
    """What the axes' labels say, above them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0, fontsize=9)


def _patch(color: str, label: str, hollow: bool = False) -> Any:
    from matplotlib.patches import Patch

    return Patch(
        fc="none" if hollow else color, ec=color if hollow else "none", alpha=1 if hollow else 0.45, label=label
    )


def _line(color: str, label: str, style: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, lw=0.9, ls=style, label=label)


def made(figure: matplotlib.figure.Figure, caption: str) -> Figure:
    """The report's figure of a drawn one."""
    return Figure(svg(figure), caption)


def _finite(value: float) -> float:
    return value if np.isfinite(value) else np.nan


def _range_words(way: str) -> str:
    return {"absmax": "the largest weight", "mse": "least squares", "moving_average": "moving average of max |x|"}[way]


def _of(label: str) -> str:
    return f": {label}" if label else ""
