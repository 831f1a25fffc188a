"""PreQuant: quantize first, then fine-tune a few weights of each matrix. Paper: arXiv 2306.00014, sections 3.1 and 3.2.

    w <- Q(w)        trained: the `share` of each matrix with the largest |w - Q(w)|, biases, LayerNorms, and the head

Every matrix of the encoder is put on its grid, whose step never changes again; embeddings are frozen. The head is what stands
after the encoder, pooler and classifier: it is trained whole, with the quantizers of Slim.quant.

Differs from the paper: it keeps the chosen weights in floating point, and deploys them so. Here they go on from the value they
had before, cut to the grid's range, but are rounded to the grid at each forward (straight through), and deploy as one exact
int8 matrix with the others. The largest errors are first those of clipped outliers (`range: mse`), then of weights that lie
half way between two integers, which a small learning rate can move.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import paddle

from ..errors import UserError
from ..quantizers import StraightThrough, WeightQuantizer
from ..quantizers.attach import quantized_linears
from ..strict import number
from . import Method

KEY = "Slim.prequant"
ENCODER, EMBEDDINGS = ".encoder.", ".embeddings."


class FixedStep(WeightQuantizer):
    """Rounds to the grid that `quantizer` has for `weight` now, whatever becomes of the weight."""

    def __init__(self, quantizer: WeightQuantizer, weight: paddle.Tensor):
        super().__init__(quantizer.options, weight)
        self.register_buffer("fixed_step", quantizer.current_step(weight).detach().clone())

    def step(self):
        return self.fixed_step

    def forward(self, weight):
        return StraightThrough.apply(weight, self.fixed_step, self.low, self.high)


@dataclass(frozen=True)
class Frozen:
    """A matrix, what it is on its grid, and where it may differ from that (bool), [in, out]."""

    weight: paddle.Tensor
    on_grid: paddle.Tensor
    chosen: paddle.Tensor


@dataclass
class PreQuant(Method):
    """The positions are a function of the weights that training begins with: nothing else is kept."""

    share: float = number(0.005, 0.0, 1.0, "of the weights of each encoder matrix that is trained")

    frozen: list[Frozen] = field(default_factory=list, init=False, repr=False)
    trained: int = field(default=0, init=False, repr=False)  # parameters, chosen weights among them
    total: int = field(default=0, init=False, repr=False)

    def prepare(self, model):
        for name, layer in _encoder_linears(model).items():
            quantizer = layer._fake_quant_weight
            if not quantizer.nearest:
                raise UserError(
                    f"{KEY}: {name}: quantizer {quantizer.options.quantizer} has no step to hold; say minmax or lsq"
                )
            layer._fake_quant_weight = FixedStep(quantizer, layer.weight)

    def attach(self, model, pretrained):
        layers = _encoder_linears(model)
        if not layers:
            raise UserError(f"{KEY}: needs a quantized encoder; say Slim.quant")
        held = {id(layer.weight) for layer in layers.values()}
        for layer in layers.values():
            self.frozen.append(self._freeze(layer))
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim > 1 and (ENCODER in name or EMBEDDINGS in name)
            if matrix and id(parameter) not in held:
                parameter.stop_gradient = True
            self.total += parameter.size
            self.trained += 0 if matrix else parameter.size
        self.trained += sum(int(one.chosen.sum()) for one in self.frozen)

    def _freeze(self, layer) -> Frozen:
        quantizer, before = layer._fake_quant_weight, layer.weight.numpy()
        on_grid, limit = quantizer(layer.weight).numpy(), quantizer.high * quantizer.step().numpy()
        found = largest(np.abs(before - on_grid), self.share)
        layer.weight.set_value(np.where(found, np.clip(before, -limit, limit), on_grid))
        chosen = paddle.to_tensor(found)
        layer.weight.register_hook(  # before the gradient's norm is clipped
            lambda gradient: paddle.where(chosen, gradient, paddle.zeros_like(gradient))
        )
        return Frozen(layer.weight, paddle.to_tensor(on_grid), chosen)

    @paddle.no_grad()
    def after_step(self):
        for one in self.frozen:  # AdamW's weight decay moved them
            one.weight.set_value(paddle.where(one.chosen, one.weight, one.on_grid))

    def plan(self):
        return [
            f"PreQuant: {self.trained} of {self.total} parameters are trained, {self.share:.2%} of the encoder's matrices"
        ]


def largest(errors: np.ndarray, share: float) -> np.ndarray:
    """Whether each is among the `share` of them that are largest; of equals the first."""
    found = np.zeros(errors.size, bool)
    found[np.argsort(-errors, axis=None, kind="stable")[: round(share * errors.size)]] = True
    return found.reshape(errors.shape)


def _encoder_linears(model: paddle.nn.Layer) -> dict:
    return {name: layer for name, layer in quantized_linears(model).items() if ENCODER in name}
