"""A classifier whose Linears are put on integer grids and back: what sensitivity, robustness and mixed precision measure with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from .. import config, run_folder
from ..calibration import calibrate_rows
from ..data.dataset import Split, find_file, load_eval_split
from ..errors import UserError
from ..evaluate import accuracy, comparison, cross_entropy, logits_of
from ..quantizers import numeric
from ..quantizers.attach import quantized_linears, take_smoothing_in
from ..quantizers.attention import stop_rounding
from ..restore import Restored, restore_folder, restore_run
from ..tasks import only_classification
from ..tokenizer import load_tokenizer


@dataclass(frozen=True)
class Score:
    """Of one setting on the workbench's rows; rms_over_std and agreement are against the same weights in fp32."""

    accuracy: float
    loss: float
    agreement: float
    rms_over_std: float


class Workbench:
    """A model with quantizers in its Linears (activation ranges set), measured on one labelled split.

    weights: {layer: fp32 or latent weight, [in, out]}; steps: {layer: step of its own quantizer}; bits: {layer: its bits}.
    """

    def __init__(self, restored: Restored, split: Split):
        only_classification(restored.task, "what quantizing a layer costs")
        if split.labels is None:
            raise UserError("the rows have no labels to compare with")
        self.restored, self.split, self.labels = restored, split, split.labels
        stop_rounding(restored.model)  # Linears are what is measured; all else is in fp32
        self.layers = quantized_linears(restored.model)
        for layer in self.layers.values():
            take_smoothing_in(layer)
        self.weights = {name: layer.weight.numpy() for name, layer in self.layers.items()}
        self.bits = {name: layer._fake_quant_weight.bits for name, layer in self.layers.items()}
        self.steps = {
            name: layer._fake_quant_weight.current_step(layer.weight).numpy() for name, layer in self.layers.items()
        }
        self.logits = self._logits({}, ())
        self.fp32 = self._score(self.logits)

    def measure(self, weights: Mapping[str, np.ndarray], activations: Collection[str] = ()) -> Score:
        """Score with these layers' weights in place of their own, and only these layers' inputs quantized.

        The model is as before afterwards, also after an error.
        """
        return self._score(self._logits(weights, activations))

    def on_own_grid(self, names: Collection[str] | None = None, factor: float = 1.0) -> dict[str, np.ndarray]:
        """The weights on the grids of their own quantizers, `factor` x step; default: every layer's.

        Raises UserError for a quantizer that does not take the nearest point of its grid.
        """
        for name, layer in self.layers.items():
            if not layer._fake_quant_weight.nearest:
                kind = layer._fake_quant_weight.options.quantizer
                raise UserError(f"{name}: quantizer {kind}: only weights rounded to the nearest step can be measured")
        return {
            name: numeric.on_grid(
                self.weights[name], self.steps[name] * np.float32(factor), numeric.qmax(self.bits[name])
            )
            for name in (self.layers if names is None else names)
        }

    def _logits(self, weights: Mapping[str, np.ndarray], activations: Collection[str]) -> np.ndarray:
        unknown = sorted({*weights, *activations} - set(self.layers))
        if unknown:
            raise KeyError(f"no quantized layer {unknown[0]}")
        identity = paddle.nn.Identity()
        own = {name: (layer._fake_quant_weight, layer._fake_quant_input) for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer._fake_quant_weight = identity
                if name not in activations:
                    layer._fake_quant_input = identity
                if name in weights:
                    layer.weight.set_value(np.asarray(weights[name], np.float32))
            return logits_of(self.restored.model, self.split, self.restored.pad_token_id)
        finally:
            for name, layer in self.layers.items():
                layer._fake_quant_weight, layer._fake_quant_input = own[name]
                if name in weights:
                    layer.weight.set_value(self.weights[name])

    def _score(self, logits: np.ndarray) -> Score:
        near = comparison(logits, self.logits)
        right, loss = accuracy(logits, self.labels), cross_entropy(logits, self.labels)
        return Score(right, loss, near["agreement"], near["rms_over_std"])


def open_workbench(
    model: str | Path,
    data: str | Path,
    quant: config.Quant,
    calibration: str | Path | None = None,
    columns: config.Data | None = None,
    rows: int | None = None,
    seed: int = 42,
) -> Workbench:
    """A workbench for a run or a model folder on `data` (a labelled file, or a folder with a dev file).

    A QAT run keeps its own quantizers and ranges. Any other model gets those of `quant`, calibrated on `calibration`
    (default: the train file beside `data`). `columns`: max_length, and names of the columns if they are odd; a run's own
    Data where not given. Raises UserError for a folder that is neither, or rows without labels.
    """
    if run_folder.is_run(model):
        restored = restore_run(model)
    elif Path(model).is_dir():
        restored = restore_folder(model, columns)
    else:
        raise UserError(f"{model}: no such run or model folder")
    own = restored.data if columns is None else columns
    tokenizer = load_tokenizer(restored.vocabulary)

    def split(path: Path, count: int | None) -> Split:
        columns = own.text, own.text_pair, own.label
        return load_eval_split(
            path, tokenizer, restored.labels, own.max_length, *columns, rows=count, task=restored.task
        )

    if restored.quant is None:
        restored = restored.quantized(quant)
        beside = Path(data) if Path(data).is_dir() else Path(data).parent
        source = Path(calibration) if calibration else find_file(beside, "train", None, restored.task.suffixes)
        calibrate_rows(restored, split(source, None), seed)
    return Workbench(restored, split(Path(data), rows))
