"""Load what a run or a model folder left behind, ready to evaluate or export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import paddle

from . import run_folder, tasks
from .config import ActivationQuant, Data, Quant, WeightQuant
from .errors import UserError
from .models import loading
from .models.folder import labels_of, task_of
from .qat import KurtosisQAT
from .quantizers.attach import LayerPlan, load_quantizer_buffers, make_plan
from .tasks import Task


@dataclass(frozen=True)
class Restored:
    """A model in eval mode and what goes with it. `quant` is None for an fp32 model."""

    model: paddle.nn.Layer
    vocabulary: Path
    labels: list[str]
    data: Data
    quant: Quant | None
    fp32: str  # name or folder of the fp32 model that it is to be compared with
    plan: tuple[str, ...] = ()  # a line for each Linear, and each Embedding where any is quantized

    def quantized(self, quant: Quant, begin: bool = True) -> Restored:
        """The same model with quantizers in it, in place; their activation ranges are still to be set.

        begin: False where a stored state is loaded next.
        """
        qat = KurtosisQAT.from_options(quant)
        qat.quantize(self.model, begin=begin)
        self.model.eval()
        return replace(self, quant=quant, plan=tuple(qat.described()))

    @property
    def pad_token_id(self) -> int:
        """Id that pads short rows."""
        return self.model.ernie.pad_token_id

    @property
    def task(self) -> Task:
        """What its answers are."""
        return tasks.of_data(self.data)


def restore_run(run: str | Path, fp32: str | None = None) -> Restored:
    """The best model of a run, with its quantizers.

    Its fp32 reference is `fp32`, or else the model it was trained from if that had a classifier for these labels and, where
    the run that made it is around it, for the same data (the first one, where a run began from a quantized run's best model),
    or else its own weights without quantizers.
    """
    settings = run_folder.read_settings(run)
    best = Path(run, run_folder.BEST)
    if not best.is_dir():
        raise UserError(f"{run}: it has no {run_folder.BEST}/ yet: the run stopped before its first evaluation")
    restored = restore_folder(best, settings.Data)
    if settings.Slim.quant is not None:
        restored = restored.quantized(settings.Slim.quant, begin=False)
        for method in settings.Slim.methods.values():
            method.prepare(restored.model)
        restored.model.eval()
        load_quantizer_buffers(restored.model, run_folder.read_quantizers(best))
    if fp32 is None:
        start = _first_start(settings.Model.name_or_path)
        fp32 = start if _is_classifier(Path(start), restored) and _same_data(Path(start), settings.Data) else str(best)
    return replace(restored, fp32=fp32)


def restore_folder(folder: str | Path, data: Data | None = None) -> Restored:
    """A PaddleNLP model folder with a trained head, in fp32; its config.json says for which task, whatever `data` says."""
    labels, task = labels_of(Path(folder)), task_of(Path(folder))
    model = loading.load_classifier(str(folder), len(labels), task=task)
    if model.new_head:
        raise UserError(f"{folder}: an encoder without a classifier; fine-tune it first (tools/train.py)")
    model.eval()
    data = replace(data or Data(), task=task)  # type: ignore[arg-type]
    return Restored(model, Path(folder), labels, data, None, str(folder))


def stored_quantizers(
    source: str, model: paddle.nn.Layer, quant: Quant
) -> tuple[dict[str, np.ndarray] | None, list[str]]:
    """The quantizers that a run left beside its best model `source`, where `quant` plans the very same for `model`.

    `model` has no quantizers yet. Returns None where there are none, or others, and a line for plan.txt that says which.
    """
    folder = Path(source)
    if not (folder / run_folder.QUANTIZERS).is_file():
        return None, []
    before = run_folder.read_settings(folder.parent).Slim.quant if run_folder.is_run(folder.parent) else None
    if before is None:
        return None, [f"quantizers begin anew: {folder} has some, but its run, which says their plan, is not around it"]
    for was, now in zip(make_plan(model, before), make_plan(model, quant)):
        for difference in _differences(was, now):
            return None, [f"quantizers begin anew: {folder} has others ({was.name}: {difference})"]
    for difference in _differing_keys("attention", before.attention, quant.attention):
        return None, [f"quantizers begin anew: {folder} has others ({difference})"]
    if before.embedding != quant.embedding:
        return None, [f"quantizers begin anew: {folder} has others (embedding was {before.embedding})"]
    return run_folder.read_quantizers(folder), [f"quantizers go on as they are in {folder}"]


def _differences(was: LayerPlan, now: LayerPlan) -> Iterator[str]:
    """Keys that differ between two plans of one layer, but for learning rates, which are no part of a quantizer's state."""
    for part in ("weight", "activation"):
        yield from _differing_keys(part, getattr(was, part), getattr(now, part))


def _differing_keys(
    part: str, was: WeightQuant | ActivationQuant | None, now: WeightQuant | ActivationQuant | None
) -> Iterator[str]:
    before, here = ({} if options is None else asdict(options) for options in (was, now))
    for key in {**before, **here}:
        if before.get(key) != here.get(key) and not key.endswith("_lr"):
            yield f"{part}.{key} was {before.get(key)}, is {here.get(key)}"


def _first_start(source: str) -> str:
    """What a chain of quantized runs, each from the best model of the one before, began with."""
    seen = set()
    while (
        source not in seen and Path(source, run_folder.QUANTIZERS).is_file() and run_folder.is_run(Path(source).parent)
    ):
        seen.add(source)
        source = run_folder.read_settings(Path(source).parent).Model.name_or_path
    return source


def _is_classifier(folder: Path, restored: Restored) -> bool:
    """Whether a folder holds a model that was fine-tuned for these labels, and not an encoder to begin from."""
    task, labels = restored.data.task, restored.labels
    if not folder.is_dir() or task_of(folder) != task or labels_of(folder) != labels:
        return False
    return not loading.load_classifier(str(folder), len(labels), task=task).new_head


def _same_data(folder: Path, data: Data) -> bool:
    """Whether the run around a model folder, if any, was on the same data; labels alone (0 and 1, say) may be of another."""
    return not run_folder.is_run(folder.parent) or _place(run_folder.read_settings(folder.parent).Data) == _place(data)


def _place(data: Data) -> str | Path | None:
    return data.name if data.path is None else Path(data.path).resolve()
