"""The one training loop: fp32, PTQ (no steps) and QAT, with methods added."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from tqdm import tqdm

from . import advice, checkpoint, files, parallel, run_folder
from .calibration import calibrate
from .config import Config
from .data.batching import collate, epoch_batches
from .data.dataset import load_task_data
from .errors import UserError
from .evaluate import logits_of
from .interrupt import Interrupted, StopRequest
from .methods import Method
from .methods.kurtosis import Kurtosis
from .models import loading
from .qat import KurtosisQAT
from .quantizers.attach import QUANTIZER_STATE, load_quantizer_buffers, quantizer_buffers
from .restore import stored_quantizers
from .strides import dense
from .tokenizer import load_tokenizer

NO_DECAY = ("bias", "norm", *QUANTIZER_STATE)


@dataclass
class Progress:
    """Where training is. With the seed, `step` determines data order and dropout."""

    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)  # on dev, at the last evaluation (metrics.py)
    best_scores: dict[str, float] = field(default_factory=dict)  # of best_model/
    best_step: int = -1
    fp32_start: float | None = None  # the task's first metric before quantization, of a start model with a trained head
    seconds: float = 0.0


def train(
    settings: Config,
    resume: bool = False,
    overwrite: bool = False,
    watch: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train by `settings`, leave a run folder, and return its summary.

    watch: is told the step and the dev scores of each evaluation, and may end the run by raising.

    Raises UserError for wrong input, and Interrupted (with a checkpoint written) after Ctrl-C or SIGTERM.
    """
    parallel.begin()
    folder = run_folder.RunFolder(settings.Global.output_dir, settings, resume, overwrite)
    parallel.wait()  # all have looked at the folder before the first one writes
    trainer = Trainer(settings, folder)  # wrong input shows here, before anything of an old run is touched
    folder.open()
    trainer.watch = watch
    return trainer.run(resume)


class Trainer:
    """One run: data, model, quantizers, methods, optimizer."""

    def __init__(self, settings: Config, folder: run_folder.RunFolder):
        self.settings, self.folder = settings, folder
        _set_device(settings.Global.device)
        paddle.seed(settings.Global.seed)
        source = settings.Model.name_or_path
        self.vocabulary = loading.vocabulary_folder(source)
        self.data = load_task_data(settings.Data, load_tokenizer(self.vocabulary), settings.Global.seed)
        self.task = self.data.task
        self.metric = self.task.metric(settings.Train.metric, self.data.labels)
        labels = self.data.labels
        self.model = loading.load_classifier(source, len(labels), settings.Model.dropout, settings.Data.task)
        self.model.config.id2label = dict(enumerate(self.data.labels))
        self.pad_token_id = self.model.ernie.pad_token_id
        self.lengths = [len(row) for row in self.data.train.input_ids]
        self.targets = self.data.train.targets
        self.progress = Progress()
        self.watch: Callable[[int, dict[str, float]], None] | None = None
        self.advised: set[str] = set()
        if not self.model.new_head:
            self.progress.fp32_start = self._scores("fp32 start")[self.task.metrics[0]]
        self.methods: list[Method] = list(settings.Slim.methods.values())
        self.stored: dict[str, np.ndarray] | None = None  # quantizers of the run that this one goes on from
        self.remarks: list[str] = []  # on them, for plan.txt
        self.qat = self._quantize()
        self.steps_per_epoch = math.ceil(len(self._order(0)) / settings.Train.accumulate)
        self.total_steps = self.steps_per_epoch * settings.Train.epochs
        if settings.Train.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.Train.max_steps)
        parallel.same_everywhere(self.model)
        for method in self.methods:
            method.start(self.total_steps, self.steps_per_epoch)
        self.scheduler = paddle.optimizer.lr.LambdaDecay(settings.Train.learning_rate, self._learning_rate_share)
        self.optimizer = self._make_optimizer()

    def run(self, resume: bool) -> dict[str, Any]:
        """Calibrate or restore, train, evaluate, and write the summary."""
        self.visualdl = _visualdl_writer(self.folder.path / "vdl") if self.settings.Global.visualdl else None
        self._say_plan()
        self._advise(advice.of_labels(self.data.train.labels, self.data.dev.labels, self.data.labels))
        if resume:
            self._restore()
        elif self.qat is not None and self.stored is None:
            count = self.qat.calibration_batches()
            order = itertools.islice(itertools.cycle(self._order(0)), count)
            calibrate(self.model, map(self._batch, order), self.methods)  # of whole batches, in every process
            parallel.same_everywhere(self.model)
        if not resume and (self.total_steps == 0 or not self.model.new_head):
            self._evaluate()  # the start is a candidate too: no run returns a model worse on dev than the one it began with
        if self.progress.step < self.total_steps:
            for method in self.methods:
                method.train_rows(self.data.train)
            with StopRequest() as stop:
                self._loop(stop, time.perf_counter() - self.progress.seconds)
        if self.qat is not None:
            rows = np.arange(min(len(self.data.dev), self.settings.Train.eval_batch_size))
            self._advise(
                advice.of_clipping(advice.clipped(self.model, collate(self.data.dev, rows, self.pad_token_id)))
            )
        return self._summary()

    def _advise(self, lines: list[str]) -> None:
        """Say each kind of warning once."""
        for line in lines:
            kind = line.split("(")[0]
            if kind not in self.advised:
                self.advised.add(kind)
                self.folder.line(line)

    def _loop(self, stop: StopRequest, began: float) -> None:
        train, progress = self.settings.Train, self.progress
        eval_steps = train.eval_steps or self.steps_per_epoch
        save_steps = train.save_steps or eval_steps
        first, started = progress.step, time.perf_counter()
        bar = tqdm(total=self.total_steps, initial=first, desc="train", unit="step", disable=None)
        self.model.train()
        for batches in self._remaining_steps():
            row = self._step(batches, stop)
            stopping = row.pop("stopping")
            progress.step += 1
            progress.seconds = time.perf_counter() - began
            last = progress.step == self.total_steps
            if self._is_logged(progress.step):
                self._log(row, (time.perf_counter() - started) / (progress.step - first))
            bar.update()
            if last or progress.step % eval_steps == 0:
                self._evaluate()
            if last or stopping or progress.step % save_steps == 0:
                self._save()
            if stopping and not last:
                bar.close()
                self.folder.line(f"stopped at step {progress.step}/{self.total_steps}; --resume continues")
                raise Interrupted
        bar.close()

    @dense()
    def _step(self, batches: list[np.ndarray], stop: StopRequest | None = None) -> dict[str, Any]:
        """One optimizer step over the accumulated batches' rows; returns what to log, and `stopping`: whether any process
        was asked to stop."""
        learning_rate = self.optimizer.get_lr()
        task_weight = math.prod(method.task_weight() for method in self.methods)
        total = max(1, sum(int(self.targets[rows].sum()) for rows in batches))

        def gradients() -> dict[str, float]:
            paddle.seed(self._step_seed())  # a method that asks twice meets the same dropout
            self.optimizer.clear_grad()
            sums: dict[str, float] = {}
            for rows in batches:
                own, targets = parallel.share_of(rows, self.targets)
                share = targets / total
                batch = self._batch(own)
                logits = self.model(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
                losses = {"loss": task_weight * self.task.loss(logits, paddle.to_tensor(batch["labels"]))}
                for method in self.methods:
                    losses.update(method.loss_terms(batch, logits))
                (sum(losses.values()) * share).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * share
            sums["stopping"] = float(stop is not None and stop.requested)
            return dict(zip(sums, parallel.add_up_gradients(self.model.parameters(), list(sums.values()))))

        for method in self.methods:
            gradients = method.wrap(gradients)
        row: dict[str, Any] = gradients()
        if not all(math.isfinite(value) for value in row.values()):
            raise UserError(
                f"loss is not finite at step {self.progress.step + 1}: {row}; lower Train.learning_rate (now"
                f" {learning_rate:.3g}) or look at the data; the best model so far and the last checkpoint are kept"
            )
        if self._is_logged(self.progress.step + 1):
            for method in self.methods:
                row.update(method.figures())
        self.optimizer.step()
        self.scheduler.step()
        for method in self.methods:
            method.after_step()
        row.update(learning_rate=learning_rate, rows=sum(map(len, batches)))
        return row

    def _is_logged(self, step: int) -> bool:
        return step == self.total_steps or step % self.settings.Global.log_every == 0

    def _step_seed(self) -> int:
        # Dropout is a function of (seed, step), so that a resumed run needs no generator state.
        own = [parallel.rank()] if parallel.size() > 1 else []
        sequence = np.random.SeedSequence([self.settings.Global.seed, self.progress.step, *own])
        return int(sequence.generate_state(1)[0] >> 1)

    def _order(self, epoch: int) -> list[np.ndarray]:
        rows = self.settings.Train.batch_size * parallel.size()
        return epoch_batches(self.lengths, rows, self.settings.Global.seed, epoch)

    def _batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {**collate(self.data.train, rows, self.pad_token_id), "rows": rows}

    def _remaining_steps(self) -> Iterator[list[np.ndarray]]:
        accumulate = self.settings.Train.accumulate
        while self.progress.step < self.total_steps:
            epoch, position = divmod(self.progress.step, self.steps_per_epoch)
            order = self._order(epoch)
            for start in range(position * accumulate, len(order), accumulate):
                yield order[start : start + accumulate]
                if self.progress.step == self.total_steps:
                    return

    def _learning_rate_share(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        warmup = round(self.settings.Train.warmup * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))

    def _make_optimizer(self) -> paddle.optimizer.Optimizer:
        train = self.settings.Train
        decayed = {p.name for name, p in self.model.named_parameters() if not any(part in name for part in NO_DECAY)}
        parameters = [parameter for parameter in self.model.parameters() if not parameter.stop_gradient]
        optimizer = paddle.optimizer.AdamW(
            learning_rate=self.scheduler,
            parameters=parameters,
            weight_decay=train.weight_decay,
            apply_decay_param_fun=lambda name: name in decayed,
            grad_clip=paddle.nn.ClipGradByGlobalNorm(train.max_grad_norm) if train.max_grad_norm else None,
        )
        # AdamW makes a parameter's moments at its first gradient in this process, which SQuAT's turns put off: a checkpoint in
        # between would lose those it was itself resumed from.
        optimizer.step()  # of no gradients: it moves nothing, and makes what the next call needs
        optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
        return optimizer

    def _quantize(self) -> KurtosisQAT | None:
        """Quantize, and attach every method; kurtosis belongs to KurtosisQAT where there is one."""
        source = self.settings.Model.pretrained or self.settings.Model.name_or_path

        def pretrained():
            return loading.pretrained_matrices(source)

        kurtosis = next((method for method in self.methods if isinstance(method, Kurtosis)), None)
        qat = None
        if self.settings.Slim.quant is not None:
            quant = self.settings.Slim.quant
            qat = KurtosisQAT.from_options(quant, kurtosis, pretrained)
            if not self.model.new_head:
                start = self.settings.Model.name_or_path
                self.stored, self.remarks = stored_quantizers(start, self.model, quant)
            qat.quantize(self.model, begin=self.stored is None)
        for method in self.methods:
            method.prepare(self.model)
        if self.stored is not None:
            load_quantizer_buffers(self.model, self.stored)
        for method in self.methods:
            if method is not kurtosis or qat is None:
                method.attach(self.model, pretrained)
        return qat

    def _say_plan(self) -> None:
        data = self.data
        lines = [
            f"{len(data.train)} train rows, {len(data.dev)} dev rows, labels: {', '.join(data.labels)}",
            f"cut to Data.max_length {self.settings.Data.max_length}: {data.train.truncated} train,"
            f" {data.dev.truncated} dev rows",
            f"{self.total_steps} steps ({self.steps_per_epoch} an epoch)",
        ]
        lines += self.qat.described() if self.qat else ["fp32: nothing is quantized"]
        lines += self.remarks
        for method in self.methods:
            lines += method.plan()
        if parallel.is_first():
            files.write_text(self.folder.path / "plan.txt", "\n".join(lines) + "\n")
        for line in lines:
            self.folder.line(line)

    def _log(self, row: dict[str, Any], seconds_per_step: float) -> None:
        step = self.progress.step
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        scalars = {k: v for k, v in row.items() if isinstance(v, float) and k != "learning_rate"}
        left = int(seconds_per_step * (self.total_steps - step))
        self.folder.line(
            f"epoch: [{epoch + 1}/{math.ceil(self.total_steps / self.steps_per_epoch)}], "
            f"iter: {position + 1}/{self.steps_per_epoch}, lr: {row['learning_rate']:.3g}, "
            + ", ".join(f"{name}: {value:.4g}" for name, value in scalars.items())
            + f", ips: {row['rows'] / seconds_per_step:.1f} samples/s, eta: {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )
        self.folder.metric({"step": step, **row})
        self._advise(advice.of_losses(row))
        if self.visualdl:
            for name, value in scalars.items():
                self.visualdl.add_scalar(f"TRAIN/{name}", value, step)

    def _scores(self, what: str) -> dict[str, float]:
        batch_size = self.settings.Train.eval_batch_size
        logits = logits_of(self.model, self.data.dev, self.pad_token_id, batch_size, what, shared=True)
        return self.task.scores(logits, self.data.dev, self.data.labels)

    def _evaluate(self) -> None:
        """Dev scores; best_model/ is written when the best is beaten, or always (Train.select, Train.metric)."""
        progress, metric = self.progress, self.metric
        progress.scores = self._scores("evaluate")
        said = ", ".join(f"{name}: {value:.4f}" for name, value in progress.scores.items())
        self.folder.line(f"[EVAL] step: {progress.step}, {said}")
        self.folder.metric(
            {"step": progress.step, **{f"eval_{name}": value for name, value in progress.scores.items()}}
        )
        if self.visualdl:
            for name, value in progress.scores.items():
                self.visualdl.add_scalar(f"EVAL/{name}", value, progress.step)
        beaten = not progress.best_scores or progress.scores[metric] > progress.best_scores[metric]
        if self.settings.Train.select == "last" or beaten:
            progress.best_scores, progress.best_step = progress.scores, progress.step
            self._keep()
        if self.watch is not None:
            self.watch(progress.step, progress.scores)

    def _keep(self) -> None:
        """Write best_model/."""
        if parallel.is_first():
            with files.replacing_folder(self.folder.best) as new:
                loading.save_classifier(self.model, self.vocabulary, new, self.data.labels, QUANTIZER_STATE)
                if self.qat is not None:
                    run_folder.write_quantizers(new, quantizer_buffers(self.model))

    def _save(self) -> None:
        state = {
            "progress": dataclasses.asdict(self.progress),
            "methods": {name: method.state() for name, method in self.settings.Slim.methods.items()},
        }
        keep = self.settings.Train.keep
        if parallel.is_first():
            checkpoint.save(self.folder.checkpoints, self.progress.step, self.model, self.optimizer, state, keep)
        parallel.wait()  # nobody is told that the run ended, or stopped, before its checkpoint is there

    def _restore(self) -> None:
        state, remarks = checkpoint.load(self.folder.checkpoints, self.model, self.optimizer)
        for remark in remarks:
            self.folder.line(f"warning: {remark}; the one before it is taken")
        if set(state["progress"]) != {entry.name for entry in dataclasses.fields(Progress)}:
            raise UserError(f"{self.folder.checkpoints}: of another version; train again with --overwrite")
        self.progress = Progress(**state["progress"])
        for name, method in self.settings.Slim.methods.items():
            method.load_state(state["methods"][name])
        self.folder.rewind_metrics(self.progress.step)
        self.folder.line(f"resumed at step {self.progress.step}/{self.total_steps}")

    def _summary(self) -> dict[str, Any]:
        progress, first = self.progress, self.task.metrics[0]
        summary = {
            first: progress.scores[first],
            f"best_{first}": progress.best_scores[first],
            "scores": progress.scores,
            "best_scores": progress.best_scores,
            "best_step": progress.best_step,
            f"fp32_start_{first}": progress.fp32_start,
            "steps": progress.step,
            "train_rows": len(self.data.train),
            "dev_rows": len(self.data.dev),
            "seed": self.settings.Global.seed,
            "seconds": round(progress.seconds, 1),
        }
        if parallel.is_first():
            for method in self.methods:
                if isinstance(method, Kurtosis):
                    files.write_json(self.folder.path / "kurtosis.json", method.report())
            files.write_json(self.folder.path / run_folder.SUMMARY, summary)
        self.folder.line(
            f"{self.settings.Train.select} dev {self.metric}"
            f" {progress.best_scores[self.metric]:.4f} at step {progress.best_step}: {self.folder.best}"
        )
        return summary


def _set_device(device: str) -> None:
    if device == "gpu" and not paddle.device.is_compiled_with_cuda():
        raise UserError(
            "Global.device: gpu: this paddlepaddle was built without CUDA; install paddlepaddle-gpu or use cpu"
        )
    paddle.set_device(device)


def _visualdl_writer(folder):
    from visualdl import LogWriter

    return LogWriter(str(folder))
