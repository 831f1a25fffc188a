"""One file a method, quantizer or task; the file's name is its config key."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

Kind = TypeVar("Kind")


def names(package: str) -> list[str]:
    """The modules of a package, by name."""
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def defined(package: str, name: str, kind: type[Kind]) -> type[Kind] | None:
    """The subclass of `kind` that <package>/<name>.py itself defines; None without one."""
    module = importlib.import_module(f"{package}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__:
            return value
    return None
