"""Answers from an artifact folder, by Paddle Inference. Loads nothing of the training side."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Union

import numpy as np
import paddle.inference
from paddle.base import core

from . import artifact, machine, native, shapes, tasks, tensorrt, tuning
from .errors import UserError
from .packed.expand import folder_of
from .tasks.classification import Prediction
from .tokenizer import load_tokenizer

__all__ = ["Prediction", "Predictor", "check_engine", "choose_engine"]

ENGINES = ("onednn_int8", artifact.TENSORRT, "fp32")
CHOICES = ("auto", "native", "paddle")
INPUTS = ("input_ids", "token_type_ids")
KEEP_EVERY_SHAPE = 0  # Paddle's word for a primitive cache without limit; there are few shapes

log = logging.getLogger(__name__)

TokenIds = Union[Sequence[int], np.ndarray]


class Predictor:
    """A model loaded from an artifact folder, or from a packed artifact, which is expanded into the cache once.

    Safe to use from many threads: each call borrows an inference predictor of its own from a pool that grows to the
    number of calls that ever ran at once; they share the weights. A call of more than one row is shared by up to `instances`
    of them, each of which uses `threads` cores. None: as tools/tune.py found best on this machine, else 1.
    `engine`: `native` runs the artifact's native program, `paddle` the plain one, `auto` the native one where it can.
    The attribute of that name says which it is. The program of a TensorRT artifact runs in TensorRT (`auto`), or by `paddle` as
    it is written on the CPU: right and slow, for verification.

    Raises UserError for a folder that is no artifact or was changed, for an artifact whose verification failed or was
    never made (unless `allow_unverified`), and for an engine that this Paddle, this machine or the artifact lacks.
    """

    def __init__(
        self,
        artifact_dir: str | Path,
        threads: int | None = None,
        allow_unverified: bool = False,
        check_hashes: bool = True,
        engine: str = "auto",
        instances: int | None = None,
    ):
        folder = folder_of(artifact_dir)
        for name, number in (("threads", threads), ("instances", instances)):
            if number is not None and number < 1:
                raise UserError(f"{name}: {number} is under 1")
        manifest = artifact.read_manifest(folder, check_hashes)
        tuned = tuning.stored(manifest) if threads is None and instances is None else (1, 1)
        self.instances, self.threads = instances or tuned[0], threads or tuned[1]
        if not allow_unverified:
            artifact.check_verified(folder, manifest)
        check_engine(folder, manifest["engine"])
        self.manifest = manifest
        self.task = tasks.of_manifest(manifest)
        self.labels: list[str] = manifest["labels"]
        self.pair: bool = manifest["pair"]
        self.max_length: int = manifest["max_length"]
        self.tokenizer = load_tokenizer(folder, manifest["tokenizer"]["kind"])
        self.engine = choose_engine(folder, manifest, engine)
        self._template = _load(folder, manifest, self.threads, self.engine)
        self._new_pool()

    def _new_pool(self) -> None:
        self._idle: list[_Engine] = []
        self._lock = threading.Lock()
        # Kept, as its threads keep the native operator's memory; they are started when first needed.
        self._workers = ThreadPoolExecutor(self.instances, "ernie_kqat")

    def clone(self) -> Predictor:
        """A Predictor with inference predictors of its own that share this one's weights."""
        twin = copy.copy(self)
        with self._lock:
            twin._template = self._template.clone()
        twin._new_pool()
        return twin

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None, batch_size: int = 32) -> list[Any]:
        """One answer for each text, in order; `pairs` are the second texts of a model for pairs, the contexts of questions.

        A Prediction (label, score, logits); of other tasks a Value, LabelSet, Entities or Answer (tasks/).
        Texts longer than `max_length` tokens are cut, contexts are not. Raises UserError for what is no text, a text without a
        token (an empty sentence has no label), and pairs that are missing, superfluous or of another number.
        """
        return self.answer(self.encode(texts, pairs), batch_size)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Any]:
        """Token ids of each text, or of each text and its pair, in `windows`. Raises UserError as `predict` does."""
        if self.pair != (pairs is not None):
            raise UserError("the model judges pairs: `pairs` is missing" if self.pair else "the model takes no `pairs`")
        encoded = self.task.encode(self.tokenizer, texts, pairs, self.max_length)
        for index, row in enumerate(encoded):
            if self.task.lacks_text(row):
                where = f"texts[{index}]" + (f" or pairs[{index}]" if self.pair else "")
                raise UserError(f"{where}: no text in it; an empty sentence has no label")
        return list(encoded)

    def answer(self, encoded: Sequence[Any], batch_size: int = 32) -> list[Any]:
        """One answer for each row of `encode`, in order."""
        logits = self.logits([window for row in encoded for window in row.windows], batch_size)
        return list(self.task.answers(logits, encoded, self.labels))

    def logits(self, encoded: Sequence[tuple[TokenIds, TokenIds]], batch_size: int = 32) -> np.ndarray:
        """float32 [rows, classes] for (input_ids, token_type_ids) of each row, in the order given.

        Of a task that judges tokens [tokens of all rows, outputs], one row's after the other's.
        A batch holds at most `batch_size` rows, for the plain program rounded down to a power of two. Raises UserError,
        before anything runs, for ids that the model has no embedding for: they would crash the process.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is under 1")
        rows = [self._checked(index, row) for index, row in enumerate(encoded)]
        places = shapes.starts([row.shape[1] for row in rows], self.task.per_token)
        logits = np.zeros((places[-1], len(self.labels)), np.float32)
        # Longest first: least padding, and the largest batch meets an empty allocator, whose blocks the others reuse.
        order = sorted(range(len(rows)), key=lambda index: -rows[index].shape[1])
        size = batch_size if self.engine == "native" else 1 << (batch_size.bit_length() - 1)
        if self.engine == "tensorrt":
            size = min(size, tensorrt.ROWS)
        if self.instances == 1 or len(rows) < 2:
            with self._engine() as engine:
                for start in range(0, len(rows), size):
                    self._answer(engine, rows, order[start : start + size], places, logits)
            return logits
        size = min(size, -(-len(rows) // self.instances))
        parts = [order[start : start + size] for start in range(0, len(rows), size)]
        for _ in self._workers.map(lambda part: self._answer_alone(rows, part, places, logits), parts):
            pass  # what one of them raised is raised here
        return logits

    def _answer(
        self, engine: _Engine, rows: list[np.ndarray], chosen: list[int], places: np.ndarray, logits: np.ndarray
    ) -> None:
        shapes.put(engine.run(self._batch([rows[index] for index in chosen])), chosen, places, logits)

    def _answer_alone(self, rows: list[np.ndarray], chosen: list[int], places: np.ndarray, logits: np.ndarray) -> None:
        with self._engine() as engine:
            self._answer(engine, rows, chosen, places, logits)

    def _checked(self, index: int, row: tuple[TokenIds, TokenIds]) -> np.ndarray:
        """int64 [2, tokens] of one row, or UserError."""
        checked = []
        for name, size, ids in zip(INPUTS, (self.manifest["vocab_size"], self.manifest["type_vocab_size"]), row):
            where = f"row {index}: {name}"
            try:
                values = np.asarray(ids)
            except ValueError:  # nested lists of different lengths
                raise UserError(f"{where}: not a flat list of integers") from None
            if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
                raise UserError(
                    f"{where}: {values.dtype} of shape {list(values.shape)}; a flat list of integers is needed"
                )
            if not 1 <= values.size <= self.max_length:
                raise UserError(f"{where}: {values.size} tokens, not in 1..{self.max_length}")
            low, high = values.min(), values.max()
            if low < 0 or high >= size:
                raise UserError(f"{where}: {low if low < 0 else high} is not in 0..{size - 1}")
            checked.append(values)
        if len(checked[0]) != len(checked[1]):
            raise UserError(f"row {index}: {len(checked[0])} input_ids with {len(checked[1])} token_type_ids")
        return np.stack(checked).astype(np.int64, copy=False)

    def _batch(self, rows: list[np.ndarray]) -> np.ndarray:
        pad = shapes.join if self.engine == "native" else shapes.pad  # it leaves padding out, and any shape is as good
        return pad(rows, self.manifest["pad_token_id"], self.max_length)

    @contextlib.contextmanager
    def _engine(self) -> Iterator[_Engine]:
        # A pool and not one engine a thread: a server that starts a thread for each request would load one each time.
        with self._lock:
            engine = self._idle.pop() if self._idle else _Engine(self._template.clone())
        yield engine
        with self._lock:  # not reached when the block raised: what an engine holds then is unknown, so it is dropped
            self._idle.append(engine)


class _Engine:
    """One of Paddle's inference predictors, used by one thread at a time."""

    def __init__(self, predictor: paddle.inference.Predictor):
        self._predictor = predictor
        self._inputs = [predictor.get_input_handle(name) for name in INPUTS]
        (output,) = predictor.get_output_names()
        self._output = predictor.get_output_handle(output)
        self._largest = 0

    def run(self, batch: np.ndarray) -> np.ndarray:
        """float32 [rows, classes] or [rows, tokens, outputs] of int64 [2, rows, tokens]."""
        tokens = batch[0].size
        if tokens > self._largest:
            # Its blocks would come on top of those of all smaller batches, which it cannot use and they could use its.
            self._predictor.try_shrink_memory()
            self._largest = tokens
        for handle, ids in zip(self._inputs, batch):
            handle.copy_from_cpu(ids)
        self._predictor.run()
        return self._output.copy_to_cpu()


def _load(folder: Path, manifest: dict[str, Any], threads: int, engine: str) -> paddle.inference.Predictor:
    output = manifest["output"]
    if engine == "native":
        native.load()
        folder, output = folder / artifact.NATIVE, manifest[artifact.NATIVE]["output"]
    config = paddle.inference.Config(str(folder / artifact.MODEL), str(folder / artifact.PARAMS))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(threads)
    if engine == "tensorrt":
        tensorrt.configure(config, folder)
    elif manifest["engine"] == artifact.TENSORRT:
        tensorrt.configure_reference(config)
    else:
        config.disable_gpu()
        config.enable_mkldnn()  # for fp32 too: the fair baseline
        config.set_mkldnn_cache_capacity(KEEP_EVERY_SHAPE)
        config.enable_memory_optim()
    predictor = paddle.inference.create_predictor(config)
    for what, needed, found in (
        ("inputs", INPUTS, predictor.get_input_names()),
        ("output", [output], predictor.get_output_names()),
    ):
        if sorted(needed) != sorted(found):
            raise UserError(f"{folder}: the program has {what} {found}; {list(needed)} are needed")
    return predictor


def choose_engine(folder: Path, manifest: dict[str, Any], engine: str) -> str:
    """`native`, `paddle` or `tensorrt`, of what `engine` allows: `auto`, `native` or `paddle`."""
    if engine not in CHOICES:
        raise UserError(f"engine: {engine!r} is not one of {', '.join(CHOICES)}")
    if not artifact.has_plain(manifest):
        return _only_native(folder, engine)
    if engine == "paddle":
        return engine
    if not artifact.is_native(manifest):
        if engine == "native":
            raise UserError(f"{folder}: holds no native program: export it with -o Export.engine=native")
        if manifest["engine"] == artifact.TENSORRT:
            reason = tensorrt.why_not()
            if reason:
                raise UserError(f"{folder}: a program for TensorRT: {reason}")
            return "tensorrt"
        return "paddle"
    reason = native.why_not()
    if reason and engine == "native":
        raise UserError(f"engine: native: {reason}")
    if reason:
        log.warning("%s: the plain program runs, which is slower: %s", folder, reason)
    return "paddle" if reason else "native"


def _only_native(folder: Path, engine: str) -> str:
    reason = "engine: paddle" if engine == "paddle" else native.why_not()
    if reason:
        raise UserError(
            f"{folder}: holds the native program alone (it was exported with Export.plain: false): {reason}"
        )
    return "native"


def check_engine(folder: Path, engine: str) -> None:
    if engine not in ENGINES:
        raise UserError(f"{folder}: engine {engine!r} is not one of {', '.join(ENGINES)}")
    if engine != artifact.TENSORRT and not core.is_compiled_with_mkldnn():
        raise UserError(f"{folder}: needs a Paddle with oneDNN, and this one has none (tools/doctor.py says more)")
    sets = machine.machine()["instruction_sets"]
    if engine == "onednn_int8" and sets and not machine.exact_int8(sets):
        log.warning("%s: no VNNI in this CPU: answers may differ from the verified ones (tools/doctor.py)", folder)
