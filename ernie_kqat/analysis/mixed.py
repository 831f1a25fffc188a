"""Bits for each layer by measured sensitivity: the greedy frontier from all layers wide to all layers narrow.

Each layer alone is put on the narrow grid, with inputs in fp32 because their rounding noise would hide the insensitive
layers. Layers are then narrowed in the order of the rise of the mean squared logit error per byte saved, and plans along
this order are measured as deployed, with quantized inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import config, files, run_folder, strict
from ..calibration import calibrate_rows
from ..data.dataset import Split, load_eval_split
from ..errors import UserError
from ..quantizers import ActivationQuantizer, WeightQuantizer, find
from ..restore import Restored
from ..tokenizer import load_tokenizer
from . import plan
from .grids import grid, quantizers_at
from .mixed_sections import TOOL, csv_text, sections
from .rows import Rows, calibration_file, data_file, digests, here
from .workbench import Score, Workbench, open_workbench

__all__ = ["Options", "packed_bytes", "search", "sections"]

Quantizers = dict[str, WeightQuantizer]
KEY = ("model", "data", "calibration", "rows", "columns", "bits", "granularity", "range", "seed")  # of all scores
MEASURED, FRONTIER, TABLE, PLAN = "measured.json", "frontier.json", "frontier.csv", "plan.yaml"


@dataclass(frozen=True)
class Options:
    """One of `floor` (accuracy), `budget_bytes` and `budget_ratio` (share of the fp32 bytes) bounds the plan.

    `bits`: wide, narrow. `points`: how many plans are measured at least, evenly spread. `test`: rows that choose nothing.
    `columns`: max_length and names of columns, if odd.
    """

    model: str
    data: str
    calibration: str | None = None
    test: str | None = None
    floor: float | None = None
    budget_bytes: int | None = None
    budget_ratio: float | None = None
    bits: tuple[int, int] = (8, 4)
    granularity: str = "channel"
    range: str = "mse"
    activation: config.ActivationQuant = field(default_factory=config.ActivationQuant)
    rows: int | None = None
    points: int = 12
    seed: int = 42
    columns: config.Data | None = None

    def quant(self, bits: int) -> config.Quant:
        """Every layer at `bits`."""
        weight = {"bits": bits, "granularity": self.granularity, "range": self.range}
        return strict.build(config.Quant, {"weight": weight, "activation": asdict(self.activation)}, "quant", "options")


def packed_bytes(shape: tuple[int, ...], bits: int, granularity: str) -> int:
    """Of one weight [in, out] with its bits packed without gaps, and a float32 step for the tensor or each channel."""
    return -(-shape[0] * shape[1] * bits // 8) + 4 * (shape[1] if granularity == "channel" else 1)


def search(options: Options, output: str | Path) -> dict[str, Any]:
    """Measure, choose, and write plan.yaml, frontier.json and frontier.csv to `output`; returns frontier.json's content.

    Every score is kept in measured.json as soon as it is known, and not measured again. Raises UserError for a bound that
    no plan can meet, naming what is possible.
    """
    _check(options)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; a folder is needed")
    data = data_file("--data", options.data)
    test = data_file("--test", options.test) if options.test else None
    calibration = calibration_file(options.calibration, data)
    rows = Rows(output / MEASURED, TOOL)
    rows.inputs(digests(options.model, data, calibration, test))
    wide = options.quant(options.bits[0])
    bench = open_workbench(options.model, data, wide, calibration, options.columns, options.rows, options.seed)
    settings = _settings(options, data, calibration)
    key = {name: settings[name] for name in KEY}
    plans = _Plans(bench, options, rows, key, *_quantizers(bench, options, calibration))
    tested = None if test is None else plans.on(test)
    bound = _bound(options, plans)
    layers = _ranked(plans)
    frontier = _frontier(plans, [layer["name"] for layer in layers], options, bound)
    chosen = _chosen(frontier, options, bound)
    for place, layer in enumerate(layers):
        layer["bits"] = options.bits[place < chosen["narrow_layers"]]
    results: dict[str, Any] = {
        "tool": TOOL,
        **here(),
        "inputs": rows.tree["inputs"],
        "settings": settings,
        "rows": len(bench.split),
        "fp32": {**asdict(bench.fp32), "size_bytes": plans.fp32_bytes, "ratio": 1.0},
        "layers": layers,
        "frontier": frontier,
        "chosen": chosen,
        "test": None if tested is None else _tested(tested, layers, chosen),
    }
    files.write_text(output / PLAN, plan.text(results, bench.restored.data, bench.restored.labels))
    files.write_text(output / TABLE, csv_text(results))
    files.write_json(output / FRONTIER, results)
    return results


def _settings(options: Options, data: Path, calibration: Path) -> dict[str, Any]:
    columns = None if options.columns is None else plan.told(options.columns)
    own = {"activation": plan.told(options.activation), "columns": columns}
    return {**asdict(options), **own, "data": str(data), "calibration": str(calibration)}


def _quantizers(bench: Workbench, options: Options, calibration: Path) -> tuple[Quantizers, Quantizers, Split]:
    """The wide and the narrow quantizer of each layer, and the rows that calibrate."""
    wide = {name: layer._fake_quant_weight for name, layer in bench.layers.items()}
    return wide, quantizers_at(bench, options.bits[1]), _split(bench.restored, calibration)


def _split(restored: Restored, path: Path) -> Split:
    own, tokenizer = restored.data, load_tokenizer(restored.vocabulary)
    return load_eval_split(path, tokenizer, restored.labels, own.max_length, own.text, own.text_pair, own.label)


@dataclass(frozen=True)
class _Plans:
    """Scores and sizes of plans on one workbench; a plan is the layers that are narrow."""

    bench: Workbench
    options: Options
    rows: Rows
    key: dict[str, Any]
    wide: Quantizers
    narrow: Quantizers
    calibration: Split

    def on(self, test: Path) -> _Plans:
        """The same model and quantizers on all rows of `test`."""
        restored = self.bench.restored
        split = _split(restored, test)
        if split.labels is None:
            raise UserError(f"--test: {test}: its rows have no labels to compare with")
        key = {**self.key, "data": str(test), "rows": None}
        return replace(self, bench=Workbench(restored, split), key=key)

    def score(self, narrow: Collection[str], activations: bool) -> Score:
        """With these layers narrow and all others wide; measured, or as it was before."""
        own = {"activation": plan.told(self.options.activation) if activations else None, "narrow": sorted(narrow)}
        return self.rows.score({**self.key, **own}, lambda: self._measure(narrow, activations))

    def _measure(self, narrow: Collection[str], activations: bool) -> Score:
        quantizers = {name: self.narrow[name] if name in narrow else wide for name, wide in self.wide.items()}
        if activations:
            self._calibrate(quantizers)
        weights = {name: grid(self.bench, name, quantizer) for name, quantizer in quantizers.items()}
        return self.bench.measure(weights, self.wide if activations else ())

    def _calibrate(self, quantizers: Quantizers) -> None:
        """Put the plan into the model and set the input ranges with its weights, as training and export will."""
        for name, layer in self.bench.layers.items():
            layer._fake_quant_weight = quantizers[name]
            layer._fake_quant_input = find("minmax", ActivationQuantizer)(self.options.activation)
        calibrate_rows(self.bench.restored, self.calibration, self.options.seed)

    def size_bytes(self, narrow: Collection[str]) -> int:
        """Of all layers' weights, packed."""
        return sum(self.layer_bytes(name, name in narrow) for name in self.wide)

    def layer_bytes(self, name: str, narrow: bool) -> int:
        return packed_bytes(self.bench.weights[name].shape, self.options.bits[narrow], self.options.granularity)

    @property
    def fp32_bytes(self) -> int:
        return sum(4 * weight.size for weight in self.bench.weights.values())


def _check(options: Options) -> None:
    bounds = {"--floor": options.floor, "--budget-bytes": options.budget_bytes, "--budget-ratio": options.budget_ratio}
    given = [name for name, value in bounds.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"one of {', '.join(bounds)} is needed; given: {' and '.join(given) or 'none'}")
    wide, narrow = options.bits
    if not 2 <= narrow < wide <= 8:
        raise UserError(f"--bits: {wide} {narrow} is not WIDE NARROW with 8 >= WIDE > NARROW >= 2")
    for name in ("--floor", "--budget-ratio"):
        value = bounds[name]
        if value is not None and not 0 < value <= 1:
            raise UserError(f"{name}: {value} is not in 0..1; it is a share, as 0.885")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows: {options.rows} is under 1")
    if options.points < 2:
        raise UserError(f"--points: {options.points} is under 2")
    if run_folder.is_run(options.model):
        best = Path(options.model, run_folder.BEST)
        raise UserError(f"--model: {options.model} is a run; an fp32 model folder is needed, as an fp32 run's {best}")


def _bound(options: Options, plans: _Plans) -> int | None:
    """The budget in bytes, None with a floor; UserError if no plan can meet it."""
    wide, narrow = options.bits
    if options.floor is not None:
        best = plans.score((), True)
        if options.floor > best.accuracy:
            raise UserError(
                f"--floor: {options.floor} is above what all layers at {wide} bits reach on these rows:"
                f" {best.accuracy:.4f} (fp32 {plans.bench.fp32.accuracy:.4f}); lower it, or raise --bits"
            )
        return None
    budget = options.budget_bytes if options.budget_ratio is None else int(options.budget_ratio * plans.fp32_bytes)
    least = plans.size_bytes(plans.wide)
    assert budget is not None
    if budget < least:
        name = "--budget-bytes" if options.budget_ratio is None else "--budget-ratio"
        raise UserError(
            f"{name}: {budget} bytes are under what all layers at {narrow} bits take: {least} bytes,"
            f" {least / plans.fp32_bytes:.4f} of fp32's {plans.fp32_bytes}; raise it, or lower --bits"
        )
    return budget


def _ranked(plans: _Plans) -> list[dict[str, Any]]:
    """One record a layer, in the order in which layers are narrowed."""
    base = plans.score((), False)
    variance = float(np.var(plans.bench.logits.astype(np.float64)))
    layers = []
    for place, name in enumerate(tqdm(plans.wide, desc="sensitivity", unit="layer", disable=None)):
        alone = plans.score([name], False)
        saved = plans.layer_bytes(name, False) - plans.layer_bytes(name, True)
        rise = (alone.rms_over_std**2 - base.rms_over_std**2) * variance
        layers.append(
            {
                "name": name,
                "place": place,
                "shape": list(plans.bench.weights[name].shape),
                "bytes_saved": saved,
                "squared_error_rise": rise,
                "rise_per_byte": rise / saved,
                "loss_rise": alone.loss - base.loss,
                "rms_over_std": alone.rms_over_std,
                "accuracy": alone.accuracy,
            }
        )
    return sorted(layers, key=lambda layer: layer["rise_per_byte"])


def _frontier(plans: _Plans, order: list[str], options: Options, budget: int | None) -> list[dict[str, Any]]:
    """Measured plans by number of narrow layers: evenly spread, then every one that the bound asks for."""
    count = len(order)
    wanted = {round(index * count / (options.points - 1)) for index in range(options.points)}
    if budget is not None:
        wanted.add(next(k for k in range(count + 1) if plans.size_bytes(order[:k]) <= budget))
    found: dict[int, Score] = {}
    for k in tqdm(sorted(wanted), desc="frontier", unit="plan", disable=None):
        found[k] = plans.score(order[:k], True)
    if options.floor is not None:
        _bisect(plans, order, found, options.floor)
    rows = []
    for k, score in sorted(found.items()):
        size = plans.size_bytes(order[:k])
        ratio = size / plans.fp32_bytes
        rows.append({"narrow_layers": k, "size_bytes": size, "ratio": ratio, **asdict(score)})
    return rows


def _bisect(plans: _Plans, order: list[str], found: dict[int, Score], floor: float) -> None:
    """Measure between the largest count of narrow layers that holds the floor and the next one measured."""
    while True:
        last = max(k for k, score in found.items() if score.accuracy >= floor)
        beyond = min((k for k in found if k > last), default=last)
        if beyond - last < 2:
            return
        middle = (last + beyond) // 2
        found[middle] = plans.score(order[:middle], True)


def _chosen(frontier: list[dict[str, Any]], options: Options, budget: int | None) -> dict[str, Any]:
    """The smallest plan at or above the floor; or the most accurate in the budget, of equals the one nearest to fp32."""
    if budget is None:
        return min((row for row in frontier if row["accuracy"] >= options.floor), key=lambda row: row["size_bytes"])
    within = [row for row in frontier if row["size_bytes"] <= budget]
    return max(within, key=lambda row: (row["accuracy"], -row["rms_over_std"]))


def _tested(plans: _Plans, layers: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any]:
    """fp32, all wide, the chosen plan and all narrow, on rows that had no part in the choice."""
    order = [layer["name"] for layer in layers]
    shown = {"wide": 0, "chosen": chosen["narrow_layers"], "narrow": len(order)}
    scores = {name: asdict(plans.score(order[:k], True)) for name, k in shown.items()}
    return {"rows": len(plans.bench.split), "fp32": asdict(plans.bench.fp32), **scores}
