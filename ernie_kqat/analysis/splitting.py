"""Which layers of a ternary model to split in a size budget; the others become binary (BinaryBERT, 2012.15701, section 3.3).

    max sum of s_l gain_l      subject to      bytes of all layers binary + sum of s_l cost_l <= budget      s_l in {0, 1}

gain: how much the loss rises when layer l alone is binary and all others ternary, which a split layer equals at its start;
cost: the bytes of a second binary weight.

Differs from the paper: gains are those of leaving one layer of the ternary model binary, without training; the paper's are
those of leaving one layer of the fully quantized model unquantized (appendix B.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from .. import config, files, run_folder, strict
from ..errors import UserError
from ..quantizers import WeightQuantizer, find
from . import plan
from .mixed import packed_bytes
from .report import Table
from .rows import Rows, data_file, digests, here
from .workbench import Score, Workbench, open_workbench

TOOL = "adaptive_split"
MEASURED, RESULTS, PLAN, MIXED = "measured.json", "splitting.json", "plan.yaml", "mixed.yaml"


def knapsack(gains: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """Places of the items with the greatest sum of gains whose costs sum to at most `budget`; exact, what gains nothing left out.

    By the list of all undominated choices (Nemhauser and Ullmann, 1969), short where costs repeat, as those of layers do.
    """
    choices: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for place, (gain, cost) in enumerate(zip(gains, costs)):
        longer = [(c + cost, g + gain, (*chosen, place)) for c, g, chosen in choices if c + cost <= budget]
        found = sorted([*choices, *longer], key=lambda choice: (choice[0], -choice[1], len(choice[2])))
        choices = []
        for choice in found:
            if not choices or choice[1] > choices[-1][1]:
                choices.append(choice)
    return list(choices[-1][2])


@dataclass(frozen=True)
class Options:
    """`model`: a run with ternary weights. One of `budget_bytes` and `budget_ratio` (share of the fp32 bytes).

    `data`: labelled rows that choose; `rows`: the first so many. `columns`: max_length and names of columns, if odd.
    """

    model: str
    data: str
    budget_bytes: int | None = None
    budget_ratio: float | None = None
    rows: int | None = None
    columns: config.Data | None = None


@dataclass(frozen=True)
class _Ternary:
    """A ternary run on a workbench: its weights as deployed, and the ternary ones as binary."""

    bench: Workbench
    own: dict[str, np.ndarray]
    binary: dict[str, np.ndarray]
    rows: Rows
    key: dict[str, Any]

    def score(self, binary: Collection[str]) -> Score:
        """With these layers binary, inputs quantized as the run's; measured, or as it was before."""
        weights = {**self.own, **{name: self.binary[name] for name in binary}}
        return self.rows.score(
            {**self.key, "binary": sorted(binary)}, lambda: self.bench.measure(weights, self.bench.layers)
        )

    def layer_bytes(self, name: str, split: bool) -> int:
        """Packed; a split weight is two binary ones."""
        options = self.bench.layers[name]._fake_quant_weight.options
        shape = self.bench.weights[name].shape
        if name not in self.binary:
            return packed_bytes(shape, options.bits, options.granularity)
        return packed_bytes(shape, 1, options.granularity) * (2 if split else 1)

    def size_bytes(self, split: Collection[str]) -> int:
        """Of all quantized layers' weights."""
        return sum(self.layer_bytes(name, name in split) for name in self.own)


def search(options: Options, output: str | Path) -> dict[str, Any]:
    """Measure, choose, and write plan.yaml, mixed.yaml and splitting.json to `output`; returns splitting.json's content.

    Every score is kept in measured.json as soon as it is known, and not measured again. Raises UserError for a budget that
    no plan can meet, naming what is possible.
    """
    _check(options)
    output = Path(output)
    data = data_file("--data", options.data)
    rows = Rows(output / MEASURED, TOOL)
    rows.inputs(digests(options.model, data))
    bench = open_workbench(options.model, data, config.Quant(), None, options.columns, options.rows)
    columns = None if options.columns is None else plan.told(options.columns)
    settings = {**asdict(options), "data": str(data), "columns": columns}
    key = {name: settings[name] for name in ("model", "data", "rows", "columns")}
    ternary = _Ternary(bench, *_weights(bench), rows, key)
    fp32_bytes = sum(4 * weight.size for weight in bench.weights.values())
    budget = _budget(options, ternary, fp32_bytes)
    layers = _gains(ternary)
    room = budget - ternary.size_bytes(())
    places = knapsack([layer["gain"] for layer in layers], [layer["cost_bytes"] for layer in layers], room)
    chosen = [layers[place]["name"] for place in places]
    for layer in layers:
        layer["split"] = layer["name"] in chosen

    def measured(split: Collection[str]) -> dict[str, Any]:
        size = ternary.size_bytes(split)
        score = ternary.score([name for name in ternary.binary if name not in split])
        return {"split_layers": len(split), "size_bytes": size, "ratio": size / fp32_bytes, **asdict(score)}

    results = {
        "tool": TOOL,
        **here(),
        "inputs": rows.tree["inputs"],
        "settings": settings,
        "rows": len(bench.split),
        "budget_bytes": budget,
        "fp32_bytes": fp32_bytes,
        "layers": layers,
        "all": measured(list(ternary.binary)),
        "chosen": measured(chosen),
        "none": measured(()),
    }
    for name, weight in ((MIXED, {"quantizer": "ternary", "bits": 2}), (PLAN, {"split": True})):
        files.write_text(output / name, _next_run(results, bench, weight, name))
    files.write_json(output / RESULTS, results)
    return results


def _check(options: Options) -> None:
    if (options.budget_bytes is None) == (options.budget_ratio is None):
        raise UserError("one of --budget-bytes and --budget-ratio is needed")
    if options.budget_ratio is not None and not 0 < options.budget_ratio <= 1:
        raise UserError(
            f"--budget-ratio: {options.budget_ratio} is not in 0..1; it is a share of the fp32 bytes, as 0.05"
        )
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows: {options.rows} is under 1")
    quant = run_folder.read_settings(options.model).Slim.quant
    if quant is None:
        raise UserError(f"--model: {options.model}: an fp32 run; one with ternary weights is needed")


def _weights(bench: Workbench) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every layer as its quantizer deploys it, and those that are ternary as a binary quantizer would."""
    own, binary = {}, {}
    for name, layer in bench.layers.items():
        quantizer = layer._fake_quant_weight
        own[name] = _deployed(quantizer, layer.weight)
        if quantizer.options.quantizer == "ternary":
            other = find("binary", WeightQuantizer)(_binary(quantizer.options), layer.weight)
            binary[name] = _deployed(other, layer.weight)
    if not binary:
        raise UserError(
            "--model: it has no ternary weights; train with Slim.quant.weight: {quantizer: ternary, bits: 2}"
        )
    return own, binary


def _binary(options: config.WeightQuant) -> config.WeightQuant:
    return dataclasses.replace(options, quantizer="binary", bits=1)


def _deployed(quantizer: WeightQuantizer, weight) -> np.ndarray:
    q, step = quantizer.integers(weight)
    return q.astype(np.float32) * step


def _budget(options: Options, ternary: _Ternary, fp32_bytes: int) -> int:
    budget = options.budget_bytes
    if budget is None:
        assert options.budget_ratio is not None
        budget = int(options.budget_ratio * fp32_bytes)
    least = ternary.size_bytes(())
    if budget < least:
        name = "--budget-bytes" if options.budget_ratio is None else "--budget-ratio"
        raise UserError(
            f"{name}: {budget} bytes are under what all layers take without a split: {least} bytes,"
            f" {least / fp32_bytes:.4f} of fp32's {fp32_bytes}; raise it"
        )
    return budget


def _gains(ternary: _Ternary) -> list[dict[str, Any]]:
    """One record a ternary layer, in model order."""
    base = ternary.score(())
    layers = []
    for name in tqdm(ternary.binary, desc="gains", unit="layer", disable=None):
        alone = ternary.score([name])
        cost = ternary.layer_bytes(name, True) - ternary.layer_bytes(name, False)
        shape = list(ternary.bench.weights[name].shape)
        gain = alone.loss - base.loss
        layers.append({"name": name, "shape": shape, "cost_bytes": cost, "gain": gain, "accuracy": alone.accuracy})
    return layers


def _next_run(results: dict[str, Any], bench: Workbench, weight: dict[str, Any], name: str) -> str:
    """The run's own config, from its best model on, with `weight` for the chosen layers, and binary for the others."""
    model = results["settings"]["model"]
    settings = run_folder.read_settings(model)
    assert settings.Slim.quant is not None
    weights = {of: layer._fake_quant_weight.options for of, layer in bench.layers.items()}
    base = config.Quant(_binary(weights[results["layers"][0]["name"]]), settings.Slim.quant.activation)
    for layer in results["layers"]:
        binary = _binary(weights[layer["name"]])
        weights[layer["name"]] = dataclasses.replace(binary, **weight) if layer["split"] else binary
    tree = strict.to_tree(settings)
    tree["Global"]["output_dir"] += f"_{Path(name).stem}"
    tree["Model"]["name_or_path"] = str(Path(model, run_folder.BEST))
    tree["Slim"]["quant"] = {**strict.to_tree(base), "layers": plan.rules(bench.restored.model, base, weights)}
    head = "".join(f"# {line}\n" for line in described(results, name))
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def described(results: dict[str, Any], name: str = PLAN) -> list[str]:
    """What was planned, by which command, and the measured figures."""
    layers, chosen = len(results["layers"]), results["chosen"]
    kind = "ternary, to be split by plan.yaml afterwards" if name == MIXED else "split"
    lines = [
        f"Adaptive splitting: {chosen['split_layers']} of {layers} layers {kind}, the others binary.",
        f"Command: {results['command']}",
        f"Packed weights: {chosen['size_bytes']} bytes, {chosen['ratio']:.4f} of fp32.",
        f"Measured (simulated, before any training) on {results['rows']} rows that chose it: loss {chosen['loss']:.4f},"
        f" accuracy {chosen['accuracy']:.4f}; all layers split {results['all']['loss']:.4f},"
        f" {results['all']['accuracy']:.4f}; none {results['none']['loss']:.4f}, {results['none']['accuracy']:.4f}.",
    ]
    if name == PLAN:
        lines.append("The paper trains mixed.yaml first: then -o Model.name_or_path=MIXED_RUN/best_model.")
    return lines


def table(results: dict[str, Any]) -> Table:
    """One row a layer that could be split."""
    header = ["layer", "loss rise if binary", "kB of a split", ""]
    rows = [
        [
            layer["name"],
            f"{layer['gain']:+.5f}",
            f"{layer['cost_bytes'] / 1e3:.1f}",
            "split" if layer["split"] else "binary",
        ]
        for layer in results["layers"]
    ]
    return Table(header, rows)
