"""Each rewrite of the deployed program alone, and all of them, against none: the same integers, the same logits."""

from dataclasses import fields, replace

import numpy as np
import paddle
import pytest
from artifacts import random_rows
from native_core import batch_of
from test_integers import loaded
from test_program import calibrated, run
from tiny_ernie import make_tiny_ernie

from ernie_kqat import KurtosisQAT, artifact, config
from ernie_kqat.export import program, rewrites
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.packed import parameters

NAMES = [item.name for item in fields(config.Rewrites)]
NONE = config.Rewrites(**dict.fromkeys(NAMES, False))
EACH = {**{name: replace(NONE, **{name: True}) for name in NAMES}, "all": rewrites.ALL}
LSQ_PLUS = {"quantizer": "lsq", "offset": True, "calibration_batches": 1}
OPTIONS = {
    "plain": {},
    "low bits": {"weight_bits": 4, "activation_bits": 4},
    "floats before and after GELU": {"layers": [["layers.0.linear1|layers.1.linear2|pooler", "skip"]]},
    "offsets": {"layers": [[".", {"activation": LSQ_PLUS}]]},
}
SHAPES = {"task type": {"use_task_id": True, "task_id": 1}, "relu": {"hidden_act": "relu"}}


def rows_of(model):
    return batch_of(random_rows(24, model.config.vocab_size, seed=2))


def quantized(folder, options, shape):
    model = load_classifier(str(make_tiny_ernie(folder, **shape)), 2)
    KurtosisQAT(options).quantize(model)
    model.eval()
    return calibrated(model, *map(paddle.to_tensor, rows_of(model)))


@pytest.mark.parametrize("case", [*OPTIONS, *SHAPES])
def test_the_program_computes_the_same(tmp_path, case):
    model = quantized(tmp_path / "m", OPTIONS.get(case, {}), SHAPES.get(case, {}))
    program.save_int8(model, tmp_path / "none" / "m", rewrites=NONE)
    expected = run(tmp_path / "none" / "m", *rows_of(model))
    for name, chosen in EACH.items() if case == "plain" else [("all", rewrites.ALL)]:
        program.save_int8(model, tmp_path / name / "m", rewrites=chosen)
        found = run(tmp_path / name / "m", *rows_of(model))
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
        assert integers(tmp_path / name) == integers(tmp_path / "none")


def integers(folder):
    held = parameters.read((folder / "m.pdiparams").read_bytes())
    return sorted(one.data for one in held if one.type == parameters.INT8)


@pytest.mark.parametrize("name", ["first_token", "positions"])
@pytest.mark.parametrize("shape", [{}, {"use_task_id": True, "task_id": 2}])
def test_the_fp32_model_computes_the_same(tmp_path, name, shape):
    model = load_classifier(str(make_tiny_ernie(tmp_path / "m", layers=3, **shape)), 2)
    model.eval()
    inputs = [paddle.to_tensor(ids) for ids in rows_of(model)]
    with paddle.no_grad():
        expected = model(*inputs).numpy()
        rewrites.rewrite_model(model, EACH[name])
        np.testing.assert_allclose(model(*inputs).numpy(), expected, atol=1e-5)
        tokens = 1 if name == "first_token" else inputs[0].shape[1]
        assert model.ernie(*inputs)[0].shape[1] == tokens


@pytest.mark.parametrize(
    ("name", "kind", "without", "with_it"),
    [
        ("activations", "quantize", 10, 7),  # of two layers' GELU and the pooler's tanh
        ("context", "transpose2", 2, 0),
        ("context", "reshape2", 2, 0),
        ("positions", "cumsum", 1, 0),
    ],
)
def test_what_a_rewrite_leaves_out_is_gone_when_the_program_is_loaded(tmp_path, name, kind, without, with_it):
    model = quantized(tmp_path / "m", {}, {})
    counts = []
    for chosen in (NONE, EACH[name]):
        folder = tmp_path / str(chosen == NONE)
        program.save_int8(model, folder / artifact.MODEL.partition(".")[0], rewrites=chosen)
        counts.append(sum(op.type == kind for op in loaded(folder, folder)))
    assert counts == [without, with_it]


def test_a_sentence_longer_than_the_table_of_positions_is_refused(tmp_path):
    model = quantized(tmp_path / "m", {}, {})
    program.save_int8(model, tmp_path / "a")
    ids = np.full((1, 129), 5)
    with pytest.raises(ValueError, match="129"):
        run(tmp_path / "a", ids, np.zeros_like(ids))
