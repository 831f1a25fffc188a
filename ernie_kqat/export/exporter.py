"""A trained run, or a plain model folder by PTQ -> a verified artifact folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from .. import __version__, artifact, config, files, native, run_folder, strict, tensorrt
from ..calibration import calibrate_rows
from ..data.dataset import Split, load_eval_split
from ..errors import UserError
from ..methods import Method
from ..models.loading import pretrained_matrices
from ..restore import Restored, restore_folder, restore_run
from ..tokenizer import load_tokenizer
from . import native as native_program
from . import program, qdq
from .verify import verify

DEFAULTS = config.Export()
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


def export_run(
    run: str, output: str, limits: config.Export, data: str | None = None, fp32: str | None = None
) -> dict[str, Any]:
    """Export a run's best model, verified on `data` (default: the run's dev set). Returns the manifest."""
    restored = restore_run(run, fp32)
    settings = restored.data
    tokenizer = load_tokenizer(restored.vocabulary)
    source = data or settings.path
    if source is None:
        raise UserError(
            f"{run}: it was trained on {settings.name} by name; say --verify FILE (a dev set, or sentences)"
        )
    split = _split(Path(source), tokenizer, restored, None if data else settings.dev, limits.samples)
    manifest = export(restored, split, tokenizer, output, limits)
    summary = Path(run, run_folder.SUMMARY)
    trained = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    files.write_json(summary, {**trained, **summarize(manifest["verification"])})
    return manifest


def export_folder(
    folder: str,
    calibration: str,
    output: str,
    limits: config.Export,
    quant: config.Quant,
    max_length: int = 128,
    data: str | None = None,
    seed: int = 42,
    methods: Mapping[str, Method] | None = None,
    columns: config.Data | None = None,
) -> dict[str, Any]:
    """PTQ: quantize a plain fp32 model folder by calibration only, and export it. `data`: verification rows.

    columns: names of the columns, and the task's own keys, where they are not the defaults. methods: Slim.methods. Raises
    UserError for one that needs training.
    """
    methods = methods or {}
    for name, method in methods.items():
        if not method.calibrates():
            raise UserError(
                f"Slim.{name}: it only does something in training; use tools/train.py, or leave it out here"
            )
    restored = restore_folder(folder, replace(columns or config.Data(), max_length=max_length))
    tokenizer = load_tokenizer(restored.vocabulary)
    rows = _split(_train_file(Path(calibration), restored), tokenizer, restored)
    restored = calibrated(restored, rows, quant, methods, seed)
    split = _split(Path(data or calibration), tokenizer, restored, rows=limits.samples)
    return export(restored, split, tokenizer, output, limits)


def calibrated(
    restored: Restored, rows: Split, quant: config.Quant, methods: Mapping[str, Method], seed: int
) -> Restored:
    """PTQ of an fp32 model, in place: quantizers and methods (Slim.methods) attached, ranges set by `rows`."""
    source = restored.fp32
    restored = restored.quantized(quant)
    for method in methods.values():
        method.attach(restored.model, lambda: pretrained_matrices(source))
    calibrate_rows(restored, rows, seed, list(methods.values()))
    lines = [line for method in methods.values() for line in method.plan()]
    return replace(restored, plan=(*restored.plan, *lines))


def export(restored: Restored, split: Split, tokenizer, output: str, limits: config.Export) -> dict[str, Any]:
    """Write the artifact, verify it against the simulation, and put it in place.

    A refused artifact is marked unverified and never replaces one that was there: it goes to `output`.unverified then.
    """
    target = Path(output)
    if target.exists() and not artifact.is_artifact(target):
        raise UserError(f"{target}: exists and is no artifact; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        new, plain = Path(scratch, "new"), Path(scratch, "fp32")
        write_unverified(restored, tokenizer, split, new, limits)
        write_unverified(restore_folder(restored.fp32, restored.data), tokenizer, split, plain)
        verification = verify(restored, split, new, plain, limits)
        manifest = artifact.read_manifest(new)
        manifest["verification"] = verification
        if verification["passed"] and not limits.plain:
            artifact.drop_plain(new, manifest)
        files.write_json(new / artifact.MANIFEST, manifest)
        if not verification["passed"] and target.exists():
            target = target.with_name(f"{target.name}.unverified")
        with files.replacing_folder(target) as final:
            shutil.copytree(new, final, dirs_exist_ok=True)
    return {**manifest, "folder": str(target)}


def write_unverified(
    restored: Restored, tokenizer, split: Split, folder: Path, settings: config.Export = DEFAULTS
) -> None:
    """An artifact folder, not yet verified; for engine `native` with the native program beside the plain one."""
    _check_choices(restored, settings)
    folder.mkdir()
    stem = folder / Path(artifact.MODEL).stem
    if restored.quant is None:
        program.save_fp32(restored.model, stem)
    elif settings.target == "tensorrt":
        qdq.save(restored.model, stem)
        tensorrt.collect_shapes(folder, [len(ids) for ids in split.input_ids], restored.data.max_length)
    else:
        program.save_int8(restored.model, stem, rewrites=settings.rewrites)
    for name in TOKENIZER_FILES:
        if (restored.vocabulary / name).is_file():
            shutil.copyfile(restored.vocabulary / name, folder / name)
    inputs, output = program.names(stem)
    files.write_text(folder / artifact.SERVING_CONF, serving_conf(inputs, output, len(restored.labels)))
    shape = restored.model.config
    entry: dict[str, Any] = {}
    if settings.engine == "native":
        entry[artifact.NATIVE] = write_native(restored.model, folder, restored.labels)
    fields = {
        "ernie_kqat": __version__,
        "paddle": paddle.__version__,
        "engine": "fp32" if restored.quant is None else f"{settings.target}_int8",
        "task": restored.task.manifest(),
        "labels": restored.labels,
        "pair": split.pairs is not None,
        "max_length": restored.data.max_length,
        "pad_token_id": restored.pad_token_id,
        "vocab_size": shape.vocab_size,
        "type_vocab_size": shape.type_vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "do_lower_case": getattr(tokenizer, "do_lower_case", True)},
        "inputs": inputs,
        "output": output,
        **entry,
        "quantization": None
        if restored.quant is None
        else {**strict.to_tree(restored.quant), "plan": list(restored.plan)},
        "verification": None,
    }
    artifact.write_manifest(folder, fields, artifact.contents(folder))


def _check_choices(restored: Restored, settings: config.Export) -> None:
    engine, target = settings.engine, settings.target
    for key, value, usual in (("engine", engine, "paddle"), ("target", target, "onednn")):
        if value != usual and restored.quant is None:
            raise UserError(f"Export.{key}: {value}: the model is not quantized; it is for INT8 (Slim.quant)")
    for key, value, usual in (("engine", engine, "paddle"), ("target", target, "onednn")):
        if value != usual and restored.task.per_token:
            raise UserError(
                f"Export.{key}: {value}: it is for answers read from [CLS]; the model's task is {restored.data.task}"
            )
    if engine == "native" and target == "tensorrt":
        raise UserError(
            "Export.engine: native: the native program is for CPUs; with Export.target: tensorrt say paddle"
        )
    if not settings.plain and engine != "native":
        raise UserError("Export.plain: false: leaves no program at all; it needs Export.engine: native")


def write_native(model: paddle.nn.Layer, folder: Path, labels: list[str]) -> dict[str, Any]:
    """The native program in a folder of its own, where Paddle Serving finds it alone. Returns the manifest's entry."""
    try:
        native.build()
        native.load()
    except UserError as error:
        raise UserError(f"Export.engine: native: {error}") from None
    stem = folder / artifact.NATIVE / Path(artifact.MODEL).stem
    native_program.save(model, stem)
    inputs, output = program.names(stem)
    files.write_text(stem.with_name(artifact.SERVING_CONF), serving_conf(inputs, output, len(labels)))
    return {"output": output}


def _split(path: Path, tokenizer, restored: Restored, file: str | None = None, rows: int | None = None) -> Split:
    data = restored.data
    if file is not None and path.is_dir():
        path = path / file
    columns = data.text, data.text_pair, data.label
    return load_eval_split(path, tokenizer, restored.labels, data.max_length, *columns, rows=rows, task=restored.task)


def _train_file(path: Path, restored: Restored) -> Path:
    if path.is_dir():
        for suffix in restored.task.suffixes:
            if (path / f"train{suffix}").is_file():
                return path / f"train{suffix}"
    return path


def serving_conf(inputs: list[str], output: str, classes: int) -> str:
    """Paddle Serving's description of the program: int64 ids of any length in, float32 logits out."""
    feed = "".join(
        f'feed_var {{\n  name: "{name}"\n  alias_name: "{name}"\n  is_lod_tensor: false\n  feed_type: 0\n  shape: -1\n}}\n'
        for name in inputs
    )
    fetch = (
        f'fetch_var {{\n  name: "{output}"\n  alias_name: "logits"\n  is_lod_tensor: false\n  fetch_type: 1\n'
        f"  shape: {classes}\n}}\n"
    )
    return feed + fetch


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """The verification by model: what summary.json keeps of it."""
    metric = found["metric"]
    return {
        "fp32": {
            "model": found["fp32_model"],
            metric: found[f"fp32_{metric}"],
            "latency_ms": found["fp32_latency_ms"],
            "size_bytes": found["fp32_size_bytes"],
        },
        "simulated": {
            metric: found[f"simulated_{metric}"],
            "agreement_with_fp32": found["simulated_agreement_with_fp32"],
        },
        "deployed": {
            metric: found[f"deployed_{metric}"],
            "agreement_with_simulated": found["agreement"],
            "agreement_with_fp32": found["agreement_with_fp32"],
            "rms_over_std": found["rms_over_std"],
            "int8_ops": found["int8_ops"],
            "latency_ms": found["latency_ms"],
            "size_bytes": found["size_bytes"],
            "rows": found["samples"],
            "passed": found["passed"],
        },
        **({"native": found["native"]} if "native" in found else {}),
    }


def describe(manifest: dict[str, Any]) -> list[str]:
    """The verification as a table, and the worst samples if it failed."""
    found = manifest["verification"]
    limits, metric = found["limits"], found["metric"]
    times = {"fp32": found["fp32_latency_ms"], "deployed": found["latency_ms"]}
    where = "" if found["latency_ms"] else ", its operators one by one on the CPU; never run in TensorRT"

    def percent(name: str) -> str:
        return "-" if found[name] is None else f"{found[name]:.2%}"

    def milliseconds(size: int) -> str:
        return "  ".join(
            f"{name} {value[f'batch_{size}']:.2f}" if value else f"{name} -" for name, value in times.items()
        )

    lines = [
        f"verified on {found['samples']} rows of {found['data']}{where}",
        f"  agreement with the simulation  {found['agreement']:.2%}   (at least {limits['min_agreement']:.1%})",
        f"  rms difference / logit std     {found['rms_over_std']:.4f}   (at most {limits['max_rms_over_std']:g})",
        f"  agreement with fp32            {found['agreement_with_fp32']:.2%}",
        f"  {metric:<30} "
        + "  ".join(f"{name} {percent(f'{name}_{metric}')}" for name in ("fp32", "simulated", "deployed")),
        f"  operators run in INT8          {'-' if found['int8_ops'] is None else found['int8_ops']}",
        f"  ms per sentence, batch 1       {milliseconds(1)}",
        f"  ms per sentence, batch 32      {milliseconds(32)}",
        f"  size in MB                     fp32 {found['fp32_size_bytes'] / 1e6:.1f}  deployed {found['size_bytes'] / 1e6:.1f}",
    ]
    if "native" in found:
        lines += _describe_native(found["native"], metric)
    if not artifact.has_plain(manifest):
        lines.append("the plain program was left out (Export.plain: false)")
    if not found["passed"]:
        lines += ["worst samples (largest logit difference):"] + [
            f"  {row['difference']:.4f}  simulated {np.round(row['simulated'], 3).tolist()}  deployed"
            f" {np.round(row['deployed'], 3).tolist()}  {row['text'][:80]!r}"
            for row in found["worst"]
        ]
    return [*lines, f"artifact: {manifest['folder']}"]


def _describe_native(found: dict[str, Any], metric: str) -> list[str]:
    latency, score = found["latency_ms"], found[metric]
    return [
        "native program",
        f"  agreement with the simulation  {found['agreement']:.2%}",
        f"  rms difference / logit std     {found['rms_over_std']:.4f}",
        f"  {metric:<30} {'-' if score is None else format(score, '.2%')}",
        f"  ms per sentence                batch 1 {latency['batch_1']:.2f}  batch 32 {latency['batch_32']:.2f}",
        f"  size in MB                     {found['size_bytes'] / 1e6:.1f}",
    ]
