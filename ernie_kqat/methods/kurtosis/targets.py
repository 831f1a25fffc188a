"""Target policies: the kurtosis T a layer is pulled to, from the kurtosis K0 of its original pretrained weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...errors import UserError
from .moments import UNIFORM

ALLOWED = "pretrained, none, {fixed: K}, {cap: K} and {anneal: K} with K of 1 or more, {shrink: g} with g in 0..1, {file: PATH}"


@dataclass(frozen=True)
class Target:
    """start, end: float64 [groups], T at the first step and when annealing ends; ceiling: a group under it is left alone."""

    start: np.ndarray
    end: np.ndarray
    ceiling: float = 0.0

    def at(self, share: float) -> np.ndarray:
        """T after this share (0 to 1) of the annealing, moving evenly in log K: outliers span three decades."""
        return np.exp((1 - share) * np.log(self.start) + share * np.log(self.end))


def target_of(policy: Any, name: str, original: np.ndarray | None, key: str) -> Target | None:
    """The target of layer `name` from its policy and K0 (float64 [groups]); None: not regularized.

    Raises UserError for what is no policy, for one that needs K0 where the pretrained weights lack the layer (`original` is
    None), and for a file without the layer.
    """
    if policy == "none":
        return None
    if original is None:
        raise UserError(f"{key}: the pretrained weights have no {name}.weight, so {policy!r} has no meaning for it")
    if policy == "pretrained":
        return Target(original, original)
    kind, value = next(iter(policy.items())) if isinstance(policy, dict) and len(policy) == 1 else (None, None)
    if kind == "file" and isinstance(value, str):
        found = np.full_like(original, 1.0) * read_file(value, key, name, len(original))
        return Target(found, found)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind == "shrink" and 0 <= value <= 1:
            found = original + value * (UNIFORM - original)
            return Target(found, found)
        if value >= 1 and kind in ("fixed", "cap", "anneal"):
            constant = np.full_like(original, float(value))
            if kind == "cap":
                found = np.minimum(original, constant)
                return Target(found, found, float(value))
            return Target(original if kind == "anneal" else constant, constant)
    raise UserError(f"{key}: {policy!r} is not a target policy; allowed: {ALLOWED}")


def read_file(path: str, key: str, name: str, groups: int) -> np.ndarray:
    """T of one layer from a YAML map {layer: K, or a list of K by output channel}: float64 [1] or [groups]."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{key}: file: {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or name not in tree:
        raise UserError(f"{key}: file: {path}: no target for {name}; it needs a line `{name}: K`")
    try:
        found = np.atleast_1d(np.asarray(tree[name], np.float64))
    except (TypeError, ValueError):
        found = np.array([])
    if found.shape not in ((1,), (groups,)) or not np.isfinite(found).all() or (found < 1).any():
        raise UserError(
            f"{key}: file: {path}: {name}: {str(tree[name])[:80]!r} is not a kurtosis of 1 or more"
            + (f", or a list of {groups}" if groups > 1 else "")
        )
    return found
