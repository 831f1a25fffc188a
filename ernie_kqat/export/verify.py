"""Does the deployed program compute what was trained? Simulation against deployment, on real samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import artifact, config, shapes
from ..benchmark import latency_ms
from ..data.batching import collate
from ..data.dataset import Split
from ..errors import UserError
from ..evaluate import comparison, logits_of
from ..machine import machine
from ..predictor import Predictor
from ..restore import Restored
from .int8_ops import int8_ops_run

WORST = 5
LATENCY_ROWS, LATENCY_S = 128, 20.0  # of each batch size


def verify(restored: Restored, split: Split, folder: Path, fp32_folder: Path, limits: config.Export) -> dict[str, Any]:
    """Compare the simulation (`restored.model`), the deployed artifact and the fp32 artifact on `split`.

    Returns manifest.json's `verification`; `passed` says whether agreement and rms/std are within `limits`. `metric` is the
    task's first; its values (`deployed_accuracy`, …) are None for samples without labels. Of a TensorRT artifact its program's
    operators are compared, on the CPU, and `int8_ops` and `latency_ms` are None: the CPU says nothing of them.
    """
    if len(split) == 0:
        raise UserError(f"{split.name}: no rows to verify on")
    manifest = artifact.read_manifest(folder)
    natively, on_cpu = artifact.is_native(manifest), manifest["engine"] != artifact.TENSORRT
    deployed_predictor = Predictor(folder, allow_unverified=True, engine="paddle")
    fp32_predictor = Predictor(fp32_folder, allow_unverified=True)
    encoded = list(zip(split.input_ids, split.token_type_ids))
    simulated = logits_of(restored.model, split, restored.pad_token_id, what="simulate")
    deployed, fp32 = deployed_predictor.logits(encoded), fp32_predictor.logits(encoded)
    if not (np.isfinite(simulated).all() and np.isfinite(deployed).all()):
        raise UserError("logits are not finite: the model is broken; nothing was exported")
    judge = _Judge(restored, split)
    near = judge.compare(deployed, simulated)
    batch = collate(split, np.arange(min(4, len(split))), restored.pad_token_id)
    feed = {name: batch[name] for name in ("input_ids", "token_type_ids")}
    predictors = {"fp32": fp32_predictor, **({"deployed": deployed_predictor} if on_cpu else {})}
    if natively:
        predictors["native"] = Predictor(folder, allow_unverified=True, engine="native")
    latency = latency_ms(predictors, encoded[:LATENCY_ROWS], enough_s=LATENCY_S)
    native = _native(judge, predictors["native"].logits(encoded), simulated, latency, folder) if natively else {}
    models = {"simulated": simulated, "deployed": deployed, "fp32": fp32}
    return {
        "passed": _passed(near, limits) and (not natively or _passed(native["native"], limits)),
        "machine": machine(),  # without VNNI oneDNN computes other numbers: it holds for CPUs that have it
        "data": split.name,
        "samples": len(split),
        **near,
        "agreement_with_fp32": judge.compare(deployed, fp32)["agreement"],
        "simulated_agreement_with_fp32": judge.compare(simulated, fp32)["agreement"],
        "metric": judge.metric,
        **{f"{name}_{judge.metric}": judge.first(logits) for name, logits in models.items()},
        "scores": None if split.labels is None else {name: judge.scores(logits) for name, logits in models.items()},
        "fp32_model": restored.fp32,
        "int8_ops": int8_ops_run(folder / artifact.MODEL, folder / artifact.PARAMS, feed) if on_cpu else None,
        "latency_ms": latency.get("deployed"),
        "fp32_latency_ms": latency["fp32"],
        "size_bytes": _size(folder),
        "fp32_size_bytes": _size(fp32_folder),
        "limits": {"min_agreement": limits.min_agreement, "max_rms_over_std": limits.max_rms_over_std},
        "worst": _worst(simulated, deployed, split),
        **native,
    }


class _Judge:
    """The task's view of logits on one split."""

    def __init__(self, restored: Restored, split: Split):
        self.task, self.labels, self.split = restored.task, restored.labels, split
        self.metric = self.task.metrics[0]

    def compare(self, found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        return comparison(found, reference, self.task.agreement(found, reference, self.split))

    def scores(self, logits: np.ndarray) -> dict[str, float]:
        return self.task.scores(logits, self.split, self.labels)

    def first(self, logits: np.ndarray) -> float | None:
        return None if self.split.labels is None else self.scores(logits)[self.metric]


def _native(judge: _Judge, logits: np.ndarray, simulated: np.ndarray, latency: dict, folder: Path) -> dict[str, Any]:
    """`native`: the same figures of the native program."""
    return {
        "native": {
            **judge.compare(logits, simulated),
            judge.metric: judge.first(logits),
            "latency_ms": latency["native"],
            "size_bytes": _size(folder / artifact.NATIVE),
        }
    }


def _passed(found: dict[str, Any], limits: config.Export) -> bool:
    return bool(found["agreement"] >= limits.min_agreement and found["rms_over_std"] <= limits.max_rms_over_std)


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (artifact.MODEL, artifact.PARAMS))


def _worst(simulated: np.ndarray, deployed: np.ndarray, split: Split) -> list[dict[str, Any]]:
    """The positions (tasks/__init__.py) with the largest differences, and the rows that they are of."""
    difference = np.abs(simulated - deployed).max(axis=1)
    places = shapes.starts([len(ids) for ids in split.input_ids], per_token=len(simulated) != len(split))
    worst = np.argsort(-difference, kind="stable")[:WORST]
    return [
        {
            "row": int(row),
            "text": split.texts[row],
            "difference": float(difference[position]),
            "simulated": [float(value) for value in simulated[position]],
            "deployed": [float(value) for value in deployed[position]],
        }
        for position, row in zip(worst, np.searchsorted(places, worst, side="right") - 1)
    ]
