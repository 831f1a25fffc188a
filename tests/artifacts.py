"""Tiny artifact folders, made without the exporter's verification: what the serving side's tests load."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ernie_kqat import KurtosisQAT, artifact, tensorrt
from ernie_kqat.calibration import calibrate
from ernie_kqat.config import Quant
from ernie_kqat.export import program, qdq
from ernie_kqat.export.exporter import serving_conf, write_native
from ernie_kqat.models.loading import load_classifier

MAX_LENGTH = 64
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


def make_artifact(
    folder: Path,
    model_folder: Path,
    engine: str = "onednn_int8",
    quant: Quant | None = None,
    with_native: bool = False,
    **changes,
) -> Path:
    """An artifact of `model_folder`, calibrated on random ids; `changes` go into its manifest."""
    folder.mkdir(parents=True)
    model = load_classifier(str(model_folder), 2)
    stem = folder / Path(artifact.MODEL).stem
    vocab_size = model.config.vocab_size
    if engine == "fp32":
        program.save_fp32(model, stem)
    else:
        qat = KurtosisQAT.from_options(quant or Quant())
        model = qat.quantize(model)
        ids = np.random.default_rng(0).integers(5, vocab_size, (16, 24))
        calibrate(model, [{"input_ids": ids, "token_type_ids": np.zeros_like(ids)}])
        if engine == artifact.TENSORRT:
            qdq.save(model, stem)
            tensorrt.collect_shapes(folder, [10, 14, 15], MAX_LENGTH)
        else:
            qat.save_quantized_model(model, str(stem))
    if with_native:
        changes[artifact.NATIVE] = write_native(model, folder, ["negative", "positive"])
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_folder / name, folder / name)
    inputs, output = program.names(stem)
    (folder / artifact.SERVING_CONF).write_text(serving_conf(inputs, output, 2), encoding="utf-8")
    fields = {
        "engine": engine,
        "labels": ["negative", "positive"],
        "pair": False,
        "max_length": MAX_LENGTH,
        "pad_token_id": 0,
        "vocab_size": vocab_size,
        "type_vocab_size": 2,
        "tokenizer": {"kind": "fast", "do_lower_case": True},
        "inputs": inputs,
        "output": output,
        "verification": {"passed": True},
    }
    artifact.write_manifest(folder, {**fields, **changes}, artifact.contents(folder))
    return folder


def random_rows(
    count: int, vocab_size: int, seed: int = 0, longest: int = MAX_LENGTH
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, token_type_ids) of random lengths; the second half of each row is its second segment."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(1, longest + 1, count):
        ids = rng.integers(1, vocab_size, length).tolist()
        rows.append((ids, [0] * (length - length // 2) + [1] * (length // 2)))
    return rows
