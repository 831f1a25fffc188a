"""Checkpoints from which a run goes on as if it had never stopped.

Data order and dropout are functions of (seed, step), so the step is all there is to say of them.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from . import files
from .errors import UserError

ARRAYS, STATE = "arrays.npz", "state.json"
OPTIMIZER = "optimizer/"
SCHEDULER = "LR_Scheduler"  # Paddle's key


def save(folder: Path, model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer, state: dict[str, Any]) -> None:
    """Write `folder` whole or not at all: every parameter and buffer, the optimizer's moments, and `state` as JSON."""
    arrays = {f"model/{name}": value.numpy() for name, value in model.state_dict().items()}
    arrays |= {OPTIMIZER + key: value for key, value in _optimizer_arrays(model, optimizer).items()}
    with files.replacing_folder(folder) as new:
        np.savez(new / ARRAYS, **arrays)
        scheduler = optimizer.state_dict().get(SCHEDULER)
        files.write_json(new / STATE, {**state, SCHEDULER: scheduler, "arrays_sha256": files.sha256(new / ARRAYS)})


def load(folder: Path, model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer) -> dict[str, Any]:
    """Restore what `save` wrote and return its `state`; UserError if it is missing, damaged, or of another model."""
    files.recover_folder(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no checkpoint to resume from: the run stopped before its first one; train again with --overwrite"
        )
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if files.sha256(folder / ARRAYS) != state["arrays_sha256"]:
            raise UserError(f"{folder / ARRAYS}: damaged: its sha256 is not the one in {STATE}")
        with np.load(folder / ARRAYS, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: damaged checkpoint: {error}") from None
    own = model.state_dict()
    stored = {name[len("model/") :]: value for name, value in arrays.items() if name.startswith("model/")}
    differing = sorted(set(own) ^ set(stored)) + [
        n for n in own if n in stored and list(own[n].shape) != list(stored[n].shape)
    ]
    if differing:
        raise UserError(f"{folder}: a checkpoint of another model: {', '.join(differing[:3])}")
    model.set_state_dict(stored)
    moments = {key[len(OPTIMIZER) :]: value for key, value in arrays.items() if key.startswith(OPTIMIZER)}
    optimizer.set_state_dict({**_by_paddle_names(model, moments), SCHEDULER: state[SCHEDULER]})
    return state


def _optimizer_arrays(model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer) -> dict[str, np.ndarray]:
    """Accumulators by structured parameter name; Paddle keys them by names that depend on what was built before."""
    structured = {parameter.name: name for name, parameter in model.named_parameters()}
    arrays = {}
    for key, value in optimizer.state_dict().items():
        if isinstance(value, paddle.Tensor):
            owner = max((name for name in structured if key.startswith(name + "_")), key=len)
            arrays[f"{structured[owner]}/{key[len(owner) + 1 :]}"] = value.numpy()
    return arrays


def _by_paddle_names(model: paddle.nn.Layer, arrays: dict[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    names = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {}
    for key, value in arrays.items():
        owner, _, accumulator = key.rpartition("/")
        state[f"{names[owner]}_{accumulator}"] = paddle.to_tensor(value)
    return state
