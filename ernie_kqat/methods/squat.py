"""SQuAT: sharpness- and quantization-aware training. Paper: arXiv 2210.07171, equations 3 to 7 and algorithm 1.

Two steps take turns. A sharpness step moves the weights, with all quantization steps frozen, by the gradient where the loss is
worst near the quantized weights (sharpness-aware minimization, arXiv 2010.01412):

    g = dL/dQ(w)      e = rho g / (|g| + 1e-12)      w <- by dL/dQ(w) at Q(w) + e, straight through

A step-size step moves the quantization steps only, by their ordinary gradient (LSQ's).

Differs from the paper: both passes of a sharpness step meet the same dropout, so that what the loss rises by is the
perturbation's doing; `perturb: latent` moves w itself before it is rounded, to compare; the norm can be each layer's own.
Only quantized weights are perturbed. With rho 0 and no turns it is plain LSQ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import paddle

from .. import parallel
from ..errors import UserError
from ..quantizers.attach import is_quantizer_state, quantized_linears
from ..strict import number, option
from . import Gradients, Method

KEY = "Slim.squat"
SMALLEST = 1e-12  # added to norms


class Perturbation:
    """Adds to the quantized weights of a model, or to its latent ones, without leaving a trace.

    It hooks the weight quantizers of `model`, which do what they always did outside of `recorded` and `applied`, until
    `remove`.
    """

    def __init__(self, model: paddle.nn.Layer, latent: bool = False):
        self.layers = quantized_linears(model)
        self.latent = latent
        self._gradients: dict[str, paddle.Tensor] | None = None
        self._added: dict[str, paddle.Tensor] = {}
        self._hooks = [
            layer._fake_quant_weight.register_forward_post_hook(self._hook(name)) for name, layer in self.layers.items()
        ]

    def remove(self) -> None:
        """Take the hooks out of the model again."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable:
        def at_quantized(quantizer, inputs, quantized):
            if self._gradients is not None and not quantized.stop_gradient:
                quantized.register_hook(record)
            return quantized + self._added[name] if name in self._added else None

        def record(gradient: paddle.Tensor) -> None:
            found = self._gradients
            if found is not None:
                # A copy: behind a straight-through estimator it is the weight's own gradient, which is cleared.
                found[name] = found[name] + gradient if name in found else gradient.clone()

        return at_quantized

    @contextlib.contextmanager
    def recorded(self) -> Iterator[dict[str, paddle.Tensor]]:
        """Within it, backward passes add up dL/dQ(w), or leave dL/dw for `latent`; read the dict after it."""
        found: dict[str, paddle.Tensor] = {}
        self._gradients = None if self.latent else found
        try:
            yield found
        finally:
            self._gradients = None
        if self.latent:
            weights = {name: layer.weight for name, layer in self.layers.items()}
            found.update({name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None})
        else:
            parallel.add_up_in_place(found.values())  # of this process's rows; dL/dw is of all processes' already

    @contextlib.contextmanager
    def applied(self, gradients: dict[str, paddle.Tensor], rho: float, by_layer: bool) -> Iterator[None]:
        """Within it, the weights are rho further along `gradients`; after it they are bit for bit what they were."""
        added = scaled(gradients, rho, by_layer)
        kept = {name: self.layers[name].weight.clone() for name in added} if self.latent else {}
        try:
            if self.latent:
                for name, tensor in added.items():
                    self.layers[name].weight.set_value(kept[name] + tensor)
            else:
                self._added = added
            yield
        finally:
            self._added = {}
            for name, tensor in kept.items():
                self.layers[name].weight.set_value(tensor)


@paddle.no_grad()
def scaled(gradients: dict[str, paddle.Tensor], rho: float, by_layer: bool) -> dict[str, paddle.Tensor]:
    """rho g / (|g| + 1e-12); |g| the Euclidean norm of each tensor, or of all together."""
    squares = {name: float(gradient.square().sum()) for name, gradient in gradients.items()}
    total = sum(squares.values())
    return {
        name: gradient * (rho / ((squares[name] if by_layer else total) ** 0.5 + SMALLEST))
        for name, gradient in gradients.items()
    }


@dataclass
class SQuAT(Method):
    """Which turn it is, is a function of the step; nothing else is kept between steps."""

    rho: float = number(0.05, 0.0, 1e3, "length of the perturbation")
    alternate: Literal["step", "epoch", "off"] = option(
        "step", "sharpness and step-size steps take turns each step or epoch; off: sharpness steps that move everything"
    )
    perturb: Literal["quantized", "latent"] = option("quantized", "the weights after rounding, or before it")
    norm: Literal["global", "layer"] = option(
        "global", "length of all layers' perturbations together, or of each one's"
    )

    perturbation: Any = field(default=None, init=False, repr=False)
    weights: list = field(default_factory=list, init=False, repr=False)
    steps: list = field(default_factory=list, init=False, repr=False)
    done: int = field(default=0, init=False, repr=False)  # optimizer steps
    turn: int = field(default=1, init=False, repr=False)  # how many optimizer steps long

    def attach(self, model, pretrained):
        self.perturbation = Perturbation(model, self.perturb == "latent")
        if not self.perturbation.layers:
            raise UserError(f"{KEY}: needs quantized weights; say Slim.quant")
        for name, parameter in model.named_parameters():
            (self.steps if is_quantizer_state(name) else self.weights).append(parameter)
        if self.alternate != "off" and not self.steps:
            raise UserError(
                f"{KEY}.alternate: {self.alternate} needs trained steps; say quantizer: lsq or range: learned in Slim.quant,"
                " or alternate: off"
            )

    def start(self, total_steps, steps_per_epoch):
        self.turn = steps_per_epoch if self.alternate == "epoch" else 1

    def wrap(self, gradients: Gradients) -> Gradients:
        def step() -> dict[str, float]:
            if self.alternate == "off":
                return self._sharp(gradients)
            if self.done // self.turn % 2:
                losses = gradients()
                _forget(self.weights)
            else:
                losses = self._sharp(gradients)
                _forget(self.steps)
            return losses

        return step

    def _sharp(self, gradients: Gradients) -> dict[str, float]:
        """The losses, and by how much the perturbation raises their sum; the gradients left are those where it is raised."""
        with self.perturbation.recorded() as found:
            losses = gradients()
        if not self.rho:
            return losses
        with self.perturbation.applied(found, self.rho, self.norm == "layer"):
            raised = gradients()
        return {**losses, "sharpness": sum(raised.values()) - sum(losses.values())}

    def after_step(self):
        self.done += 1

    def plan(self):
        turns = "no turns" if self.alternate == "off" else f"turns each {self.alternate}"
        return [f"SQuAT: rho {self.rho:g} ({self.perturb} weights, {self.norm} norm), {turns}"]

    def state(self):
        return {"done": self.done}

    def load_state(self, state):
        self.done = state["done"]


def sharpness(model: paddle.nn.Layer, losses: Iterable[Callable[[], paddle.Tensor]], rho: float = 0.05) -> float:
    """How much the loss rises when the quantized weights go `rho` along its gradient (2010.01412, equation 1, to first order).

    losses: one function for each batch, which computes its mean loss with `model`. The mean over them of what it rises.
    The model's mode and weights stay as they are, and no hook stays in it; its gradients are cleared. UserError where
    nothing is quantized.
    """
    perturbation = Perturbation(model)
    if not perturbation.layers:
        raise UserError("sharpness: the model has no quantized weights")
    rises = []
    try:
        for loss in losses:
            with perturbation.recorded() as found:
                before = loss()
                before.backward()
            _forget(model.parameters())
            with perturbation.applied(found, rho, by_layer=False), paddle.no_grad():
                rises.append(float(loss()) - float(before))
    finally:
        perturbation.remove()
    return sum(rises) / len(rises)


def _forget(parameters: Iterable[paddle.Tensor]) -> None:
    """Have the optimizer leave them alone: no gradient, no moments, no weight decay."""
    for parameter in parameters:
        parameter.clear_gradient(False)
