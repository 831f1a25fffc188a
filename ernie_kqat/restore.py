"""Load what a run or a model folder left behind, ready to evaluate or export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import paddle

from . import run_folder
from .config import Data, Quant
from .errors import UserError
from .models import loading
from .models.folder import labels_of
from .qat import KurtosisQAT
from .quantizers.attach import load_quantizer_buffers


@dataclass(frozen=True)
class Restored:
    """A model in eval mode and what goes with it. `quant` is None for an fp32 model."""

    model: paddle.nn.Layer
    vocabulary: Path
    labels: list[str]
    data: Data
    quant: Quant | None
    fp32: str  # name or folder of the fp32 model that it is to be compared with
    plan: tuple[str, ...] = ()  # a line for each Linear

    def quantized(self, quant: Quant) -> Restored:
        """The same model with quantizers in it, in place; their activation ranges are still to be set."""
        qat = KurtosisQAT.from_options(quant)
        qat.quantize(self.model)
        self.model.eval()
        return replace(self, quant=quant, plan=tuple(str(entry) for entry in qat.plan))

    @property
    def pad_token_id(self) -> int:
        """Id that pads short rows."""
        return self.model.ernie.pad_token_id


def restore_run(run: str | Path, fp32: str | None = None) -> Restored:
    """The best model of a run, with its quantizers.

    Its fp32 reference is `fp32`, or else the model it was trained from if that had a classifier for these labels, or else
    its own weights without quantizers.
    """
    settings = run_folder.read_settings(run)
    best = Path(run, run_folder.BEST)
    if not best.is_dir():
        raise UserError(f"{run}: it has no {run_folder.BEST}/ yet: the run stopped before its first evaluation")
    restored = restore_folder(best, settings.Data)
    if settings.Slim.quant is not None:
        restored = restored.quantized(settings.Slim.quant)
        for method in settings.Slim.methods.values():
            method.prepare(restored.model)
        restored.model.eval()
        load_quantizer_buffers(restored.model, run_folder.read_quantizers(best))
    start = settings.Model.name_or_path
    if fp32 is None:
        fp32 = start if _is_classifier(Path(start), restored.labels) else str(best)
    return replace(restored, fp32=fp32)


def restore_folder(folder: str | Path, data: Data | None = None) -> Restored:
    """A PaddleNLP model folder with a trained classifier, in fp32."""
    labels = labels_of(Path(folder))
    model = loading.load_classifier(str(folder), len(labels))
    if model.new_head:
        raise UserError(f"{folder}: an encoder without a classifier; fine-tune it first (tools/train.py)")
    model.eval()
    return Restored(model, Path(folder), labels, data or Data(), None, str(folder))


def _is_classifier(folder: Path, labels: list[str]) -> bool:
    """Whether a folder holds a model that was fine-tuned for these labels, and not an encoder to begin from."""
    if not folder.is_dir() or labels_of(folder) != labels:
        return False
    return not loading.load_classifier(str(folder), len(labels)).new_head
