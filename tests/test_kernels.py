"""The library's loops of training give the bits of Paddle's operators."""

import shutil

import numpy as np
import paddle
import pytest
from paddle.base import core

from ernie_kqat import native
from ernie_kqat.quantizers import kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture(scope="module", autouse=True)
def library(native_library):
    assert native.known()
    kernels.built.cache_clear()


def both(monkeypatch, function, *arguments):
    """What Paddle's operators give, and what ours do."""
    found = []
    for which in (False, True):
        monkeypatch.setattr(kernels, "built", lambda which=which: which)
        results = function(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        found.append([result.numpy().view(np.int32) for result in results])
    return found


def values(shape, seed=0):
    """Over six decades, with points of the grid, halves between them, zeros of both signs and what is beyond the range."""
    rng = np.random.default_rng(seed)
    found = (rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 2, shape)).astype(np.float32)
    flat = found.reshape(-1)
    special = np.array([0.0, -0.0, 0.05, -0.05, 0.15, 12.65, -12.75, 12.7, 1e30, -1e30], np.float32)
    flat[: min(len(flat), len(special))] = special[: len(flat)]
    return paddle.to_tensor(found)


SHAPES = [(1, 1), (3, 5), (7, 16), (33, 17), (64, 384)]


@pytest.mark.parametrize("bounds", [(-127, 127), (-128, 127), (-1, 1), (-7, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_grid(monkeypatch, shape, bounds):
    x = values(shape)
    for step in (np.array([0.1]), np.random.default_rng(1).uniform(1e-3, 1, shape[-1])):
        plain, ours = both(monkeypatch, kernels.on_grid, x, paddle.to_tensor(step.astype(np.float32)), *bounds)
        np.testing.assert_array_equal(plain, ours)


def test_on_grid_of_three_dimensions(monkeypatch):
    plain, ours = both(monkeypatch, kernels.on_grid, values((2, 9, 48)), paddle.to_tensor([0.03]), -128, 127)
    np.testing.assert_array_equal(plain, ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_column_peaks(monkeypatch, shape):
    plain, ours = both(monkeypatch, kernels.column_peaks, values(shape))
    np.testing.assert_array_equal(plain, ours)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 48), (5,)])
def test_peak(monkeypatch, shape):
    plain, ours = both(monkeypatch, kernels.peak, values(shape))
    np.testing.assert_array_equal(plain, ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_step(monkeypatch, shape):
    x, grad = values(shape), values(shape, seed=2)
    for step in (np.array([0.1]), np.random.default_rng(1).uniform(1e-3, 1, shape[-1])):
        step = paddle.to_tensor(step.astype(np.float32))
        quantized = kernels.on_grid(x, step, -7, 7)
        arguments = (x, step, quantized, grad, -7, 7)
        for plain, ours in zip(*both(monkeypatch, kernels.learned_step_slopes, *arguments)):
            np.testing.assert_array_equal(plain, ours)


def test_not_a_number_stays_one():
    assert np.isnan(kernels.on_grid(paddle.to_tensor([[np.nan, 1.0]]), paddle.to_tensor([0.1]), -7, 7).numpy()[0, 0])
    assert np.isnan(kernels.column_peaks(paddle.to_tensor([[np.nan, 1.0], [2.0, 3.0]])).numpy()[0])


def test_wrong_arrays_are_refused():
    x = paddle.ones([4, 3])
    for step in (paddle.ones([2]), paddle.ones([3], "float64")):
        with pytest.raises(OSError, match="step: "):
            core.eager._run_custom_op("ernie_kqat_on_grid", x, step, -7.0, 7.0)


def test_a_training_is_the_same_in_every_bit(tmp_path, tiny_ernie, tiny_task, monkeypatch):
    from test_trainer import LSQ, same, settings, train, weights_of

    for name, which in (("plain", False), ("ours", True)):
        monkeypatch.setattr(kernels, "built", lambda which=which: which)
        train(settings(tmp_path, tiny_ernie, tiny_task, name, Slim=LSQ, Train={"max_steps": 6}))
    same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "ours"))
