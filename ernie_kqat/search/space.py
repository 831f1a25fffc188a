"""What a search may change: a YAML file of config keys and their values, read strictly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import config
from ..errors import UserError

if TYPE_CHECKING:
    import optuna

SECTIONS = ("each", "search")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `log`: uniform in the logarithm. Whole numbers where both ends are."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: optuna.Trial, key: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choices:
    """One of some values of any kind."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, key: str) -> Any:
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in self.values]))


@dataclass(frozen=True)
class Space:
    """`each`: keys of which every combination gets a search of its own; `search`: keys whose values are searched."""

    search: dict[str, Range | Choices]
    each: dict[str, Choices] = field(default_factory=dict)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Of `each`: {key: value}; one empty combination where there is none."""
        for values in itertools.product(*(choices.values for choices in self.each.values())):
            yield dict(zip(self.each, values))

    def check(self, path: str, overrides: list[str]) -> None:
        """Raise UserError if any value, all others at their first, is refused by the config."""
        for combination in self.combinations():
            first = {**combination, **{key: ends(values)[0] for key, values in self.search.items()}}
            for key, values in self.search.items():
                for value in ends(values):
                    config.load(path, [*overrides, *as_overrides({**first, key: value})])


def ends(values: Range | Choices) -> tuple[Any, ...]:
    """The values to check: all choices, or the ends of a range."""
    return values.values if isinstance(values, Choices) else (values.low, values.high)


def as_overrides(values: dict[str, Any]) -> list[str]:
    """`-o` options; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def read(path: str | Path) -> Space:
    """A Space from a YAML file: `each: {KEY: [values]}` and `search: {KEY: [values] or {low, high, log}}`.

    Raises UserError, naming file and key, for anything else.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree.get("search"):
        raise UserError(f"{path}: it needs a section `search` with at least one config key")
    for name in tree:
        if name not in SECTIONS:
            raise UserError(f"{path}: {name}: no such section; allowed: {', '.join(SECTIONS)}")
    each = {key: _values(f"{path}: each.{key}", value) for key, value in (tree.get("each") or {}).items()}
    found = {key: _values(f"{path}: search.{key}", value) for key, value in tree["search"].items()}
    for key, value in each.items():
        if isinstance(value, Range):
            raise UserError(f"{path}: each.{key}: a list of values is needed")
    if both := sorted(set(each) & set(found)):
        raise UserError(f"{path}: {both[0]}: in `each` and in `search`")
    return Space(found, {key: value for key, value in each.items() if isinstance(value, Choices)})


def _values(where: str, value: Any) -> Range | Choices:
    if isinstance(value, list) and value:
        return Choices(tuple(value))
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        raise UserError(f"{where}: {value!r} found where a list of values or {{low, high, log}} is needed")
    low, high, log = value["low"], value["high"], value.get("log", False)
    for name, number in (("low", low), ("high", high)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise UserError(f"{where}.{name}: {number!r} is not a number (YAML reads 1e-5 as text: write 1.0e-5)")
    if not isinstance(log, bool) or low > high or (log and low <= 0):
        raise UserError(f"{where}: {value!r}: low <= high is needed, and with `log: true` 0 < low")
    return Range(low, high, log)
