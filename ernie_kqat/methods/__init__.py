"""Methods: what is added to calibration and training.

One file (or folder) a method; its name = config key under `Slim`; fields = its options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import plugins

Batch = Mapping[str, np.ndarray]  # input_ids and token_type_ids, int64 [rows, tokens]
Gradients = Callable[[], "dict[str, float]"]  # fills param.grad for one effective batch, returns the named losses


class Method:
    """One training idea. Each hook is the identity unless the idea needs it; the dataclass's fields are its config."""

    def prepare(self, model) -> None:
        """Swap sublayers of a quantized model for what the method computes in their place; also when a run is restored."""

    def attach(self, model, pretrained: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Once, between `prepare` and the optimizer's making. `pretrained()`: the original matrices by parameter name."""

    def before_calibration(self, model, batches: Sequence[Batch]) -> None:
        """Before the activation ranges are set by `batches`; the model is in eval mode."""

    def after_calibration(self, model, fp32, batches: Sequence[Batch]) -> None:
        """After it. `fp32`: a copy from before calibration (but after each `before_calibration`) that quantizes nothing."""

    def calibrates(self) -> bool:
        """Whether it does anything at calibration, and so is of use without training."""
        own = type(self)
        return (own.before_calibration, own.after_calibration) != (Method.before_calibration, Method.after_calibration)

    def train_rows(self, train: Any) -> None:
        """Once, before the first step that is taken: the Split that batches are made of; `batch["rows"]` are places in it."""

    def start(self, total_steps: int, steps_per_epoch: int) -> None:
        """Once, before the first step: how many optimizer steps the whole training and an epoch have."""

    def task_weight(self) -> float:
        """What the task's own loss is multiplied by."""
        return 1.0

    def loss_terms(self, batch: Any, outputs: Any) -> dict:
        """Weighted terms to add to the task loss, by name; called once for each forward."""
        return {}

    def wrap(self, gradients: Gradients) -> Gradients:
        """Methods that need two gradients call it twice, and restore what they perturb in between."""
        return gradients

    def after_step(self) -> None:
        """After each optimizer step: decoupled regularizers, projections."""

    def figures(self) -> dict:
        """Numbers to log, asked for between the gradients and the optimizer step."""
        return {}

    def plan(self) -> list[str]:
        """Lines for plan.txt."""
        return []

    def state(self) -> dict:
        """What a checkpoint must hold (JSON)."""
        return {}

    def load_state(self, state: dict) -> None:
        """Restore what `state` gave."""


def names() -> list[str]:
    """The methods there are."""
    return plugins.names(__name__)


def find(name: str) -> type[Method]:
    """The Method of methods/<name>.py."""
    cls = plugins.defined(__name__, name, Method)
    assert cls is not None, f"methods/{name}.py defines no Method"
    return cls
