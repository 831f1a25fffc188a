"""Views off while the package computes on a CPU, and as they were after it."""

import numpy as np
import paddle
import pytest

from ernie_kqat.strides import FLAG, dense


def _is_view():
    source = paddle.zeros([2, 3])
    view = source.transpose([1, 0])
    view.add_(paddle.ones([3, 2]))
    return bool((source.numpy() != 0).any())


@pytest.mark.parametrize("before", [True, False])
def test_no_views_within_and_the_users_choice_after_even_when_it_raises(before):
    kept = paddle.get_flags(FLAG)
    paddle.set_flags({FLAG: before})
    try:
        assert _is_view() == before
        with dense():
            assert not _is_view()
        with pytest.raises(RuntimeError), dense():
            raise RuntimeError
        assert _is_view() == before
    finally:
        paddle.set_flags(kept)


def test_a_training_steps_numbers_are_the_same_without_views():
    def gradient():
        paddle.seed(0)
        states = paddle.randn([2, 5, 8])
        states.stop_gradient = False
        heads = states.reshape([2, 5, 4, 2]).transpose([0, 2, 1, 3])
        scores = paddle.nn.functional.softmax(paddle.matmul(heads, heads, transpose_y=True))
        paddle.matmul(scores, heads).transpose([0, 2, 1, 3]).reshape([2, 5, 8]).square().sum().backward()
        return states.grad.numpy()

    with dense():
        without = gradient()
    np.testing.assert_array_equal(gradient(), without)
