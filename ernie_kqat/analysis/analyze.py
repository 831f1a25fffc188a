"""The whole analysis of one model, or of two to compare: statistics, sensitivity, a run's history; CSV, JSON and report."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import config, files, run_folder, strict
from ..data.dataset import Split, find_file, load_eval_split
from ..errors import UserError
from ..models import hub
from ..models.folder import WEIGHTS
from ..restore import Restored, restore_folder, restore_run
from ..tokenizer import load_tokenizer
from . import activations, sensitivity, training, weights
from .report import Section
from .workbench import open_workbench

log = logging.getLogger(__name__)

SENSITIVITY = "sensitivity.json"
OTHER_TOOLS = {
    "robustness": ("robustness", "tools/robustness.py"),
    "mixed": ("mixed", "tools/mixed_precision.py"),
}


@dataclass(frozen=True)
class Options:
    """`model`, `compare`: PaddleNLP name, model folder or run. `columns`: max_length and names of columns, if odd."""

    model: str
    compare: str | None = None
    data: str | None = None
    calibration: str | None = None
    rows: int | None = None
    bits: int = 4
    granularity: str = "tensor"
    range: str = "absmax"
    sensitivity: bool = True
    seed: int = 42
    columns: config.Data | None = None

    @property
    def way(self) -> weights.Way:
        """How the sensitivity's weights are quantized, and the terminal's table is ordered."""
        return self.granularity, self.range


@dataclass(frozen=True)
class Analysis:
    """Of one model; what could not be measured is empty or None. `label`: `before`, `after`, or "" for the only one."""

    model: str
    label: str
    kind: str
    weights: list[weights.WeightStatistics]
    rows: int = 0
    activations: tuple[activations.ActivationStatistics, ...] = ()
    sensitivity: sensitivity.Sensitivity | None = None
    training: training.Training | None = None
    trade_off: dict[str, dict[str, float]] | None = None


def analyze(options: Options, output: str | Path) -> list[Analysis]:
    """Of `options.model`, then of `options.compare`; finished sensitivities are kept in `output`.

    Raises UserError for a model or data that cannot be read, before anything is measured.
    """
    _check(options, Path(output))
    models = [options.model] if options.compare is None else [options.model, options.compare]
    labels = [""] if options.compare is None else ["before", "after"]
    matrices = [weights.matrices(model) for model in models]
    if len(models) == 2 and not set(matrices[0]) & set(matrices[1]):
        raise UserError(f"{models[0]} and {models[1]} have no layer of the same name to compare")
    sources = [_rows_of(model, found, options) for model, found in zip(models, matrices)]
    peaks: dict[str, float] = {}
    for found in matrices:
        for name, weight in found.items():
            peaks[name] = max(peaks.get(name, 0.0), float(np.abs(weight).max()))
    bits = sorted({*weights.BITS, options.bits}, reverse=True)
    return [
        _analyze(
            options, Path(output), model, label, weights.statistics(found, bits, peaks, label or "weights"), source
        )
        for model, label, found, source in zip(models, labels, matrices, sources)
    ]


def extra_sections(kind: str, path: str | Path) -> list[Section]:
    """The report's sections on the results of another tool, a key of OTHER_TOOLS, from its JSON file."""
    module, tool = OTHER_TOOLS[kind]
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--{kind}: {path}: no such file; {tool} writes it") from None
    except ValueError as error:
        raise UserError(f"--{kind}: {path}: not JSON: {error}") from None
    if not isinstance(results, dict):
        raise UserError(
            f"--{kind}: {path}: a JSON {type(results).__name__} where an object is needed, as {tool} writes it"
        )
    return importlib.import_module(f"{__package__}.{module}").sections(results)


def _check(options: Options, output: Path) -> None:
    if not 2 <= options.bits <= 8:
        raise UserError(f"--bits: {options.bits} is not in 2..8")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows: {options.rows} is under 1")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; a folder is needed")
    if options.data is not None and not Path(options.data).exists():
        raise UserError(f"--data: {options.data}: no such file or folder")
    if options.calibration is not None and not Path(options.calibration).exists():
        raise UserError(f"--calibration: {options.calibration}: no such file or folder")


def _kind(model: str, has_classifier: bool) -> str:
    if run_folder.is_run(model):
        return "run"
    if hub.local_folder(model) is None:
        return "pretrained name"
    return "model folder" if has_classifier else "encoder folder"


def _rows_of(
    model: str, matrices: dict[str, np.ndarray], options: Options
) -> tuple[str, Restored | None, Split | None]:
    """The kind of model; with data, and where it has a classifier, also the model itself and the tokenized rows."""
    kind = _kind(model, "classifier" in matrices)
    if options.data is None:
        return kind, None, None
    if kind not in ("run", "model folder"):
        log.info("%s: no trained classifier: weight statistics only", model)
        return kind, None, None
    restored = restore_run(model) if kind == "run" else restore_folder(model, options.columns)
    own = options.columns or restored.data
    split = load_eval_split(
        options.data,
        load_tokenizer(restored.vocabulary),
        restored.labels,
        own.max_length,
        own.text,
        own.text_pair,
        own.label,
        rows=options.rows,
        task=restored.task,
    )
    return kind, restored, split


def _analyze(
    options: Options, output: Path, model: str, label: str, found: list[weights.WeightStatistics], source: tuple
) -> Analysis:
    kind, restored, split = source
    history = training.read(model) if kind == "run" else None
    end = training.trade_off(model) if kind == "run" else None
    if restored is None:
        return Analysis(model, label, kind, found, training=history, trade_off=end)
    seen = activations.statistics(restored, split, options.seed)
    scores = None
    if options.sensitivity and split.labels is None:
        log.info("%s: no labels: no sensitivity", options.data)
    elif options.sensitivity:
        scores = _sensitivity(options, output, model)
    return Analysis(model, label, kind, found, len(split), tuple(seen), scores, history, end)


def _sensitivity(options: Options, output: Path, model: str) -> sensitivity.Sensitivity:
    assert options.data is not None
    quant = strict.build(
        config.Quant,
        {"weight": {"bits": options.bits, "granularity": options.granularity, "range": options.range}},
        "quant",
        "analysis",
    )
    bench = open_workbench(model, options.data, quant, options.calibration, options.columns, options.rows, options.seed)
    return sensitivity.measure(
        bench, options.way, options.bits, output / SENSITIVITY, model, _fingerprint(options, model)
    )


def _fingerprint(options: Options, model: str) -> dict[str, Any]:
    """Everything that the sensitivity of a model depends on: settings, and digests of the files."""
    folder = Path(model, run_folder.BEST) if run_folder.is_run(model) else Path(model)
    data = Path(str(options.data))
    beside = data if data.is_dir() else data.parent
    used = {
        "weights": folder / WEIGHTS,
        "quantizers": folder / run_folder.QUANTIZERS,
        "data": _split_file(data, "dev"),
        "calibration": _split_file(Path(options.calibration), "dev")
        if options.calibration
        else _split_file(beside, "train"),
    }
    return {
        **{key: value for key, value in asdict(options).items() if key not in ("model", "compare", "sensitivity")},
        "sha256": {role: files.sha256(path) for role, path in used.items() if path is not None and path.is_file()},
    }


def _split_file(path: Path, split: str) -> Path | None:
    if not path.is_dir():
        return path
    try:
        return find_file(path, split, None)
    except UserError:
        return None  # not needed, or else loading the rows says it
