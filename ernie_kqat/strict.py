"""Strict options: nested dicts -> frozen dataclasses and back. A field says its range, its choices and its one line of help.

An unknown key, a wrong type or an impossible value is a `UserError` naming source, key, value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from .errors import UserError
from .home import home

HOME_VARIABLE = "$ERNIE_KQAT_HOME"


def number(default: Any, low: float, high: float, help: str = "") -> Any:  # noqa: A002
    """A numeric field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def place(default: Any, help: str) -> Any:  # noqa: A002
    """A folder, or a name; a leading $ERNIE_KQAT_HOME stands for the cache (ernie_kqat/home.py)."""
    return field(default=default, metadata={"help": help, "place": True})


def option(default: Any, help: str) -> Any:  # noqa: A002
    """A field with its one line of documentation."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Origin:
    """Where values came from, for messages."""

    source: str
    overrides: dict[str, str]

    def error(self, key: str, message: str) -> UserError:
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            override = self.overrides.get(".".join(parts[:length]))
            if override is not None:
                return UserError(f"-o {override}: {key}: {message}")
        return UserError(f"{self.source}: {key}: {message}")


def build(cls: type, tree: Any, key: str, source: str | Origin) -> Any:
    """Build one dataclass of options, at `key` of `source`, from a dict."""
    return _build(cls, tree, key, source if isinstance(source, Origin) else Origin(source, {}))


def to_tree(value: Any) -> Any:
    """The nested dicts that `build` reads."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {}
        for item in dataclasses.fields(value):
            if not item.init:
                continue
            sub = to_tree(getattr(value, item.name))
            if item.metadata.get("open"):
                tree.update(sub)
            else:
                tree[item.name.rstrip("_")] = sub
        return tree
    if isinstance(value, dict):
        return {key: to_tree(sub) for key, sub in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(sub) for sub in value]
    return value


@dataclass(frozen=True)
class Key:
    """One key of a config, as its documentation has it. `default` is None for a key without one, else as YAML has it."""

    name: str
    default: str | None
    allowed: str
    help: str


def describe(cls: Any, prefix: str = "") -> typing.Iterator[Key]:
    """Every key of a dataclass of options, in order; those of methods where its open field is."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        hint = _not_none(hints[item.name])
        if item.metadata.get("open"):
            from . import methods

            for name in methods.names():
                yield from describe(methods.find(name), f"{prefix}{name}.")
        elif dataclasses.is_dataclass(hint):
            yield from describe(hint, f"{prefix}{item.name}.")
        else:
            default = None if item.default is dataclasses.MISSING else _as_yaml(item.default)
            name = f"{prefix}{item.name.rstrip('_')}"
            yield Key(name, default, _allowed(item, hint), item.metadata.get("help", ""))


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def keys(cls: type) -> list[str]:
    """The keys of a dataclass of options."""
    return [f.name.rstrip("_") for f in dataclasses.fields(cls) if f.init and not f.metadata.get("open")]


def _build(cls: Any, tree: Any, key: str, origin: Origin) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise origin.error(key, f"{tree!r} found where keys are needed ({', '.join(keys(cls))})")
    hints = typing.get_type_hints(cls)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("open")}
    open_field = next((f for f in dataclasses.fields(cls) if f.metadata.get("open")), None)
    values: dict[str, Any] = {}
    extra = {}
    for name, value in tree.items():
        where = f"{key}.{name}" if key else str(name)
        if name in fields:
            item = fields[name]
            values[item.name] = _convert(item, hints[item.name], value, where, origin)
        elif open_field is not None:
            built = _build_method(str(name), value, where, origin, list(fields))
            if built is not None:
                extra[str(name)] = built
        else:
            raise _unknown(where, str(name), list(fields), origin)
    if open_field is not None:
        values[open_field.name] = extra
    try:
        return cls(**values)
    except ValueError as error:  # a check across fields, in the class's __post_init__
        raise origin.error(key, str(error)) from None


def _build_method(name: str, value: Any, where: str, origin: Origin, known: list[str]) -> Any:
    from . import methods

    if name not in methods.names():
        raise _unknown(where, name, known + methods.names(), origin)
    return None if value is None else _build(methods.find(name), value, where, origin)


def _unknown(where: str, name: str, allowed: list[str], origin: Origin) -> UserError:
    close = difflib.get_close_matches(name, allowed, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return origin.error(where, f"unknown key; {hint}allowed: {', '.join(allowed)}")


def _not_none(hint: Any) -> Any:
    if typing.get_origin(hint) is Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]
    return hint


def _allowed(item: dataclasses.Field, hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    name = getattr(hint, "__name__", str(hint))
    if "low" in item.metadata:
        return f"{name} in {item.metadata['low']:g}..{item.metadata['high']:g}"
    return name


def _convert(item: dataclasses.Field, hint: Any, value: Any, where: str, origin: Origin) -> Any:
    kind = _not_none(hint)
    if value is None and kind is not hint:
        return None
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, origin)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise origin.error(where, f"{value!r} is not one of {_allowed(item, kind)}")
        return value
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 (no dot) as text
        try:
            value = float(value)
        except ValueError:
            raise origin.error(where, f"{value!r} is not a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind in (int, float):
        return _number(item, kind, value, where, origin)
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [str(one) for one in value] if typing.get_args(kind) == (str,) else value
    plain = typing.get_origin(kind) or kind
    if plain not in (Any, Union) and not isinstance(value, plain):
        raise origin.error(where, f"{value!r} is not of type {_allowed(item, kind)}")
    if item.metadata.get("place") and value.startswith(HOME_VARIABLE):
        return str(home()) + value[len(HOME_VARIABLE) :]
    return value


def _number(item: dataclasses.Field, kind: type, value: Any, where: str, origin: Origin) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise origin.error(where, f"{value!r} is not of type {_allowed(item, kind)}")
    if "low" in item.metadata and not item.metadata["low"] <= value <= item.metadata["high"]:
        low, high = item.metadata["low"], item.metadata["high"]
        raise origin.error(where, f"{value} is not in {low:g}..{high:g}")
    return value
