"""BRECQ: learn, block by block, whether each weight is rounded up or down. Papers: BRECQ, arXiv 2102.05426, and the rounding
of AdaRound, arXiv 2004.10568 (equations 22 to 24):

    W = step (floor(w / step) + h(V))        h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)      zeta 1.1, gamma -0.1

    min over V of  E[sum_c F_c (z_c - z'_c)^2] + lambda sum (1 - |2 h(V) - 1|^beta)

z: the block's output in fp32, z': quantized, of the inputs that the quantized blocks before it give (BRECQ, equation 10; F: the
diagonal of the Fisher matrix, squared gradients with respect to z). A block is an encoder layer; the head is the last one. After
its weights its activation steps are learned, by LSQ's gradient, against the same error.

What is left behind is a weight that lies on its grid, which the layer's own quantizer rounds to itself; it needs a step that
does not follow the weight.

Differs from the papers: F is the squared gradient of the margin between the two largest logits and not of the task loss, so that
it needs no labels and rows that the model is sure of count too; it is scaled to a mean of 1. A block's weights are learned on
inputs whose quantization includes activations, and its activation steps right after them, in one walk through the model. The
mean is over real tokens. Steps of activations are learned in the logarithm, as in TQT (arXiv 1903.08066).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.nn.quant.quant_layers import QuantizedLinear
from tqdm import tqdm

from ..blocks import Block, Stream, blocks_of
from ..errors import UserError
from ..quantizers import LearnedStep
from ..quantizers.attach import input_of, quantized_linears, set_weight, weight_of
from ..quantizers.lsq import LearnedStepAndOffset
from ..strict import number
from . import Method

KEY = "Slim.brecq"
ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: paddle.Tensor) -> paddle.Tensor:
    """h(V) of AdaRound's equation 23, 0..1."""
    return F.hardtanh(F.sigmoid(v).scale(ZETA - GAMMA, GAMMA), 0.0, 1.0)


def logit_of(share: np.ndarray) -> np.ndarray:
    """The V whose h(V) is `share`, 0..1; float32."""
    return (-np.log((ZETA - GAMMA) / (np.asarray(share, np.float64) - GAMMA) - 1)).astype(np.float32)


def regularizer(h: paddle.Tensor, beta: float) -> paddle.Tensor:
    """sum (1 - |2h - 1|^beta): 0 where every h is 0 or 1 (AdaRound, equation 24)."""
    return (1.0 - h.scale(2.0, -1.0).abs().pow(beta)).sum()


class Rounding(paddle.nn.Layer):
    """In the place of a weight quantizer while its rounding is learned: forward(anything) -> step (floor + h(V))."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        quantizer, weight = layer._fake_quant_weight, weight_of(layer)
        self.step = quantizer.current_step(weight)
        ratio = weight.numpy() / self.step.numpy()
        # A weight outside of the range has its bound for an integer, and the one next to it for the other.
        floor = np.clip(np.floor(ratio), quantizer.low, quantizer.high - 1)
        self.floor = paddle.to_tensor(floor)
        start = paddle.nn.initializer.Assign(logit_of(np.clip(ratio - floor, 0, 1)))
        self.v = self.create_parameter(floor.shape, default_initializer=start)

    def h(self) -> paddle.Tensor:
        """How far up each weight is rounded, [in, out]."""
        return rectified_sigmoid(self.v)

    def forward(self, weight):
        self.shares = self.h()  # the regularizer wants it, too
        return (self.floor + self.shares) * self.step

    @paddle.no_grad()
    def rounded(self) -> np.ndarray:
        """The weight on its grid, each h at the nearer of 0 and 1."""
        return ((self.floor + (self.h() >= 0.5).astype("float32")) * self.step).numpy()


class LearnedInput(paddle.nn.Layer):
    """In the place of an activation quantizer while its step is learned; an offset moves with the step as LSQ+'s does."""

    def __init__(self, quantizer):
        super().__init__()
        self.low, self.high = quantizer.low, quantizer.high
        step, offset = quantizer.step(), quantizer.offset()
        self.lowest = offset + self.low * float(step) if offset else None
        start = paddle.nn.initializer.Assign(np.log(step.numpy()))
        self.log_step = self.create_parameter([1], default_initializer=start)

    def forward(self, x):
        step = self.log_step.exp()
        if self.lowest is None:
            return LearnedStep.apply(x, step, self.low, self.high)
        return LearnedStepAndOffset.apply(x, step, self.lowest - self.low * step, self.low, self.high)


@dataclass
class BRECQ(Method):
    """After calibration, on its batches, one of them an iteration."""

    iterations: int = number(300, 0, 10**6, "for the weights of each block; 0: they are rounded to nearest")
    learning_rate: float = number(0.01, 0.0, 10.0, "Adam's, of V")
    lambda_: float = number(0.01, 0.0, 1e6, "weight of the term that drives h(V) to 0 or 1")
    beta_start: float = number(20.0, 1.0, 1e3, "its exponent after the warm-up")
    beta_end: float = number(2.0, 1.0, 1e3, "its exponent at the end")
    warmup: float = number(0.2, 0.0, 1.0, "share of the iterations without the term")
    step_iterations: int = number(100, 0, 10**6, "for the activation steps of each block; 0: they stay as calibrated")
    step_learning_rate: float = number(1e-3, 0.0, 10.0, "Adam's, of log(step)")

    def attach(self, model, pretrained):
        layers = quantized_linears(model)
        if not layers:
            raise UserError(f"{KEY}: needs quantized layers; say Slim.quant")
        for name, layer in layers.items():
            quantizer, weight = layer._fake_quant_weight, layer.weight
            if self.iterations and (quantizer.current_step(weight) != quantizer.current_step(weight * 2)).any():
                options = quantizer.options
                raise UserError(
                    f"{KEY}: the step of {name} follows its weight (quantizer: {options.quantizer}, range: {options.range});"
                    " it needs range: mse or learned, or quantizer: lsq"
                )

    def after_calibration(self, model, fp32, batches):
        own, exact = Stream(model, batches), Stream(fp32, batches)
        references = blocks_of(fp32)
        bar = tqdm(blocks_of(model), desc="brecq", unit="block", disable=None, leave=False)
        with _frozen(model), _frozen(fp32):
            for index, block in enumerate(bar):
                wanted = exact.outputs(references[index])
                error = Error(block, own, wanted, importance(references[index + 1 :], wanted, exact))
                self._learn_rounding(list(block.linears.values()), error)
                self._learn_steps(block.linears, error)
                own.through(block)
                exact.hidden = wanted

    def _learn_rounding(self, layers: list[QuantizedLinear], error: Error) -> None:
        if not self.iterations:
            return
        roundings = [Rounding(layer) for layer in layers]

        def loss(iteration: int) -> paddle.Tensor:
            found = error(iteration)
            beta = self.beta(iteration)
            return found if beta is None else found + self.lambda_ * sum(regularizer(r.shares, beta) for r in roundings)

        unquantized = [paddle.nn.Identity() for _ in layers]
        with _swapped(layers, "_fake_quant_weight", roundings), _swapped(layers, "_fake_quant_input", unquantized):
            _minimize([rounding.v for rounding in roundings], self.learning_rate, self.iterations, loss)
        for layer, rounding in zip(layers, roundings):
            set_weight(layer, rounding.rounded())

    def beta(self, iteration: int) -> float | None:
        """The exponent at an iteration, falling evenly; None in the warm-up."""
        begin = self.warmup * self.iterations
        if iteration < begin:
            return None
        share = (iteration - begin) / (self.iterations - begin)
        return self.beta_start + share * (self.beta_end - self.beta_start)

    def _learn_steps(self, linears: dict[str, QuantizedLinear], error: Error) -> None:
        if not self.step_iterations:
            return
        layers = list(linears.values())
        shared: dict[tuple, LearnedInput] = {}  # layers that read one tensor have one step
        learned = [
            shared.setdefault((input_of(name), quantizer.options), LearnedInput(quantizer))
            for name, quantizer in ((name, layer._fake_quant_input) for name, layer in linears.items())
        ]
        with _swapped(layers, "_fake_quant_input", learned):
            _minimize([one.log_step for one in shared.values()], self.step_learning_rate, self.step_iterations, error)
        for layer, one in zip(layers, learned):
            layer._fake_quant_input.set_step(float(one.log_step.exp()))

    def plan(self):
        return [
            f"BRECQ: {self.iterations} iterations a block for the rounding of weights, {self.step_iterations} for activation"
            " steps"
        ]


class Error:
    """What is minimized of a block: sum over channels of F (z - z')^2, mean over the real tokens of one batch."""

    def __init__(self, block: Block, stream: Stream, wanted: list[paddle.Tensor], weights: list[paddle.Tensor]):
        self.block, self.stream, self.wanted, self.weights = block, stream, wanted, weights

    def __call__(self, iteration: int) -> paddle.Tensor:
        batch = iteration % len(self.wanted)
        found = self.block.run(self.stream.hidden[batch], self.stream.masks[batch])
        real = self.stream.real[batch]
        count = real.sum() if found.ndim == 3 else len(real)
        return (self.weights[batch] * (found - self.wanted[batch]).square()).sum() / float(count)


def importance(rest: Sequence[Block], outputs: Sequence[paddle.Tensor], stream: Stream) -> list[paddle.Tensor]:
    """F of each batch's block outputs: squared gradient, through the `rest` of the model, of the margin between its two
    largest logits; 0 for padding; of mean 1 over all else. Logits themselves, with no `rest`: 1."""
    if not rest:
        return [paddle.ones_like(logits) for logits in outputs]
    found = []
    for output, mask, real in zip(outputs, stream.masks, stream.real):
        start = output.detach()
        start.stop_gradient = False
        end = start
        for block in rest:
            end = block.run(end, mask)
        stream.task.margins(end, paddle.to_tensor(real.astype(np.float32))).sum().backward()
        found.append(start.grad.detach().square() * paddle.to_tensor(real.astype(np.float32)).unsqueeze(-1))
    values = sum(real.sum() for real in stream.real) * found[0].shape[-1]
    mean = sum(float(one.sum()) for one in found) / float(values)
    return [one.scale(1.0 / mean) for one in found]


def _minimize(parameters: list, learning_rate: float, iterations: int, loss: Callable[[int], paddle.Tensor]) -> None:
    optimizer = paddle.optimizer.Adam(learning_rate, parameters=parameters)
    for iteration in range(iterations):
        loss(iteration).backward()
        optimizer.step()
        optimizer.clear_grad()


@contextlib.contextmanager
def _swapped(layers: Sequence[QuantizedLinear], slot: str, others: Sequence[paddle.nn.Layer]) -> Iterator[None]:
    """Within it, each layer has another one in this slot."""
    kept = [getattr(layer, slot) for layer in layers]
    for layer, other in zip(layers, others):
        setattr(layer, slot, other)
    try:
        yield
    finally:
        for layer, own in zip(layers, kept):
            setattr(layer, slot, own)


@contextlib.contextmanager
def _frozen(model: paddle.nn.Layer) -> Iterator[None]:
    """Within it, its quantized Linears get no gradients; after it, nothing has one.

    LayerNorms do get theirs: where its weight's gradient is not asked for (`stop_gradient`, `paddle.grad`), Paddle 2.6.2's on a
    CPU gives its input the gradient that it would have if the weight were 1.
    """
    parameters = [parameter for layer in quantized_linears(model).values() for parameter in layer.parameters()]
    kept = [parameter.stop_gradient for parameter in parameters]
    for parameter in parameters:
        parameter.stop_gradient = True
    try:
        yield
    finally:
        for parameter, own in zip(parameters, kept):
            parameter.stop_gradient = own
        for parameter in model.parameters():
            parameter.clear_gradient(False)
