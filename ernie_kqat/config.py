"""Configuration in Paddle's style: YAML -> frozen dataclasses. The classes below are the reference of every key.

An unknown key, a wrong type or an impossible value is a `UserError` naming file, key, value and what is allowed (strict.py).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import yaml

from . import strict
from .errors import UserError
from .strict import number, option, place

# Python 3.9 resolves these annotations at run time, hence Optional in place of `|`.


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
    task: Literal["classification", "regression", "multilabel", "tokens", "qa"] = option(
        "classification", "what a row's answer is: a file of ernie_kqat/tasks (docs/tasks.md)"
    )
    path: Optional[str] = place(None, "a local folder; wins over `name` and never uses the network")
    name: Optional[str] = option(None, "a PaddleNLP dataset, as `glue/sst-2` or `chnsenticorp`")
    train: Optional[str] = option(None, "file in `path`; default: train.tsv, .csv or .jsonl")
    dev: Optional[str] = option(None, "file in `path`; default: dev.tsv, .csv or .jsonl")
    text: Optional[str] = option(None, "column of the sentence; default: found by name (sentence, text, sentence1, …)")
    text_pair: Optional[str] = option(None, "column of the second sentence; default: found by name (sentence2, …)")
    label: Optional[str] = option(None, "column of the label; default: `label`")
    labels: Optional[list[str]] = option(None, "the label names in order of their ids; default: found in train, sorted")
    separator: str = option("|", "between the labels of a row (task: multilabel)")
    doc_stride: int = number(64, 1, 512, "tokens from the start of one window of a long context to the next (task: qa)")
    unanswerable: bool = option(False, "questions may have no answer, and get none (task: qa)")
    max_length: int = number(128, 4, 512, "tokens, with [CLS] and [SEP]; longer rows are cut and counted")
    train_rows: Optional[int] = number(None, 1, 10**9, "train on a random subset of this many rows (by Global.seed)")
    dev_rows: Optional[int] = number(None, 1, 10**9, "evaluate on the first so many rows")


@dataclass(frozen=True)
class WeightQuant:
    quantizer: str = option("minmax", "a file of ernie_kqat/quantizers")
    bits: int = number(
        8,
        1,
        8,
        "signed and symmetric: integers in ±(2^(bits-1) - 1); quantizer ternary has 2, binary 1, all others 2 to 8",
    )
    granularity: Literal["channel", "tensor"] = option("channel", "one step per output channel, or one per tensor")
    range: Literal["absmax", "mse", "percentile", "learned"] = option(
        "absmax",
        "by the largest weight, by least squares, by a percentile of |w|, or trained from least squares on (quantizer:"
        " minmax)",
    )
    percentile: float = number(99.9, 50.0, 100.0, "of |w| (range: percentile)")
    range_lr: float = number(100.0, 0.0, 1e6, "learning rate of log(range), as a multiple (range: learned)")
    init: Literal["mean", "mse"] = option(
        "mse", "where the step begins: at least squares, or at LSQ's 2 mean|w| / sqrt(2^(bits-1) - 1) (quantizer: lsq)"
    )
    step_lr: float = number(1.0, 0.0, 1e6, "learning rate of the step, as a multiple (quantizer: lsq)")
    split: bool = option(False, "begin as two binary weights that sum to the ternary one (quantizer: binary)")


@dataclass(frozen=True)
class TableQuant(WeightQuant):
    """Of an embedding table; its keys are the weights', but for the granularity."""

    granularity: Literal["row", "tensor"] = option(  # type: ignore[assignment]
        "row", "one step per row, that is per token, or one for the table"
    )


@dataclass(frozen=True)
class EmbeddingQuant(TableQuant):
    tables: Optional[list] = option(
        None,
        "(regex, override) rules over Embedding names; first match wins; override: `skip` or {…}, keys of this section;"
        " without a rule the word embeddings are quantized and no other table",
    )


@dataclass(frozen=True)
class ActivationQuant:
    quantizer: str = option("minmax", "a file of ernie_kqat/quantizers")
    bits: int = number(8, 2, 8, "signed; per tensor")
    range: Literal["moving_average", "mse", "percentile", "learned"] = option(
        "moving_average",
        "of max|x| over training batches; or fixed after calibration: least squares, or a percentile of |x|; or trained from"
        " least squares on",
    )
    percentile: float = number(99.99, 50.0, 100.0, "of |x| (range: percentile)")
    range_lr: float = number(100.0, 0.0, 1e6, "learning rate of log(range), as a multiple (range: learned)")
    init: Literal["mean", "mse"] = option(
        "mse", "as of weights, the mean of the calibration batches' steps; with an offset LSQ+'s (quantizer: lsq)"
    )
    step_lr: float = number(1.0, 0.0, 1e6, "learning rate of step and offset, as a multiple (quantizer: lsq)")
    offset: bool = option(False, "a trained offset, as in LSQ+; it is deployed in the bias (quantizer: lsq)")
    moving_rate: float = number(0.9, 0.0, 1.0, "decay of the moving average of max|x| (PaddleSlim's name)")
    calibration_batches: int = number(
        20, 1, 10**6, "train batches that set the ranges before training (or instead: PTQ)"
    )


@dataclass(frozen=True)
class AttentionQuant(ActivationQuant):
    """Of queries, keys and values; the softmax's weights have 8 unsigned bits and no range."""

    range: Literal["moving_average", "mse", "percentile", "learned"] = option("mse", "as of activations")


@dataclass(frozen=True)
class Quant:
    weight: WeightQuant = field(default_factory=WeightQuant)
    activation: ActivationQuant = field(default_factory=ActivationQuant)
    attention: Optional[AttentionQuant] = None
    embedding: Optional[EmbeddingQuant] = None
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
    learning_rate: float = number(5e-5, 0.0, 10.0, "AdamW's, at its peak")
    weight_decay: float = number(0.01, 0.0, 1.0, "AdamW's; not on biases and LayerNorm")
    warmup: float = number(0.1, 0.0, 1.0, "share of the steps with a rising learning rate; linear decay after it")
    max_grad_norm: float = number(1.0, 0.0, 1e9, "global gradient norm to clip to; 0: no clipping")
    eval_steps: Optional[int] = number(None, 1, 10**9, "optimizer steps between evaluations; default: once an epoch")
    save_steps: Optional[int] = number(
        None, 1, 10**9, "optimizer steps between checkpoints; default: at each evaluation"
    )
    keep: int = number(2, 1, 10**6, "checkpoints to keep; --resume takes the newest that is whole")
    eval_batch_size: int = number(64, 1, 10**5, "rows of one forward of an evaluation")
    select: Literal["best", "last"] = option(
        "best", "which model becomes best_model/: the best on dev (the start is a candidate), or the last step's"
    )
    metric: Optional[
        Literal[
            "accuracy",
            "macro_f1",
            "matthews",
            "f1",
            "pearson",
            "spearman",
            "micro_f1",
            "exact_match",
            "precision",
            "recall",
        ]
    ] = option(
        None,
        "by which the best is found; default: the task's first (docs/tasks.md), in classification accuracy, where f1 is of the"
        " second of two labels (MRPC, QQP), and matthews is CoLA's",
    )


@dataclass(frozen=True)
class Rewrites:
    """Of the deployed program; each leaves out work, and no answer changes."""

    first_token: bool = option(
        True, "in the last layer, after keys and values, only the first token, which is all that is read"
    )
    positions: bool = option(True, "position embeddings as a slice of their table")
    activations: bool = option(True, "GELU and tanh written as int8 where the next layer reads that")
    context: bool = option(True, "the heads' outputs written as rows of tokens, not transposed afterwards")


@dataclass(frozen=True)
class Export:
    samples: Optional[int] = number(None, 1, 10**9, "rows of the verification data to use; default: all")
    min_agreement: float = number(0.995, 0.0, 1.0, "deployed against simulated labels; under it the export refuses")
    max_rms_over_std: float = number(0.03, 0.0, 1.0, "rms logit difference over logit std; over it the export refuses")
    target: Literal["onednn", "tensorrt"] = option("onednn", "tensorrt: a program for NVIDIA GPUs (docs/tensorrt.md)")
    engine: Literal["paddle", "native"] = option(
        "paddle", "native: also a program of our own operator, which is faster and needs to be built (docs/native.md)"
    )
    plain: bool = option(
        True,
        "false, with engine native: the plain program is verified and then left out; half the size, and no way round",
    )
    rewrites: Rewrites = field(default_factory=Rewrites)


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
        raise UserError(f"{path}: {tree!r} found where sections are needed ({', '.join(strict.keys(Config))})")
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
    return strict.build(Config, tree, "", strict.Origin(source, origins))


def describe() -> typing.Iterator[str]:
    """One line a key: name, default, what is allowed, meaning. `tools/train.py --keys` prints it."""
    for key in strict.describe(Config):
        default = "" if key.default is None else f" = {key.default}"
        yield f"{key.name}{default}  ({key.allowed})  {key.help}"


def reference() -> str:
    """Every key as Markdown, a table a section. `tools/config_reference.py` writes it to docs/configuration.md."""
    lines = [
        "# Configuration reference",
        "",
        "Every key of a config (`configs/*.yaml`), made by `python tools/config_reference.py` from the dataclasses that read it.",
        "`-o Section.key=value` overrides a key. `Slim.NAME: {}` switches a method on as its defaults say; `bias_correction` has",
        "no keys.",
    ]
    section = ""
    for key in strict.describe(Config):
        parts = key.name.split(".")
        here = ".".join(parts[:2]) if parts[0] == "Slim" else parts[0]
        if here != section:
            section = here
            lines += ["", f"## {section}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        cells = [f"`{key.name}`", "-" if key.default is None else f"`{key.default}`", key.allowed, key.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


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
        sections = [s for s in dataclasses.fields(Config) if parts[0] in strict.keys(_section(s.name))]
        if len(sections) != 1:
            found = " or ".join(f"{s.name}.{parts[0]}" for s in sections) or f"one of {', '.join(strict.keys(Config))}"
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
