"""Strict configuration: YAML in Paddle's style -> frozen dataclasses. The classes below are the reference of every key.

An unknown key, a wrong type or an impossible value is a `UserError` naming file, key, value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

import yaml

from .errors import UserError
from .home import home

HOME_VARIABLE = "$ERNIE_KQAT_HOME"

# Python 3.9 resolves these annotations at run time, hence Optional and Union in place of `|`.


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
class Global:
    output_dir: str = option("output/run", "the run folder")
    seed: int = number(42, 0, 2**31 - 1, "orders data, initializes the classifier, drives dropout")
    device: Literal["cpu", "gpu"] = option("cpu", "where to train")
    log_every: int = number(20, 1, 10**6, "optimizer steps between log lines")
    visualdl: bool = option(False, "also write VisualDL scalars, under vdl/ of the run folder")


@dataclass(frozen=True)
class Model:
    name_or_path: str = place("ernie-2.0-base-en", "a PaddleNLP model name, or a local folder (never uses the network)")
    pretrained: Optional[str] = place(
        None, "name or folder of the ORIGINAL pretrained weights, for kurtosis targets; default: name_or_path"
    )
    dropout: Optional[float] = number(None, 0, 0.9, "hidden and attention dropout; default: the model's own")


@dataclass(frozen=True)
class Data:
    path: Optional[str] = place(None, "a local folder; wins over `name` and never uses the network")
    name: Optional[str] = option(None, "a PaddleNLP dataset, as `glue/sst-2` or `chnsenticorp`")
    train: Optional[str] = option(None, "file in `path`; default: train.tsv, .csv or .jsonl")
    dev: Optional[str] = option(None, "file in `path`; default: dev.tsv, .csv or .jsonl")
    text: Optional[str] = option(None, "column of the sentence; default: found by name (sentence, text, sentence1, …)")
    text_pair: Optional[str] = option(None, "column of the second sentence; default: found by name (sentence2, …)")
    label: Optional[str] = option(None, "column of the label; default: `label`")
    labels: Optional[list[str]] = option(None, "the label names in order of their ids; default: found in train, sorted")
    max_length: int = number(128, 4, 512, "tokens, with [CLS] and [SEP]; longer rows are cut and counted")
    train_rows: Optional[int] = number(None, 1, 10**9, "train on a random subset of this many rows (by Global.seed)")
    dev_rows: Optional[int] = number(None, 1, 10**9, "evaluate on the first so many rows")


@dataclass(frozen=True)
class WeightQuant:
    quantizer: str = option("minmax", "a file of ernie_kqat/quantizers")
    bits: int = number(8, 2, 8, "signed and symmetric: integers in ±(2^(bits-1) - 1)")
    granularity: Literal["channel", "tensor"] = option("channel", "one step per output channel, or one per tensor")
    range: Literal["absmax", "mse", "percentile", "learned"] = option(
        "absmax", "by the largest weight, by least squares, by a percentile of |w|, or trained from least squares on"
    )
    percentile: float = number(99.9, 50.0, 100.0, "of |w| (range: percentile)")
    range_lr: float = number(100.0, 0.0, 1e6, "learning rate of log(range), as a multiple (range: learned)")


@dataclass(frozen=True)
class ActivationQuant:
    bits: int = number(8, 2, 8, "signed; per tensor")
    range: Literal["moving_average", "mse", "percentile", "learned"] = option(
        "moving_average",
        "of max|x| over training batches; or fixed after calibration: least squares, or a percentile of |x|; or trained from"
        " least squares on",
    )
    percentile: float = number(99.99, 50.0, 100.0, "of |x| (range: percentile)")
    range_lr: float = number(100.0, 0.0, 1e6, "learning rate of log(range), as a multiple (range: learned)")
    moving_rate: float = number(0.9, 0.0, 1.0, "decay of the moving average of max|x| (PaddleSlim's name)")
    calibration_batches: int = number(
        20, 1, 10**6, "train batches that set the ranges before training (or instead: PTQ)"
    )


@dataclass(frozen=True)
class Quant:
    weight: WeightQuant = field(default_factory=WeightQuant)
    activation: ActivationQuant = field(default_factory=ActivationQuant)
    layers: Optional[list] = option(
        None,
        "(regex, override) rules over Linear names; first match wins; override: `skip` or {weight: {…}, activation: {…}}",
    )


@dataclass(frozen=True)
class Slim:
    """`quant` makes it QAT (or PTQ with no training steps); every other key names a file of ernie_kqat/methods."""

    quant: Optional[Quant] = None
    methods: dict = field(default_factory=dict, metadata={"open": True})


@dataclass(frozen=True)
class Train:
    epochs: int = number(3, 0, 10**6, "0 with Slim.quant is PTQ: calibration only")
    max_steps: Optional[int] = number(None, 0, 10**9, "optimizer steps; ends training before `epochs` do")
    batch_size: int = number(32, 1, 10**5, "rows of one forward")
    accumulate: int = number(1, 1, 10**4, "batches of one optimizer step")
    learning_rate: float = number(5e-5, 0.0, 10.0)
    weight_decay: float = number(0.01, 0.0, 1.0, "AdamW's; not on biases and LayerNorm")
    warmup: float = number(0.1, 0.0, 1.0, "share of the steps with a rising learning rate; linear decay after it")
    max_grad_norm: float = number(1.0, 0.0, 1e9, "global gradient norm to clip to; 0: no clipping")
    eval_steps: Optional[int] = number(None, 1, 10**9, "optimizer steps between evaluations; default: once an epoch")
    save_steps: Optional[int] = number(
        None, 1, 10**9, "optimizer steps between checkpoints; default: at each evaluation"
    )
    eval_batch_size: int = number(64, 1, 10**5)
    select: Literal["best", "last"] = option(
        "best", "which model becomes best_model/: the best on dev (the start is a candidate), or the last step's"
    )


@dataclass(frozen=True)
class Export:
    samples: Optional[int] = number(None, 1, 10**9, "rows of the verification data to use; default: all")
    min_agreement: float = number(0.995, 0.0, 1.0, "deployed against simulated labels; under it the export refuses")
    max_rms_over_std: float = number(0.03, 0.0, 1.0, "rms logit difference over logit std; over it the export refuses")


@dataclass(frozen=True)
class Config:
    Global: Global = field(default_factory=Global)
    Model: Model = field(default_factory=Model)
    Data: Data = field(default_factory=Data)
    Slim: Slim = field(default_factory=Slim)
    Train: Train = field(default_factory=Train)
    Export: Export = field(default_factory=Export)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key.sub=value` overrides (values parsed as YAML)."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; a YAML file is needed") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {tree!r} found where sections are needed ({', '.join(_keys(Config))})")
    return from_overrides(overrides, tree, str(path))


def from_overrides(overrides: typing.Sequence[str], tree: dict | None = None, source: str = "command line") -> Config:
    """Defaults, or `tree`, with `key.sub=value` overrides."""
    tree = {} if tree is None else tree
    for text in overrides:
        _apply_override(tree, text)
    return from_tree(tree, source, overrides)


def from_tree(tree: dict, source: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Build a `Config` from nested dicts; errors name `source`, or the `-o` option that the value came from."""
    origins = {text.split("=", 1)[0].strip(): text for text in overrides}
    return _build(Config, tree, "", _Origin(source, origins))


def build(cls: type, tree: dict, key: str, source: str) -> Any:
    """Build one dataclass of options from a dict, as strictly as a whole config."""
    return _build(cls, tree, key, _Origin(source, {}))


def to_tree(config: Any) -> Any:
    """The nested dicts that `from_tree` reads: what resolved.yaml holds."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        tree = {}
        for item in dataclasses.fields(config):
            if not item.init:
                continue
            value = to_tree(getattr(config, item.name))
            if item.metadata.get("open"):
                tree.update(value)
            else:
                tree[item.name.rstrip("_")] = value
        return tree
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_tree(value) for value in config]
    return config


def describe(cls: Any = Config, prefix: str = "") -> typing.Iterator[str]:
    """One line a key: name, type, default, meaning. `tools/train.py --keys` prints it."""
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
            default = "" if item.default is dataclasses.MISSING else f" = {item.default}"
            yield f"{prefix}{item.name.rstrip('_')}{default}  ({_allowed(item, hint)})  {item.metadata.get('help', '')}"


@dataclass(frozen=True)
class _Origin:
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


def _apply_override(tree: dict, text: str) -> None:
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"-o {text}: not of the form key.sub=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"-o {text}: {value!r} is not a YAML value") from None
    if len(parts) == 1:  # Paddle's short form: -o seed=1 is Global.seed=1
        sections = [s for s in dataclasses.fields(Config) if parts[0] in _keys(_section(s.name))]
        if len(sections) != 1:
            found = " or ".join(f"{s.name}.{parts[0]}" for s in sections) or f"one of {', '.join(_keys(Config))}"
            raise UserError(f"-o {text}: say which section: {found}")
        parts = [sections[0].name, *parts]
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"-o {text}: {'.'.join(parts[: depth + 1])} is {child!r}, which has no keys")
        node = child
    node[parts[-1]] = parsed


def _section(name: str) -> type:
    return typing.get_type_hints(Config)[name]


def _keys(cls: type) -> list[str]:
    return [f.name.rstrip("_") for f in dataclasses.fields(cls) if f.init and not f.metadata.get("open")]


def _build(cls: Any, tree: Any, key: str, origin: _Origin) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise origin.error(key, f"{tree!r} found where keys are needed ({', '.join(_keys(cls))})")
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


def _build_method(name: str, value: Any, where: str, origin: _Origin, known: list[str]) -> Any:
    from . import methods

    if name not in methods.names():
        raise _unknown(where, name, known + methods.names(), origin)
    return None if value is None else _build(methods.find(name), value, where, origin)


def _unknown(where: str, name: str, allowed: list[str], origin: _Origin) -> UserError:
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


def _convert(item: dataclasses.Field, hint: Any, value: Any, where: str, origin: _Origin) -> Any:
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


def _number(item: dataclasses.Field, kind: type, value: Any, where: str, origin: _Origin) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise origin.error(where, f"{value!r} is not of type {_allowed(item, kind)}")
    if "low" in item.metadata and not item.metadata["low"] <= value <= item.metadata["high"]:
        low, high = item.metadata["low"], item.metadata["high"]
        raise origin.error(where, f"{value} is not in {low:g}..{high:g}")
    return value
