"""The report's sections on an analysis: what each figure says, and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..machine import machine, versions
from . import charts, report, training_charts
from .analyze import Analysis, Options
from .report import Section, Table
from .tables import csv_text, decibels, layer_table, trade_off_table, tree
from .weights import WAYS, WeightStatistics


def write(output: str | Path, options: Options, found: Sequence[Analysis], extra: Sequence[Section] = ()) -> Path:
    """Write layers.csv, analysis.json and report.html, with the `extra` sections; returns the report's path."""
    output = Path(output)
    files.write_text(output / "layers.csv", csv_text(found))
    files.write_json(output / "analysis.json", tree(options, found))
    path = output / "report.html"
    report.write(path, title(options), subtitle(options), [*sections(options, found), *extra, _settings(options)])
    return path


def sections(options: Options, found: Sequence[Analysis]) -> list[Section]:
    """Of one or two models, most telling first; a section with nothing to show is left out."""
    made = [_overview(options, found)]
    for analysis in found:
        made += _run(analysis)
    made += [_kurtosis(found), _sqnr(found), *_sensitivity(options, found), *_activations(found)]
    return [*made, _histograms(options, found), _layers(options, found)]


def title(options: Options) -> str:
    """Of the page: the models by the names of their folders."""
    return "Quantization of " + " and ".join(base_name(model) for model in (options.model, options.compare) if model)


def base_name(model: str) -> str:
    """The last part of a path; a model name as it is."""
    return Path(model).name or model


def subtitle(options: Options) -> str:
    """One line under the title."""
    data = f" Data: {options.data}." if options.data else ""
    return (
        f"Weights, activations and layers at low bits.{data} ernie_kqat {versions()['ernie_kqat'] or ''}".rstrip() + "."
    )


def findings(options: Options, found: Sequence[Analysis]) -> list[str]:
    """A sentence for each thing that an analysis shows at a glance; of the Linears, as embeddings stay in fp32."""
    said = []
    for analysis in found:
        prefix = f"{analysis.label.capitalize()}: " if analysis.label else ""
        linears = _linears(analysis)
        tail = max(linears, key=lambda of: of.kurtosis)
        worst = min(linears, key=lambda of: of.sqnr[options.way][options.bits])
        best = (options.granularity, "mse")
        said.append(
            f"{prefix}largest kurtosis of a Linear {tail.kurtosis:.4g} ({tail.name}; largest weight"
            f" {tail.absmax_over_std:.0f} standard deviations)."
            f" Lowest SQNR of {options.bits}-bit weights per {options.granularity}, range {options.range}:"
            f" {decibels(worst.sqnr[options.way][options.bits])} dB ({worst.name});"
            f" {decibels(worst.sqnr[best][options.bits])} dB there with the range of least squared error."
        )
        of = analysis.sensitivity
        if of is not None:
            least = min(of.only, key=lambda name: (of.only[name].accuracy, -of.only[name].rms_over_std))
            said.append(
                f"{prefix}accuracy on {analysis.rows} rows: fp32 {100 * of.fp32.accuracy:.2f} %, all layers quantized"
                f" {100 * of.everything.accuracy:.2f} %; alone, {least} costs most:"
                f" {100 * of.only[least].accuracy:.2f} %."
            )
    return said


def _overview(options: Options, found: Sequence[Analysis]) -> Section:
    header = [
        "model",
        "kind",
        "matrices",
        "weights, millions",
        "largest K",
        f"lowest SQNR, {options.bits} bits, dB",
        "rows",
    ]
    rows = []
    for analysis in found:
        linears = _linears(analysis)
        size = sum(of.shape[0] * of.shape[1] for of in analysis.weights) / 1e6
        label = f"{analysis.label}: " if analysis.label else ""
        worst = min(of.sqnr[options.way][options.bits] for of in linears)
        row = [label + base_name(analysis.model), analysis.kind, str(len(analysis.weights)), f"{size:.2f}"]
        row += [f"{max(of.kurtosis for of in linears):.4g}", decibels(worst), str(analysis.rows or "none")]
        rows.append(row)
    return Section("Overview", "\n\n".join(findings(options, found)), table=Table(header, rows))


def _run(analysis: Analysis) -> list[Section]:
    made = []
    of = f" ({analysis.label})" if analysis.label else ""
    if analysis.trade_off:
        figure = training_charts.trade_off(analysis.trade_off)
        text = (
            "What quantization cost and gained in this run: fp32 and the deployed INT8 program in Paddle Inference, and"
            " the simulation that was trained. Latencies are of the machine that exported the run."
        )
        made.append(
            Section(f"Trade-off of the run{of}", text, (figure,) if figure else (), trade_off_table(analysis.trade_off))
        )
    figures = tuple(training_charts.training(analysis.training)) if analysis.training else ()
    if figures:
        made.append(Section(f"Training{of}", "As logged in the run's metrics.jsonl.", figures))
    return made


def _kurtosis(found: Sequence[Analysis]) -> Section:
    targets = next((a.training.targets for a in reversed(found) if a.training is not None), {})
    text = (
        "How heavy the tails of each weight matrix are. A few outliers far from the rest stretch a range that follows the"
        " largest weight, and leave few integers for all the others."
    )
    return Section(
        "Kurtosis and outliers", text, (charts.kurtosis(_named(found), targets), charts.outliers(_named(found)))
    )


def _sqnr(found: Sequence[Analysis]) -> Section:
    text = (
        "Signal to quantization noise of the weights, rounded to nearest: 6 dB is one bit. Where least squares stands far"
        " to the right of the largest weight, clipping outliers is worth more than representing them. The channel of an"
        " embedding is its row."
    )
    return Section("SQNR of the weights", text, tuple(charts.sqnr(_named(found), way) for way in WAYS))


def _sensitivity(options: Options, found: Sequence[Analysis]) -> list[Section]:
    models = {a.label or "model": a.sensitivity for a in found if a.sensitivity is not None}
    if not models:
        return []
    rows = max(analysis.rows for analysis in found)
    accuracies = [of.fp32.accuracy for of in models.values()]
    error = 100 * max((value * (1 - value) / rows) ** 0.5 for value in accuracies)
    text = (
        f"Weights at {options.bits} bits per {options.granularity}, range {options.range}; the inputs of quantized layers"
        " at 8 bits. First only one layer is quantized and the rest stays in fp32, then all but one."
        f" One row of the data is {100 / rows:.2f} points, and accuracy on {rows} rows has a standard error of"
        f" {error:.1f} points; the noise of the logits tells layers apart that accuracy cannot."
    )
    header = ["", *models]
    shown = (("fp32", "fp32"), ("everything", "all quantized"))
    table = [
        [f"{words}: accuracy %", *(f"{100 * getattr(of, key).accuracy:.2f}" for of in models.values())]
        for key, words in shown
    ]
    table += [[f"{words}: loss", *(f"{getattr(of, key).loss:.4f}" for of in models.values())] for key, words in shown]
    return [Section("Sensitivity", text, tuple(charts.sensitivity(models)), Table(header, table))]


def _activations(found: Sequence[Analysis]) -> list[Section]:
    figures = []
    for analysis in found:
        if analysis.activations:
            figures += [
                charts.activation_ranges(analysis.activations, analysis.label),
                charts.activation_sqnr(analysis.activations, analysis.label),
            ]
    text = (
        "The inputs of each Linear on the data's rows, one range per tensor. Where the largest input is far beyond the"
        " 99.9 % mark, a few features take most of the range."
    )
    return [Section("Activations", text, tuple(figures))] if figures else []


def _histograms(options: Options, found: Sequence[Analysis]) -> Section:
    text = "Every matrix, layer by layer. The horizontal axis reaches to the largest weight of either model."
    return Section("Weight histograms", text, tuple(charts.histograms(_named(found), options.bits)))


def _layers(options: Options, found: Sequence[Analysis]) -> Section:
    marks = " < is before, > is after." if len(found) > 1 else " max/std: the largest weight in standard deviations."
    text = (
        f"Worst SQNR at {options.bits} bits first; embeddings, which stay in fp32, last. K: kurtosis. T, C: SQNR in dB per"
        f" tensor and per channel, with the range of the largest weight or of least squares.{marks} acc: accuracy with only"
        " this layer quantized, less fp32's, in points. layers.csv and analysis.json have the rest."
    )
    return Section("All layers", text, table=layer_table(options, found))


def _settings(options: Options) -> Section:
    rows = [[name, "" if value is None else str(value)] for name, value in vars(options).items() if name != "columns"]
    if options.columns is not None:
        rows.append(["max_length", str(options.columns.max_length)])
    here = machine()
    rows += [["cpu", str(here["cpu"])], ["cores", str(here["cores"])], ["system", str(here["system"])]]
    rows += [[name, str(version)] for name, version in versions().items()]
    return Section("Settings", table=Table(["", ""], rows))


def _named(found: Sequence[Analysis]) -> charts.Named:
    return {analysis.label or "weights": analysis.weights for analysis in found}


def _linears(analysis: Analysis) -> list[WeightStatistics]:
    return [of for of in analysis.weights if "embeddings" not in of.name]
