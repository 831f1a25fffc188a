"""Trials: train by a config, drop the bad ones early, export and pack the others, and compare what came out.

Optuna chooses (TPE) and prunes (medians). Each combination of the space's `each` has a study of its own, in which only accuracy
counts; size and time are what the combinations trade it against.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from .. import config, files, tasks
from ..errors import UserError
from ..export.exporter import export_run
from ..measure import evaluate_any
from ..packed.pack import pack
from ..trainer import train
from .space import Space, as_overrides

STUDIES, TRIALS, LOCK = "studies.log", "trials.json", ".lock"
STARTUP = 4  # trials of a study before one may be pruned


@dataclass(frozen=True)
class Options:
    """path, overrides: the config that every trial begins with; trials: of each study; test: rows that chose nothing."""

    path: str
    overrides: list[str]
    space: Space
    trials: int
    output: Path
    seed: int = 0
    test: str | None = None


def search(options: Options) -> dict[str, Any]:
    """Run what is missing of the search in `options.output`, and write trials.json.

    Returns it: {trials: [{number, study, values, state, metric, dev, deployed, latency_ms, size_bytes, packed_bytes, folder}],
    front: the folders of those that no other beats}. Raises UserError for wrong input and where the very first trial fails.
    """
    options.space.check(options.path, options.overrides)
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{options.output}: another search is at work there") from None
        return _search(options)


def _search(options: Options) -> dict[str, Any]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(options.output / STUDIES)))
    combinations = list(options.space.combinations())
    for combination in combinations:
        _abandon(_study(storage, combination, options.seed))
    for index in range(options.trials):  # in turns, so that a search that is stopped has something of each
        for combination in combinations:
            study = _study(storage, combination, options.seed + index)
            if len(_finished(study)) <= index:
                study.optimize(_Objective(options, combination), n_trials=1)
                _write(options, storage, combinations)
    found = _write(options, storage, combinations)
    if options.test is not None:
        for row in found["trials"]:
            if row.get("folder") in found["front"]:
                row["test"] = _tested(options.output / row["folder"], options.test)[row["metric"]]
        files.write_json(options.output / TRIALS, found)
    return found


class _Objective:
    """One trial: the best dev score of a run that is exported and packed."""

    def __init__(self, options: Options, combination: dict[str, Any]):
        self.options, self.combination = options, combination

    def __call__(self, trial: optuna.Trial) -> float:
        options = self.options
        values = {key: one.suggest(trial, key) for key, one in options.space.search.items()}
        folder = options.output / f"{_name(self.combination)}_{trial.number:03}"
        overrides = [*options.overrides, *as_overrides({**self.combination, **values})]
        settings = config.load(options.path, [*overrides, f"Global.output_dir={folder}"])
        metric = settings.Train.metric or tasks.of_data(settings.Data).metrics[0]
        trial.set_user_attr("folder", folder.name)
        trial.set_user_attr("metric", metric)

        def watch(step: int, scores: dict[str, float]) -> None:
            trial.report(scores[metric], step)
            if step and trial.should_prune():
                raise optuna.TrialPruned

        try:
            summary = train(settings, overwrite=True, watch=watch)
            figures = _deployed(folder, settings, metric)
        except optuna.TrialPruned:
            shutil.rmtree(folder / "best_model", ignore_errors=True)
            raise
        except UserError as error:  # a loss that is not finite, an export that is refused
            trial.set_user_attr("error", str(error))
            print(f"trial {folder.name} failed: {error}")
            if trial.number == 0 and not any(options.output.glob("*/summary.json")):
                raise  # nothing has worked yet: it is the data, or the config
            raise optuna.TrialPruned from None
        finally:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name, value in figures.items():
            trial.set_user_attr(name, value)
        return float(summary["best_scores"][metric])


def _deployed(folder: Path, settings: config.Config, metric: str) -> dict[str, Any]:
    """Export the run, verified, and pack it: what it is worth where it runs."""
    manifest = export_run(str(folder), str(folder / "inference"), settings.Export)
    found = manifest["verification"]
    if not found["passed"]:
        raise UserError(f"{folder}: the export was refused: agreement {found['agreement']:.2%}")
    packed = pack(folder / "inference", folder / "packed")
    fast = found.get("native", found)
    return {
        "deployed": found["scores"]["deployed"][metric],
        "latency_ms": fast["latency_ms"]["batch_1"],
        "size_bytes": found["size_bytes"],
        "packed_bytes": packed["size_bytes"],
    }


def front(
    rows: Sequence[dict[str, Any]], costs: Sequence[str] = ("packed_bytes", "latency_ms")
) -> list[dict[str, Any]]:
    """The rows that no other beats: as accurate at no more cost of any kind, and better in one."""

    def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        better = [one["deployed"] - other["deployed"], *(other[cost] - one[cost] for cost in costs)]
        return min(better) >= 0 and max(better) > 0

    return [row for row in rows if not any(beats(other, row) for other in rows)]


def _write(options: Options, storage: JournalStorage, combinations: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {
            "study": combination,
            "number": trial.number,
            "values": {key: _value(value) for key, value in trial.params.items()},
            "state": "failed" if "error" in trial.user_attrs else trial.state.name.lower(),
            "dev": trial.value if trial.state == TrialState.COMPLETE else None,
            **trial.user_attrs,
        }
        for combination in combinations
        for trial in _study(storage, combination, options.seed).trials
    ]
    best = front([row for row in rows if row["state"] == "complete"])
    found = {"trials": rows, "front": [row["folder"] for row in best]}
    files.write_json(options.output / TRIALS, found)
    return found


def _tested(folder: Path, test: str) -> dict[str, Any]:
    """Scores of the deployed program on rows that chose nothing; kept beside it."""
    path = folder / "test.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"data": None}
    if found["data"] != str(test):
        found = evaluate_any(folder / "inference", test, config.Data())
        files.write_json(path, found)
    return found


def _value(value: Any) -> Any:
    if isinstance(value, str):  # of Choices
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _study(storage: JournalStorage, combination: dict[str, Any], seed: int) -> optuna.Study:
    # A seed for each trial: a sampler that begins again after a stop would propose the first trials' values again.
    return optuna.create_study(
        storage=storage,
        study_name=json.dumps(combination, sort_keys=True),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        load_if_exists=True,
    )


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def _abandon(study: optuna.Study) -> None:
    """What was running when the process was killed."""
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)


def _name(combination: dict[str, Any]) -> str:
    """Of its folders: the short values themselves, and a few digits of a hash where they are not short."""
    text = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in combination.items())
    if text and text.replace("_", "").replace("-", "").isalnum() and len(text) < 40:
        return text
    return hashlib.sha256(json.dumps(combination, sort_keys=True).encode()).hexdigest()[:8] if combination else "trial"
