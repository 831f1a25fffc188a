"""Kurtosis regularization (KURE) with layer-wise targets taken from the original pretrained weights.

Papers: KURE, arXiv 2002.07686; ERNIE + QAT + kurtosis, arXiv 2106.13035.

    K(W) = mean(((w - mean)/std)^4)                           population kurtosis: uniform 1.8, Gaussian 3, Laplace 6
    L = L_task + lambda * reduce_l rho(K(W_l), T_l)           rho: squared (K-T)^2 | relative ((K-T)/T)^2 | log (log K/T)^2
    dK/dw_i = 4/(n std) * (z_i^3 - mean(z^3) - K z_i),  z = (w - mean)/std

Differs from the papers: targets by layer rules (`pretrained` is 2106.13035's fix as we read it, `fixed: 1.8` is KURE's);
the gradient is the closed form, not autograd through the moments; and `apply: decoupled` takes a step of its own after the
optimizer's, as AdamW decouples weight decay, because under Adam a weight moves at most learning rate x steps, too little
for the outliers that make K large:

    w <- w - s * g,  g = sign(K - T) * dK/dw,  s = min(rate * max|w| / max|g|, |K - T| / |g|^2)

The first bound limits any weight's move to `rate` of the largest weight; the second is the first-order step to the target,
so that a layer at its target rests. rho, reduce and lambda play no part in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import paddle
from paddle.autograd import PyLayer

from .. import rules
from ..config import number, option
from ..errors import UserError
from . import Method

UNIFORM = 1.8
DEFAULT_LAYERS = r"\.encoder\.|^encoder\."


@dataclass(frozen=True)
class Moments:
    """Of one weight: kurtosis K, std, mean of z^3, and the centred weight, for the gradient."""

    kurtosis: float
    std: float
    skewness: float
    centred: paddle.Tensor


@paddle.no_grad()
def moments(weight: paddle.Tensor) -> Moments:
    """Population moments of all elements of `weight` (any shape), in fp32 tensors reduced to Python floats."""
    centred = weight.detach() - weight.detach().mean()
    squared = centred * centred
    flat, flat_squared = centred.reshape([-1]), squared.reshape([-1])
    second, third, fourth = (
        float(paddle.dot(a, b)) / flat.size
        for a, b in ((flat, flat), (flat, flat_squared), (flat_squared, flat_squared))
    )
    if second <= 0:  # a constant weight has no kurtosis; it needs no step either
        return Moments(UNIFORM, 0.0, 0.0, centred)
    return Moments(fourth / second**2, math.sqrt(second), third / second**1.5, centred)


@paddle.no_grad()
def kurtosis_gradient(moments_of: Moments) -> paddle.Tensor:
    """dK/dW, the shape of W: 4/(n std) * (z^3 - mean(z^3) - K z)."""
    if moments_of.std == 0:
        return paddle.zeros_like(moments_of.centred)
    z = moments_of.centred / moments_of.std
    gradient = z * (z * z - moments_of.kurtosis)
    return gradient.subtract_(paddle.full([1], moments_of.skewness)).scale_(4.0 / (z.size * moments_of.std))


def kurtosis(weight: np.ndarray) -> float:
    """K of an array, in float64."""
    centred = weight.astype(np.float64).ravel()
    centred = centred - centred.mean()
    second = np.mean(centred**2)
    return float(np.mean(centred**4) / second**2) if second > 0 else UNIFORM


def penalty(k: float, target: float, loss: str) -> tuple[float, float]:
    """rho(K, T) and its derivative with respect to K."""
    if loss == "squared":
        return (k - target) ** 2, 2 * (k - target)
    if loss == "relative":
        return (k / target - 1) ** 2, 2 * (k / target - 1) / target
    return math.log(k / target) ** 2, 2 * math.log(k / target) / k


class _Regularizer(PyLayer):
    """The weighted loss term; its backward hands each weight the closed-form gradient, with no graph through the moments."""

    @staticmethod
    def forward(ctx, method, *weights):
        value, ctx.gradients = method.value_and_gradients()
        return paddle.to_tensor(value, dtype="float32")

    @staticmethod
    def backward(ctx, grad):
        scale = float(grad)
        return tuple(gradient.scale_(scale) for gradient in ctx.gradients)


def target_of(policy: Any, original: float, key: str) -> float | None:
    """T_l of one layer from its policy and the kurtosis of its original weight; None: not regularized."""
    if policy == "none":
        return None
    if policy == "pretrained":
        return original
    if isinstance(policy, dict) and len(policy) == 1:
        ((kind, value),) = policy.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if kind == "fixed" and value >= 1:
                return float(value)
            if kind == "shrink" and 0 <= value <= 1:
                return original + value * (UNIFORM - original)
            if kind == "cap" and value >= 1:
                return min(original, float(value))
    raise UserError(
        f"{key}: {policy!r} is not a target policy; allowed: pretrained, none, {{fixed: K}} and {{cap: K}} with K of 1 or"
        " more, {shrink: g} with g in 0..1"
    )


@dataclass
class Kurtosis(Method):
    """Pull each layer's kurtosis to its target, in the loss or by a decoupled step."""

    targets: Any = option(
        "pretrained",
        "policy of all encoder Linears (pretrained | fixed: K | shrink: g | cap: K), or (regex, policy) rules",
    )
    apply: Literal["loss", "decoupled"] = option(
        "loss", "a term of the loss, or a step of its own after the optimizer's"
    )
    loss: Literal["squared", "relative", "log"] = option("relative", "rho")
    reduce: Literal["mean", "sum", "max"] = option("mean", "over layers")
    lambda_: float = number(1.0, 0.0, 1e9, "weight of the term (apply: loss)")
    warmup_steps: int = number(0, 0, 10**9, "steps over which lambda, or rate, rises from 0")
    rate: float = number(
        0.03, 0.0, 1.0, "largest move of a weight in one step, as a share of max|w| (apply: decoupled)"
    )

    weights: dict[str, paddle.Tensor] = field(default_factory=dict, init=False, repr=False)
    target: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    ceiling: dict[str, float] = field(default_factory=dict, init=False, repr=False)  # `cap`: no pull up to here
    steps: int = field(default=0, init=False, repr=False)

    def attach(self, model, pretrained):
        matrices = {
            name[: -len(".weight")]: parameter
            for name, parameter in model.named_parameters()
            if name.endswith(".weight") and parameter.ndim == 2 and "embeddings" not in name
        }
        key = "Slim.kurtosis.targets"
        targets = self.targets if isinstance(self.targets, list) else [[DEFAULT_LAYERS, self.targets]]
        if not isinstance(self.targets, list) and not any("encoder." in name for name in matrices):
            targets = [["", self.targets]]  # not a PaddleNLP encoder: every Linear
        original = pretrained()
        for name, policy in rules.match(targets, list(matrices), key).items():
            if policy != "none" and f"{name}.weight" not in original:
                raise UserError(
                    f"{key}: the pretrained weights have no {name}.weight, so {policy!r} has no meaning for it"
                )
            target = target_of(policy, kurtosis(original[f"{name}.weight"]) if policy != "none" else 0.0, key)
            if target is None:
                continue
            self.weights[name], self.target[name] = matrices[name], target
            if isinstance(policy, dict) and "cap" in policy:
                self.ceiling[name] = float(policy["cap"])
        if not self.weights:
            raise UserError(f"{key}: every layer is excluded; leave Slim.kurtosis out instead")

    def loss_terms(self, batch, outputs):
        if self.apply != "loss" or self.lambda_ == 0:
            return {}
        return {"kurtosis": self.regularization()}

    def regularization(self) -> paddle.Tensor:
        """The weighted loss term, a scalar tensor with gradients to the weights."""
        return _Regularizer.apply(self, *self.weights.values())

    def value_and_gradients(self) -> tuple[float, list[paddle.Tensor]]:
        """lambda * reduce_l rho(K_l, T_l), and its gradient for each weight."""
        found = {name: moments(weight) for name, weight in self.weights.items()}
        rho = {name: self._penalty(name, of.kurtosis) for name, of in found.items()}
        share = self._shares({name: value for name, (value, _) in rho.items()})
        strength = self.lambda_ * self._ramp()
        value = strength * sum(share[name] * rho[name][0] for name in rho)
        gradients = []
        for name, of in found.items():
            factor = strength * share[name] * rho[name][1]
            gradients.append(kurtosis_gradient(of).scale_(factor) if factor else paddle.zeros_like(of.centred))
        return value, gradients

    def _penalty(self, name: str, k: float) -> tuple[float, float]:
        if k <= self.ceiling.get(name, 0.0):
            return 0.0, 0.0
        return penalty(k, self.target[name], self.loss)

    def _shares(self, values: dict[str, float]) -> dict[str, float]:
        if self.reduce == "max":
            largest = max(values, key=lambda name: values[name])
            return {name: float(name == largest) for name in values}
        return dict.fromkeys(values, 1.0 / len(values) if self.reduce == "mean" else 1.0)

    def _ramp(self) -> float:
        return min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def after_step(self):
        if self.apply == "decoupled":
            self.decoupled_step()
        self.steps += 1

    @paddle.no_grad()
    def decoupled_step(self) -> None:
        """One step of every layer towards its target (the rule in this file's docstring)."""
        rate = self.rate * self._ramp()
        for name, weight in self.weights.items():
            of = moments(weight)
            distance = of.kurtosis - self.target[name]
            if rate == 0 or of.kurtosis <= self.ceiling.get(name, 0.0) or abs(distance) <= 1e-6 * self.target[name]:
                continue
            gradient = kurtosis_gradient(of)
            peak, power = float(gradient.abs().max()), float((gradient * gradient).sum())
            if peak == 0:
                continue
            size = min(rate * float(weight.abs().max()) / peak, abs(distance) / power)
            weight.subtract_(gradient.scale_(math.copysign(size, distance)))

    def report(self) -> dict[str, dict[str, float]]:
        """K and T of every regularized layer."""
        return {
            name: {"kurtosis": moments(weight).kurtosis, "target": self.target[name]}
            for name, weight in self.weights.items()
        }

    def figures(self):
        rows = self.report()
        values = {
            "layers": rows,
            "kurtosis_max": max(row["kurtosis"] for row in rows.values()),
            "target_distance": float(np.mean([abs(row["kurtosis"] / row["target"] - 1) for row in rows.values()])),
        }
        if self.apply == "loss":
            _, gradients = self.value_and_gradients()
            total = [w.grad if w.grad is not None else paddle.zeros_like(w) for w in self.weights.values()]
            values["kurtosis_grad_norm"] = _norm(gradients)
            values["task_grad_norm"] = _norm([t - g for t, g in zip(total, gradients)])
        return values

    def plan(self):
        how = (
            f"loss, {self.loss}, {self.reduce}, lambda {self.lambda_:g}"
            if self.apply == "loss"
            else f"decoupled, rate {self.rate:g}"
        )
        rows = self.report()
        width = max(map(len, rows))
        return [f"kurtosis ({how}):"] + [
            f"  {name:{width}}  K {row['kurtosis']:9.3f} -> {'at most ' if name in self.ceiling else ''}{row['target']:.3f}"
            for name, row in rows.items()
        ]

    def state(self):
        return {"targets": self.target, "steps": self.steps}

    def load_state(self, state):
        if set(state["targets"]) != set(self.target):
            raise UserError("the checkpoint's kurtosis targets are of other layers than this config's")
        self.target, self.steps = dict(state["targets"]), state["steps"]


def _norm(tensors: list[paddle.Tensor]) -> float:
    return math.sqrt(sum(float((tensor * tensor).sum()) for tensor in tensors))
