"""Layer-wise settings as (regex, value) rules over layer names: first match wins, a rule that matches nothing is an error."""

from __future__ import annotations

import re
from typing import Any

from .errors import UserError


def match(rules: list, names: list[str], key: str) -> dict[str, Any]:
    """Value for each name that some rule matches (`re.search`), in the order of `names`.

    `key` is the config key, for messages. Raises UserError for a malformed rule, a bad regex, or a rule that no name
    reaches (because it matches nothing, or because earlier rules take all it matches).
    """
    compiled = []
    for index, rule in enumerate(rules):
        if not (isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str)):
            raise UserError(f"{key}[{index}]: {rule!r} is not a [regex, value] pair")
        try:
            compiled.append((re.compile(rule[0]), rule[1]))
        except re.error as error:
            raise UserError(f"{key}[{index}]: {rule[0]!r} is not a regular expression: {error}") from None
    plan: dict[str, Any] = {}
    used = set()
    for name in names:
        for index, (regex, value) in enumerate(compiled):
            if regex.search(name):
                plan[name] = value
                used.add(index)
                break
    for index, (regex, _) in enumerate(compiled):
        if index not in used:
            taken = [name for name in names if regex.search(name)]
            why = "earlier rules take all it matches" if taken else f"no layer matches; layers: {_some(names)}"
            raise UserError(f"{key}[{index}]: rule {regex.pattern!r} has no effect: {why}")
    return plan


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "") if names else "none"
