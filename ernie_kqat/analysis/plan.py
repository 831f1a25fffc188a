"""A mixed-precision result as a config that tools/train.py and tools/export.py take."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paddle
import yaml

from .. import config


def text(results: Mapping[str, Any], data: config.Data, labels: list[str]) -> str:
    """plan.yaml of frontier.json's content: the wide width, and a rule for each narrow layer; PTQ as it stands.

    `data`: max_length and columns, as measured; its dev rows are those that chose the plan. `labels`: the model's.
    """
    settings = results["settings"]
    wide, narrow = settings["bits"]
    weight = {"bits": wide, "granularity": settings["granularity"], "range": settings["range"]}
    folder, (train, dev) = _common(settings["calibration"], settings["data"])
    columns = {name: getattr(data, name) for name in ("text", "text_pair", "label") if getattr(data, name)}
    rows = {"path": folder, "train": train, "dev": dev, **columns, "labels": labels, "max_length": data.max_length}
    chosen = [layer["name"] for layer in results["layers"] if layer["bits"] == narrow]
    rules = [f"      - ['^{re.escape(name)}$', {{weight: {{bits: {narrow}}}}}]" for name in chosen]
    lines = [
        *(f"# {line}" for line in described(results)),
        f"Global: {_flow({'output_dir': 'output/mixed_precision', 'seed': settings['seed']})}",
        f"Model: {_flow({'name_or_path': settings['model']})}",
        f"Data: {_flow(rows)}",
        "Slim:",
        "  quant:",
        f"    weight: {_flow(weight)}",
        f"    activation: {_flow(settings['activation'])}",
        *(["    layers:  # least sensitive first", *rules] if rules else []),
        "Train: {epochs: 0}  # PTQ; more epochs are QAT at these bits",
    ]
    return "\n".join(lines) + "\n"


def rules(model: paddle.nn.Layer, base: config.Quant, weights: Mapping[str, config.WeightQuant]) -> list[list[Any]]:
    """Slim.quant.layers that make a model like `model`, quantized, but with these weight quantizers; a rule for each Linear
    that is not as `base`."""
    found: list[list[Any]] = []
    for name, layer in model.named_sublayers():
        rule: Any = None
        if type(layer) is paddle.nn.Linear:
            rule = "skip"
        elif name in weights:
            parts = {"weight": weights[name], "activation": layer._fake_quant_input.options}
            different = {part: _different(options, getattr(base, part)) for part, options in parts.items()}
            rule = {part: keys for part, keys in different.items() if keys}
        if rule:
            found.append([f"^{re.escape(name)}$", rule])
    return found


def _different(options: Any, base: Any) -> dict[str, Any]:
    """The keys in which two options dataclasses differ, as `options` has them."""
    here, there = dataclasses.asdict(options), dataclasses.asdict(base)
    return {name: value for name, value in here.items() if value != there[name]}


def described(results: Mapping[str, Any]) -> list[str]:
    """What was planned, by which command, and the measured figures."""
    settings, chosen = results["settings"], results["chosen"]
    wide, narrow = settings["bits"]
    lines = [
        f"Mixed precision: weights of {chosen['narrow_layers']} of {len(results['layers'])} layers at {narrow} bits, the"
        f" others at {wide}; per {settings['granularity']}, range {settings['range']}; inputs at"
        f" {settings['activation']['bits']} bits.",
        f"Command: {results['command']}",
        f"Packed weights: {chosen['size_bytes']} bytes, {chosen['ratio']:.4f} of fp32.",
        f"Measured (simulated) on {results['rows']} rows that chose it: accuracy {chosen['accuracy']:.4f}"
        f" (fp32 {results['fp32']['accuracy']:.4f}), rms/std {chosen['rms_over_std']:.4f}.",
    ]
    test = results["test"]
    if test:
        lines.append(
            f"On {test['rows']} other rows: accuracy {test['chosen']['accuracy']:.4f} (fp32 {test['fp32']['accuracy']:.4f},"
            f" all {wide} bits {test['wide']['accuracy']:.4f}, all {narrow} bits {test['narrow']['accuracy']:.4f}),"
            f" rms/std {test['chosen']['rms_over_std']:.4f}."
        )
    return lines


def told(options: Any) -> dict[str, Any]:
    """The keys of an options dataclass that are not at their defaults, and its `bits` and `range`, if any, which say most."""
    told = ("bits", "range")
    given = {item.name: (getattr(options, item.name), item.default) for item in dataclasses.fields(options)}
    return {name: value for name, (value, default) in given.items() if name in told or value != default}


def _common(*paths: str) -> tuple[str, list[str]]:
    """The folder that all files are under, and their places in it."""
    if len({Path(path).is_absolute() for path in paths}) > 1:
        paths = tuple(os.path.abspath(path) for path in paths)
    folder = os.path.commonpath([os.path.dirname(os.path.normpath(path)) or os.curdir for path in paths])
    folder = folder or os.curdir
    return folder, [os.path.relpath(path, folder) for path in paths]


def _flow(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
