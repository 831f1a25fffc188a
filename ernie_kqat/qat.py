"""KurtosisQAT: PaddleSlim's QAT with our quantizers in its slots, kurtosis regularization, and the exact exporter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddleslim

from . import config, strict
from .errors import UserError
from .methods.kurtosis import Kurtosis
from .quantizers import attach, attention, embedding

GRANULARITY = {"channel_wise_abs_max": "channel", "abs_max": "tensor"}
IGNORED = {"onnx_format", "window_size", "fuse_conv_bn", "dtype"}  # PaddleSlim's keys that mean nothing here


class _NoOutputScales:
    """PaddleSlim wraps layers to record output ranges, which training never uses and which hide `pooler.dense.weight`."""

    def apply(self, model):
        return model


class KurtosisQAT(paddleslim.QAT):
    """A drop-in for `paddleslim.QAT` for people with their own training loop.

    config: PaddleSlim's keys (`weight_bits`, `weight_quantize_type`, `activation_bits`, `moving_rate`, …), `weight_range`
    and `activation_range` (Slim.quant's `range` keys), `layers`, `attention` and `embedding` (Slim.quant's), and a
    `kurtosis` section (Slim.kurtosis). pretrained: the original weights for kurtosis targets, as {parameter name: array},
    a model, or a folder or name; default: the model's at `quantize`.
    Raises UserError for a key or value that cannot be deployed exactly.
    """

    def __init__(self, config: dict | None = None, pretrained: Any = None):
        quant, options = _parse(dict(config or {}))
        self._prepare(quant, options, pretrained)

    @classmethod
    def from_options(cls, quant: config.Quant, kurtosis: Kurtosis | None = None, pretrained: Any = None) -> KurtosisQAT:
        """Built from the YAML config's dataclasses; the trainer's way."""
        self = cls.__new__(cls)
        self._prepare(quant, kurtosis, pretrained)
        return self

    def _prepare(self, quant: config.Quant, kurtosis: Kurtosis | None, pretrained: Any) -> None:
        # Identity in both slots: `quantize` fills them by the plan, which PaddleSlim's zero-argument classes cannot know.
        super().__init__(
            {"quantizable_layer_type": ["Linear"]}, weight_quantize=paddle.nn.Identity, act_quantize=paddle.nn.Identity
        )
        self.imperative_qat._quantize_outputs = _NoOutputScales()
        self.quant, self.kurtosis, self.pretrained = quant, kurtosis, pretrained
        self.plan: list[attach.LayerPlan] = []
        self.tables: list[embedding.TablePlan] = []

    def quantize(self, model: paddle.nn.Layer, inplace: bool = True, begin: bool = True) -> paddle.nn.Layer:
        """Quantize every Linear by the plan (`self.plan`), embeddings by theirs (`self.tables`); with a kurtosis section,
        fix its targets.

        begin: False where a stored state of the quantizers is loaded next (`attach.load_quantizer_buffers`).
        """
        model = model if inplace else copy.deepcopy(model)
        self.plan = attach.make_plan(model, self.quant)
        if self.quant.embedding is not None:
            self.tables = embedding.make_plan(model, self.quant.embedding)
        attach.mark_skipped(model, self.plan)
        super().quantize(model)
        attach.fill_slots(model, self.plan, begin)
        if self.quant.attention is not None:
            attention.fill(model, self.quant.attention)
        embedding.fill(model, self.tables, begin)
        if self.kurtosis is not None:
            self.kurtosis.attach(model, lambda: _matrices(self.pretrained, model))
        return model

    def described(self) -> list[str]:
        """The plans, a line for each layer."""
        products = [] if self.quant.attention is None else [attention.described(self.quant.attention)]
        return [*(str(entry) for entry in (*self.plan, *self.tables)), *products]

    def calibration_batches(self) -> int:
        """How many forwards in training mode until every activation range that is set once is set."""
        of_attention = self.quant.attention.calibration_batches if self.quant.attention else 0
        return max([of_attention, *(entry.activation.calibration_batches for entry in self.plan if entry.activation)])

    def regularization(self) -> paddle.Tensor:
        """The weighted kurtosis term, to be added to the task loss."""
        return self._kurtosis("loss").regularization()

    def decoupled_step(self) -> None:
        """Call after `optimizer.step()`; for `kurtosis: {apply: decoupled}`."""
        self._kurtosis("decoupled").decoupled_step()

    def kurtosis_report(self) -> dict[str, dict[str, float]]:
        """{layer: {kurtosis, target}} now."""
        return self._kurtosis(None).report()

    def save_quantized_model(self, model: paddle.nn.Layer, path: str, input_spec: list | None = None) -> None:
        """Write `path`.pdmodel and .pdiparams: an INT8 program for Paddle Inference that needs only `enable_mkldnn()`.

        It computes what the quantized `model` computes in eval mode. input_spec: as for `paddle.jit.save`; default:
        int64 `input_ids` and `token_type_ids`, [batch, tokens].
        """
        from .export import program

        program.save_int8(model, Path(path), input_spec)

    def _kurtosis(self, apply: str | None) -> Kurtosis:
        if self.kurtosis is None:
            raise UserError("KurtosisQAT: its config has no `kurtosis` section")
        if apply is not None and self.kurtosis.apply != apply:
            raise UserError(f"KurtosisQAT: kurtosis.apply is {self.kurtosis.apply!r}; this call is for {apply!r}")
        return self.kurtosis


def _parse(options: dict) -> tuple[config.Quant, Kurtosis | None]:
    source = "KurtosisQAT config"
    kurtosis = options.pop("kurtosis", None)
    kind = options.pop("weight_quantize_type", "channel_wise_abs_max")
    if kind not in GRANULARITY:
        raise UserError(f"{source}: weight_quantize_type: {kind!r} is not one of {', '.join(GRANULARITY)}")
    kind_of_activation = options.pop("activation_quantize_type", "moving_average_abs_max")
    if kind_of_activation != "moving_average_abs_max":
        raise UserError(f"{source}: activation_quantize_type: {kind_of_activation!r} is not moving_average_abs_max")
    for key in ("weight_preprocess_type", "activation_preprocess_type"):
        if options.pop(key, None) is not None:
            raise UserError(f"{source}: {key}: preprocessing is not part of the deployed program; leave it out")
    unknown = set(options.pop("quantizable_layer_type", ["Linear"])) - {"Linear", "Conv2D"}
    if unknown:
        raise UserError(f"{source}: quantizable_layer_type: {sorted(unknown)} cannot be deployed; allowed: Linear")
    weight = {"granularity": GRANULARITY[kind]}
    activation: dict[str, Any] = {}
    for key, part, name in (
        ("weight_bits", weight, "bits"),
        ("weight_range", weight, "range"),
        ("activation_bits", activation, "bits"),
        ("activation_range", activation, "range"),
        ("moving_rate", activation, "moving_rate"),
    ):
        if key in options:
            part[name] = options.pop(key)
    tree = {"weight": weight, "activation": activation}
    tree |= {key: options.pop(key, None) for key in ("attention", "embedding", "layers")}
    left = set(options) - IGNORED
    if left:
        raise UserError(f"{source}: unknown keys: {', '.join(sorted(left))}")
    quant = strict.build(config.Quant, tree, "quant", source)
    return quant, None if kurtosis is None else strict.build(Kurtosis, kurtosis, "kurtosis", source)


def _matrices(source: Any, model: paddle.nn.Layer) -> Mapping[str, np.ndarray]:
    if callable(source) and not isinstance(source, paddle.nn.Layer):
        return source()
    if isinstance(source, Mapping):
        return source
    if isinstance(source, (str, Path)):
        from .models.loading import pretrained_matrices

        return pretrained_matrices(str(source))
    origin = model if source is None else source
    return {name: parameter.numpy() for name, parameter in origin.named_parameters() if parameter.ndim == 2}
