"""The machine and the versions that a measured number belongs to. Needs the standard library only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# Linux's names of the instruction sets that decide how fast, and how exactly, oneDNN computes INT8.
INT8_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")


def machine() -> dict[str, Any]:
    """{cpu: its name, cores: those that this process may use, instruction_sets: of INT8_SETS, system}."""
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [name for name in INT8_SETS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def exact_int8(instruction_sets: list[str]) -> bool:
    """Whether products of int8 are summed in 32 bits (VNNI). Older sets sum pairs in 16 bits, which overflow."""
    return any(name.endswith("vnni") for name in instruction_sets)


def versions() -> dict[str, str | None]:
    """Python's, and those of the packages that decide speed and answers; None: not installed."""
    packages = ("ernie_kqat", "paddlepaddle", "numpy", "tokenizers")
    return {"python": platform.python_version(), **{name: installed(name) for name in packages}}


def installed(package: str) -> str | None:
    """The installed version of a distribution, without importing it; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first CPU's entries of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
