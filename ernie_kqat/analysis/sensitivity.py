"""How much each layer costs: quantize only it, and quantize all but it. Finished layers are kept on disk."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import files
from ..errors import UserError
from .weights import Way, on_grid, range_of
from .workbench import Score, Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sensitivity:
    """`fp32`: nothing quantized; `everything`: every layer; `only` and `all_but`: {layer: score}."""

    fp32: Score
    everything: Score
    only: dict[str, Score]
    all_but: dict[str, Score]


def measure(bench: Workbench, way: Way, bits: int, path: Path, key: str, settings: Mapping[str, Any]) -> Sensitivity:
    """Of each layer of `bench`: weights at `bits` by `way`, inputs by the bench's own quantizers.

    Each finished layer goes to `path` (JSON) under `key`; those found there with the same `settings` are not measured
    again, with others all are. Raises UserError for a file that is not such a JSON.
    """
    grids = {name: on_grid(weight, range_of(weight, name, way, bits), bits) for name, weight in bench.weights.items()}
    stored = _read(path)
    entry = stored.get(key, {})
    if entry.get("settings") != dict(settings):
        if entry:
            log.info("%s: was measured with other settings; starting over", path)
        entry = {"settings": dict(settings), "layers": {}}
    done = entry["layers"]
    if done:
        log.info("%s: %d of %d layers of %s are there already", path, len(done), len(grids), key)
    if "everything" not in entry:
        entry["fp32"] = dataclasses.asdict(bench.fp32)
        entry["everything"] = dataclasses.asdict(bench.measure(grids, grids))
    with tqdm(total=len(grids), initial=len(done), desc=f"sensitivity of {Path(key).name}", disable=None) as bar:
        for name in grids:
            if name in done:
                continue
            others = {other: grid for other, grid in grids.items() if other != name}
            only, all_but = bench.measure({name: grids[name]}, [name]), bench.measure(others, others)
            done[name] = {"only": dataclasses.asdict(only), "all_but": dataclasses.asdict(all_but)}
            files.write_json(path, {**stored, key: entry})
            bar.update()
    return Sensitivity(
        Score(**entry["fp32"]),
        Score(**entry["everything"]),
        {name: Score(**done[name]["only"]) for name in grids},
        {name: Score(**done[name]["all_but"]) for name in grids},
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it to measure again") from None
    if not isinstance(stored, dict) or not all(isinstance(entry, dict) for entry in stored.values()):
        raise UserError(f"{path}: not the sensitivities of earlier runs; remove it to measure again")
    return stored
