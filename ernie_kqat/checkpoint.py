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

STEP, ARRAYS, STATE = "step_", "arrays.npz", "state.json"
OPTIMIZER = "optimizer/"
SCHEDULER = "LR_Scheduler"  # Paddle's key


def save(
    folder: Path,
    step: int,
    model: paddle.nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
    state: dict[str, Any],
    keep: int = 1,
) -> None:
    """Write `folder`/step_N whole or not at all, then leave the newest `keep` checkpoints.

    It holds every parameter and buffer, the optimizer's moments, and `state` as JSON.
    """
    arrays = {f"model/{name}": value.numpy() for name, value in model.state_dict().items()}
    arrays |= {OPTIMIZER + key: value for key, value in _optimizer_arrays(model, optimizer).items()}
    with files.replacing_folder(folder / f"{STEP}{step:08}") as new:
        np.savez(new / ARRAYS, **arrays)
        scheduler = optimizer.state_dict().get(SCHEDULER)
        files.write_json(new / STATE, {**state, SCHEDULER: scheduler, "arrays_sha256": files.sha256(new / ARRAYS)})
    for old in checkpoints(folder)[keep:]:
        files.remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob(f"{STEP}*"), reverse=True)


def load(
    folder: Path, model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer
) -> tuple[dict[str, Any], list[str]]:
    """Restore the newest checkpoint that is whole; returns its `state` and a line for each that is not.

    Raises UserError if there is none, or if it is of another model.
    """
    remarks: list[str] = []
    for path in checkpoints(folder):
        try:
            arrays, state = _read(path)
        except UserError as error:
            remarks.append(str(error))
            continue
        _restore(path, arrays, state, model, optimizer)
        return state, remarks
    if remarks:
        raise UserError(f"no checkpoint is whole: {'; '.join(remarks)}; train again with --overwrite")
    raise UserError(
        f"{folder}: no checkpoint to resume from: the run stopped before its first one; train again with --overwrite"
    )


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if files.sha256(folder / ARRAYS) != state["arrays_sha256"]:
            raise UserError(f"{folder / ARRAYS}: damaged: its sha256 is not the one in {STATE}")
        with np.load(folder / ARRAYS, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: damaged checkpoint: {error}") from None
    return arrays, state


def _restore(
    folder: Path,
    arrays: dict[str, np.ndarray],
    state: dict[str, Any],
    model: paddle.nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
) -> None:
    own = model.state_dict()
    stored = {name[len("model/") :]: value for name, value in arrays.items() if name.startswith("model/")}
    differing = sorted(set(own) ^ set(stored)) + [
        n for n in own if n in stored and list(own[n].shape) != list(stored[n].shape)
    ]
    if differing:
        raise UserError(f"{folder}: a checkpoint of another model: {', '.join(differing[:3])}")
    model.set_state_dict(stored)
    moments = {key[len(OPTIMIZER) :]: value for key, value in arrays.items() if key.startswith(OPTIMIZER)}
    optimizer.set_state_dict(
        {**optimizer.state_dict(), **_by_paddle_names(model, moments), SCHEDULER: state[SCHEDULER]}
    )


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
