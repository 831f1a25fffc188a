"""How many inference predictors of how many threads answer fastest on this machine; found by trying, kept in the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import artifact, files
from .benchmark import latency_ms
from .errors import UserError
from .machine import machine

if TYPE_CHECKING:
    from .benchmark import Rows

KEY = "tuning"  # of manifest.json
REPEATS = 5


def divisions(cores: int) -> list[tuple[int, int]]:
    """(instances, threads of each) that keep `cores` busy, threads ascending."""
    return [(cores // threads, threads) for threads in range(1, cores + 1) if cores % threads == 0]


def measure(folder: str | Path, rows: Rows, cores: int, batch: int = 32) -> dict[str, Any]:
    """Sentences a second of each of `divisions`, in turns, for calls of all `rows` in batches of at most `batch`.

    Returns what the manifest keeps: {cpu, cores, batch, instances, threads, tried: [...]}; the fastest comes first there.
    Raises UserError as Predictor does, and for more cores than this process may use.
    """
    from .predictor import Predictor

    there = machine()
    if not 1 <= cores <= there["cores"]:
        raise UserError(f"cores: {cores} is not in 1..{there['cores']}, the cores that this process may use")
    predictors = {pair: Predictor(folder, threads=pair[1], instances=pair[0]) for pair in divisions(cores)}
    found = latency_ms({str(pair): one for pair, one in predictors.items()}, rows, (batch,), REPEATS)
    tried = [
        {
            "instances": pair[0],
            "threads": pair[1],
            "sentences_per_s": found[str(pair)][f"batch_{batch}_per_second"],
            "spread": found[str(pair)][f"batch_{batch}_spread"],
        }
        for pair in predictors
    ]
    tried.sort(key=lambda one: -one["sentences_per_s"])
    best = {key: tried[0][key] for key in ("instances", "threads")}
    return {"cpu": there["cpu"], "cores": cores, "batch": batch, **best, "tried": tried}


def save(folder: str | Path, found: dict[str, Any]) -> None:
    """Keep what `measure` found in the artifact's manifest."""
    manifest = artifact.read_manifest(folder)
    files.write_json(Path(folder, artifact.MANIFEST), {**manifest, KEY: found})


def stored(manifest: dict[str, Any]) -> tuple[int, int]:
    """(instances, threads) that were found on a machine like this one; else (1, 1)."""
    kept, there = manifest.get(KEY), machine()
    if not kept or kept["cpu"] != there["cpu"] or kept["cores"] > there["cores"]:
        return 1, 1
    return kept["instances"], kept["threads"]
