"""A program that keeps its matrices as int8 computes the same in every bit, from a quarter of the bytes."""

import numpy as np
import paddle
import pytest
from artifacts import make_artifact, random_rows
from test_packed import quant
from tiny_ernie import make_tiny_ernie

from ernie_kqat import Predictor, artifact
from ernie_kqat.export import integers, program
from ernie_kqat.packed import parameters

QUANTS = {
    "words by row": {"embedding": {}},
    "every table, per tensor": {
        "weight": {"granularity": "tensor"},
        "embedding": {"granularity": "tensor", "tables": [[".", {}]]},
    },
    "low bits": {"weight": {"bits": 4, "range": "mse"}, "embedding": {"bits": 2, "quantizer": "ternary"}},
    "weights only, one in fp32": {"layers": [["linear2", "skip"]]},
}


def steps_as_broadcast(matrix):
    q, step = integers.integers_of(matrix)
    assert q.dtype == np.int8
    np.testing.assert_array_equal(q.astype(np.float32) * step, matrix)
    return step.shape


@pytest.mark.parametrize("share", [(1, 1), (1, 7), (5, 1)])
def test_integers_and_steps_give_every_bit(share):
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (5, 7)).astype(np.float32)
    q[0, :] = q[:, 0] = 127
    step = rng.uniform(1e-3, 1, share).astype(np.float32)
    assert steps_as_broadcast(q * step) == {(1, 1): (1,), (1, 7): (7,), (5, 1): (5, 1)}[share]
    assert integers.integers_of(q * step * np.float32(1.1) + np.float32(1e-4)) is None


@pytest.mark.parametrize("name", QUANTS)
def test_the_same_logits_in_every_bit(tmp_path, tiny_ernie, monkeypatch, name):
    stored = make_artifact(tmp_path / "stored", tiny_ernie, quant=quant(QUANTS[name]))
    monkeypatch.setattr(program, "store_integers", lambda *_: None)
    plain = make_artifact(tmp_path / "plain", tiny_ernie, quant=quant(QUANTS[name]))
    rows = random_rows(60, Predictor(plain).manifest["vocab_size"], seed=3)
    rows += [([0, 5, 0, 6], [0, 1, 0, 1])]  # padding has a row of zeros
    for size in (1, 8):
        found = Predictor(stored).logits(rows, batch_size=size)
        np.testing.assert_array_equal(found, Predictor(plain).logits(rows, batch_size=size))


def test_what_is_quantized_is_one_byte_a_value(tmp_path, tiny_ernie):
    made = make_artifact(tmp_path / "a", tiny_ernie, quant=quant({"embedding": {}, "layers": [["pooler", "skip"]]}))
    held = parameters.read((made / artifact.PARAMS).read_bytes())
    of_type = {kind: [one.shape for one in held if one.type == kind and min(one.shape) > 1] for kind in (5, 21)}
    assert sorted(of_type[21]) == sorted(
        [(32, 32)] * 8 + [(32, 64), (64, 32)] * 2 + [(32, 2), (len_vocabulary(tiny_ernie), 32)]
    )
    assert sorted(shape for shape in of_type[5] if len(shape) == 2) == [(2, 32), (32, 32), (128, 32)]


def len_vocabulary(folder):
    return len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())


def test_weights_are_multiplied_once_when_the_program_is_loaded(tmp_path):
    """What is left of a program after Paddle's passes for loading: no operator that makes weights."""
    folder = make_artifact(tmp_path / "a", make_tiny_ernie(tmp_path / "m"), quant=quant({"embedding": {}}))
    left = loaded(folder, tmp_path)
    assert [op.type for op in left if any(name.endswith(".floats") for name in op.input_arg_names)] == [
        "elementwise_mul"
    ]
    assert [op.type for op in left if op.type == "fc"] == ["fc"] * 14


def loaded(folder, scratch):
    """The operators of a program after Paddle's passes for loading."""
    config = paddle.inference.Config(str(folder / artifact.MODEL), str(folder / artifact.PARAMS))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    config.set_optim_cache_dir(str(scratch))
    config.enable_save_optim_model(True)
    paddle.inference.create_predictor(config)
    with program.static_mode():
        return paddle.static.deserialize_program((scratch / "_optimized.pdmodel").read_bytes()).global_block().ops
