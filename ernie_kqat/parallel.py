"""Several processes that train one model: each computes its share of every batch, and all end up with the same gradient.

Paddle's launcher starts them (`python -m paddle.distributed.launch --nproc_per_node 2 tools/train.py …`): gloo on CPUs, NCCL on
GPUs. In a single process everything here is the identity, and nothing of Paddle's distributed package is touched.

Differs from paddle.DataParallel: gradients are added up once an optimizer step, after all accumulated batches and before any
method looks at them, so that methods which take two gradients, or add their own, need not know of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
import paddle

from .errors import UserError


def size() -> int:
    """How many processes train together."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def rank() -> int:
    """Which of them this one is; 0 writes the run folder."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def is_first() -> bool:
    return rank() == 0


def begin() -> None:
    """Meet the other processes, if there are any."""
    if size() > 1 and not paddle.distributed.is_initialized():
        if not 0 <= rank() < size():
            raise UserError(f"PADDLE_TRAINER_ID: {rank()} is not in 0..{size() - 1}; use paddle.distributed.launch")
        paddle.distributed.init_parallel_env()


def share_of(rows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, int]:
    """This process's rows of a batch, and how many of the `targets` [rows of the split] are theirs. A process that is left
    without a row computes one that counts nothing: all must take part in every exchange."""
    own = rows[rank() :: size()]
    return (own, int(targets[own].sum())) if len(own) else (rows[:1], 0)


def add_up(values: np.ndarray) -> np.ndarray:
    """The sum over the processes of arrays of one shape, float32."""
    if size() == 1:
        return values
    total = paddle.to_tensor(values.astype(np.float32))
    paddle.distributed.all_reduce(total)
    return total.numpy()


def maximum(value: paddle.Tensor) -> paddle.Tensor:
    """The largest of the processes' values."""
    if size() > 1:
        value = value.clone()
        paddle.distributed.all_reduce(value, op=paddle.distributed.ReduceOp.MAX)
    return value


def add_up_gradients(parameters: Iterable[paddle.Tensor], numbers: Sequence[float]) -> list[float]:
    """Make every gradient its sum over the processes, in one exchange; returns the sums of `numbers`, which travel with them."""
    if size() == 1:
        return list(numbers)
    travelling = paddle.to_tensor(list(numbers), "float32")
    add_up_in_place([*(parameter.grad for parameter in parameters if parameter.grad is not None), travelling])
    return travelling.tolist()


@paddle.no_grad()
def add_up_in_place(tensors: Iterable[paddle.Tensor]) -> None:
    """Make every tensor its sum over the processes, in one exchange."""
    tensors = list(tensors)
    if size() == 1 or not tensors:
        return
    flat = paddle.concat([tensor.reshape([-1]) for tensor in tensors])
    paddle.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, paddle.split(flat, [tensor.size for tensor in tensors])):
        tensor.set_value(part.reshape(tensor.shape))


def same_everywhere(model: paddle.nn.Layer) -> None:
    """Give every process the first one's parameters and buffers: processors of different kinds differ in last bits."""
    if size() > 1:
        for value in model.state_dict().values():
            paddle.distributed.broadcast(value, src=0)


def wait() -> None:
    """For all processes to be here."""
    if size() > 1:
        paddle.distributed.barrier()
