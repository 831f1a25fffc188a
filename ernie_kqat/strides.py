"""How Paddle lays out what a transpose or slice gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import paddle

FLAG = "FLAGS_use_stride_kernel"


@contextlib.contextmanager
def dense() -> Iterator[None]:
    """Within it, on a CPU, a transpose or slice is a tensor of its own, as it was before Paddle 2.6.

    Since then it is a view, which the next operator copies element by element. The numbers are the same, a training step is
    slower (docs/results/lowbit.md, "fp32, views").
    """
    before = paddle.get_flags(FLAG)
    if paddle.get_device() == "cpu":
        paddle.set_flags({FLAG: False})
    try:
        yield
    finally:
        paddle.set_flags(before)
