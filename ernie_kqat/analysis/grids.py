"""A workbench's weights on other grids than their own."""

from __future__ import annotations

import dataclasses

import numpy as np
from tqdm import tqdm

from ..quantizers import WeightQuantizer, find, numeric
from .workbench import Workbench


def at_bits(bench: Workbench, bits: int) -> dict[str, np.ndarray]:
    """Every layer's weight at `bits`, by a new quantizer with the layer's own rule to find a range."""
    return {name: grid(bench, name, quantizer) for name, quantizer in quantizers_at(bench, bits).items()}


def quantizers_at(bench: Workbench, bits: int) -> dict[str, WeightQuantizer]:
    """A new quantizer of `bits` for every layer, like its own in all else."""
    found = {}
    for name, layer in tqdm(bench.layers.items(), desc=f"{bits}-bit grids", disable=None, leave=False):
        options = dataclasses.replace(layer._fake_quant_weight.options, bits=bits)
        found[name] = find(options.quantizer, WeightQuantizer)(options, layer.weight)
    return found


def grid(bench: Workbench, name: str, quantizer: WeightQuantizer) -> np.ndarray:
    """A layer's weight as `quantizer` would deploy it."""
    step = quantizer.current_step(bench.layers[name].weight).numpy()
    return numeric.on_grid(bench.weights[name], step, quantizer.high)


def at_powers_of_two(bench: Workbench) -> dict[str, np.ndarray]:
    """Every layer's weight at its own bits, with each of its steps at the nearest power of two."""
    return {
        name: numeric.on_grid(weight, power_of_two(bench.steps[name]), numeric.qmax(bench.bits[name]))
        for name, weight in bench.weights.items()
    }


def power_of_two(step: np.ndarray) -> np.ndarray:
    """The power of two that is nearest in log2, float32, shape as `step`."""
    return np.exp2(np.rint(np.log2(np.asarray(step, np.float64)))).astype(np.float32)
