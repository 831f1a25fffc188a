"""The adapter to Paddle Serving 0.9.0: the only file that knows it. What replaces Paddle Serving replaces this file.

One `Op` of Paddle Serving's pipeline mode, with `local_predictor`, runs in the process that makes it, as an op process of
Serving's own does; its gateway, channels and process management are not used (docs/decisions/0010 says why).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def _stand_in() -> None:
    """Put empty modules in place of what Serving imports and we must not have or do not want."""
    absent: dict[str, dict[str, Any]] = {
        "paddle_serving_client": {"Client": type("Client", (), {})},  # there is no wheel of it for this Python
        "paddle_serving_server.env_check.run": {"check_env": None},  # imports pytest
        "paddle_serving_server.pipeline.logger": {},  # makes log files in the working folder, with requests in them
    }
    for name, names in absent.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        sys.modules.setdefault(name, module)


_stand_in()
from paddle_serving_app import local_predict  # noqa: E402
from paddle_serving_server.pipeline import Op  # noqa: E402

INPUTS = ("input_ids", "token_type_ids")
# Shapes whose oneDNN primitives are kept. Serving does not pass 0 (no limit) on, and Paddle's own default is 10.
SHAPES_KEPT = 100_000


class PipelineError(RuntimeError):
    """Paddle Serving reported an error; the message is for our log, never for a client."""


class Pipeline:
    """A program of an artifact folder, loaded by Paddle Serving. To be used by one thread.

    `skips_padding`: it takes batches of any shape as well, so padded rows are not computed. `configure` changes Paddle's
    config for an engine that Serving has no settings for, of which `most_rows` are given at once.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int = 1,
        skips_padding: bool = False,
        configure: Callable[[Any], None] | None = None,
        most_rows: int = sys.maxsize,
    ):
        op = Op(name="classifier", concurrency=1)
        with _quiet(), _configured(configure):
            op.init_from_dict(_settings(folder, threads, onednn=configure is None))
            # What Serving's op process does before its loop.
            op.local_predictor = op._local_service_handler.get_client(0)
            op.client = op.init_client(op._client_config, op._server_endpoints)
            op.init_op()
        self._op = op
        self._skips_padding = skips_padding
        self._most_rows = most_rows
        self._largest = 0

    def logits(self, batch: np.ndarray, rows: int) -> np.ndarray:
        """float32 [rows or more, classes] of int64 [2, rows or more, tokens], of which the first `rows` are wanted."""
        if self._skips_padding:
            batch = np.ascontiguousarray(batch[:, :rows])
        starts = range(0, batch.shape[1], self._most_rows)
        parts = [self._logits(np.ascontiguousarray(batch[:, start : start + self._most_rows])) for start in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _logits(self, batch: np.ndarray) -> np.ndarray:
        if batch[0].size > self._largest:
            # As in our Predictor: blocks of a larger batch would come on top of those of all smaller ones.
            self._op.client.predictor.try_shrink_memory()
            self._largest = batch[0].size
        feed, _, _, _ = self._op.preprocess({"front": dict(zip(INPUTS, batch))}, 0, 0)
        fetched, code, message = self._op.process([feed], 0)
        if code:
            raise PipelineError(message)
        answers, _, _ = self._op.postprocess({}, fetched, 0, 0)
        (logits,) = answers.values()
        return logits


@contextlib.contextmanager
def _configured(configure: Callable[[Any], None] | None) -> Iterator[None]:
    """Let `configure` have the last word on the configs of predictors that are created inside."""
    create = local_predict.paddle_infer.create_predictor

    def created(config: Any) -> Any:
        if configure is not None:
            configure(config)
        return create(config)

    local_predict.paddle_infer.create_predictor = created
    try:
        yield
    finally:
        local_predict.paddle_infer.create_predictor = create


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what Serving and Paddle print while they load: hundreds of lines."""
    logging.getLogger("LocalPredictor").setLevel(logging.WARNING)
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream, _ in kept:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _settings(folder: str | Path, threads: int, onednn: bool) -> dict[str, Any]:
    """Serving's config of one op. `use_mkldnn` is all that a program compiled ahead of time needs."""
    local = {
        "model_config": str(folder),
        "client_type": "local_predictor",
        "workdir": "",
        "thread_num": threads,
        "device_type": 0,
        "devices": "",
        "mem_optim": True,
        "ir_optim": True,
        "precision": "fp32",  # of what is not compiled to INT8
        "use_calib": False,
        "use_mkldnn": onednn,
        "mkldnn_cache_capacity": SHAPES_KEPT,
        "mkldnn_op_list": None,
        "mkldnn_bf16_op_list": None,
        "min_subgraph_size": 3,
    }
    # No timeout, retry or batching of Serving's: they start threads, and auto-batching of mixed lengths kills the op.
    return {
        "concurrency": 1,
        "timeout": -1,
        "retry": 1,
        "batch_size": 1,
        "auto_batching_timeout": -1,
        "local_service_conf": local,
    }
