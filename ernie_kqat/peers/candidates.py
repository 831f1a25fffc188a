"""Each engine of the race, from one fp32 model folder: what it is made of, and which script runs it."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import config
from ..data.dataset import Split
from ..errors import UserError
from ..export import exporter
from ..methods.smoothquant import SmoothQuant
from ..restore import restore_folder
from ..tokenizer import load_tokenizer
from . import environment, paddleslim
from .engines import worker

ENGINES = Path(__file__).parent / "engines"
NATIVE, PLAIN, FP32 = OURS = ("ours native", "ours plain", "paddle fp32")
PEERS = {
    "openvino": ("openvino fp32", "openvino bf16", "openvino int8", "openvino int8+bf16"),
    "onnxruntime": ("onnxruntime fp32", "onnxruntime int8"),
    "paddleslim": ("paddleslim int8",),
}
# Of configs/ernie_sst2_minilm_smoothquant.yaml.
RECIPE = config.Slim(
    config.Quant(activation=replace(config.ActivationQuant(), range="mse")), {"smoothquant": SmoothQuant(alpha=0.7)}
)

CALIBRATION_ROWS = 300  # NNCF takes as many by default

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An engine, and what runs it."""

    name: str
    python: str
    script: Path
    folder: Path


def prepare(
    model: str, calibration: Split, dev: Split, slim: config.Slim, peers: list[str], work: Path
) -> list[Candidate]:
    """Make every engine's model in `work`; those in INT8 are calibrated on the same rows.

    Raises UserError for a peer that is unknown, cannot be installed or cannot convert the model.
    """
    unknown = sorted(set(peers) - set(PEERS))
    if unknown:
        raise UserError(f"--against: {', '.join(unknown)}: not one of {', '.join(PEERS)}")
    pythons = {peer: environment.python_of(peer) for peer in peers if peer != "paddleslim"}
    _ours(model, calibration, dev, slim, work)
    made = [Candidate(name, sys.executable, ENGINES / "run_paddle.py", work) for name in OURS]
    worker.write_rows(str(work / "fp32/calibration.npz"), {"calibration": pairs_of(calibration)})
    for peer in peers:
        log.warning("%s: converting the model …", peer)
        if peer == "paddleslim":
            paddleslim.export(model, calibration, work / peer)
            made += [Candidate(name, sys.executable, ENGINES / "run_paddle.py", work) for name in PEERS[peer]]
        else:
            script = ENGINES / f"run_{peer}.py"
            _convert(peer, pythons[peer], script, work / "fp32")
            made += [Candidate(name, pythons[peer], script, work / "fp32") for name in PEERS[peer]]
    return made


def pairs_of(split: Split) -> list[np.ndarray]:
    """int64 [2, tokens] of each row: input_ids and token_type_ids."""
    return [np.array([ids, types], np.int64) for ids, types in zip(split.input_ids, split.token_type_ids)]


def _ours(model: str, calibration: Split, dev: Split, slim: config.Slim, work: Path) -> None:
    tokenizer, data = load_tokenizer(model), config.Data(max_length=512)
    exporter.write_unverified(restore_folder(model, data), tokenizer, dev, work / "fp32")
    assert slim.quant is not None
    restored = exporter.calibrated(restore_folder(model, data), calibration, slim.quant, slim.methods, seed=0)
    exporter.write_unverified(restored, tokenizer, dev, work / "int8", config.Export(engine="native"))


def _convert(peer: str, python: str, script: Path, folder: Path) -> None:
    command = [python, str(script), "prepare", str(folder)]
    done = subprocess.run(command, env=environment.plain(), check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{peer}: it could not convert the model: {done.stderr.strip()[-800:]}")
