"""Kurtosis regularization (KURE) with layer-wise targets taken from the original pretrained weights.

Papers: KURE, arXiv 2002.07686; ERNIE + QAT + kurtosis, arXiv 2106.13035.

    L = L_task + lambda * reduce_l rho(K(W_l), T_l)           rho: squared (K-T)^2 | relative ((K-T)/T)^2 | log (log K/T)^2

Differs from the papers: targets by layer rules (targets.py; `pretrained` is 2106.13035's fix as we read it, `fixed: 1.8` is
KURE's); the gradient is the closed form (moments.py), added once an optimizer step, however many batches it accumulates;
lambda may be balanced against the task's gradient; and `apply: decoupled` takes a step of its own after the optimizer's,
as AdamW decouples weight decay, because under Adam a weight moves at most learning rate x steps, too little for the
outliers that make K large (docs/decoupled-kurtosis.md):

    w <- w - s * g,  g = dK/dw,  s = sign(K - T) * min(rate * max|w| / max|g|, |K - T| / |g|^2)

rho, reduce, lambda and balance play no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import numpy as np
import paddle
from paddle.autograd import PyLayer

from ... import rules
from ...errors import UserError
from ...strict import number, option
from .. import Method
from .moments import gradient, group_kurtosis, kurtosis, moments_of, norm, step
from .targets import Target, target_of

__all__ = ["Kurtosis", "kurtosis", "penalty"]

ENCODER = r"\.encoder\.|^encoder\."
KEY = "Slim.kurtosis"


def penalty(k: np.ndarray, target: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """rho(K, T) and its derivative with respect to K, for each group."""
    if loss == "squared":
        return (k - target) ** 2, 2 * (k - target)
    if loss == "relative":
        return (k / target - 1) ** 2, 2 * (k / target - 1) / target
    return np.log(k / target) ** 2, 2 * np.log(k / target) / k


class _Regularizer(PyLayer):
    """The weighted loss term; its backward hands each weight the closed-form gradient, with no graph through the moments."""

    @staticmethod
    def forward(ctx, method, *weights):
        value, ctx.gradients = method.value_and_gradients()
        return paddle.to_tensor(value, dtype="float32")

    @staticmethod
    def backward(ctx, grad):
        scale = float(grad)
        return tuple(found.scale_(scale) for found in ctx.gradients)


@dataclass
class Kurtosis(Method):
    """Pull each layer's kurtosis to its target, in the loss or by a decoupled step."""

    targets: Any = option(
        "pretrained",
        "policy of all encoder Linears (pretrained | fixed: K | shrink: g | cap: K | anneal: K | file: PATH), or (regex,"
        " policy) rules",
    )
    granularity: Literal["tensor", "channel"] = option("tensor", "one kurtosis for a layer, or for each output channel")
    apply: Literal["loss", "decoupled"] = option(
        "loss", "a term of the loss, or a step of its own after the optimizer's"
    )
    loss: Literal["squared", "relative", "log"] = option("relative", "rho")
    reduce: Literal["mean", "sum", "max"] = option("mean", "over layers")
    lambda_: float = number(1.0, 0.0, 1e9, "weight of the term (apply: loss); its upper bound with `balance`")
    balance: Optional[float] = number(
        None, 0.0, 1e3, "set lambda at each step so that the term's gradient has this ratio to the task's (apply: loss)"
    )
    warmup_steps: int = number(0, 0, 10**9, "steps over which lambda, or rate, rises from 0")
    anneal_steps: Optional[int] = number(None, 1, 10**9, "steps of an `anneal` target; default: the whole training")
    every: int = number(1, 1, 10**4, "apply at each k-th step only, k times as strongly")
    rate: float = number(
        0.03, 0.0, 1.0, "largest move of a weight in one step, as a share of max|w| (apply: decoupled)"
    )

    weights: dict[str, paddle.Tensor] = field(default_factory=dict, init=False, repr=False)
    target: dict[str, Target] = field(default_factory=dict, init=False, repr=False)
    steps: int = field(default=0, init=False, repr=False)
    total_steps: Optional[int] = field(default=None, init=False, repr=False)
    added: float = field(default=0.0, init=False, repr=False)  # how strongly the term is in the present gradients

    def attach(self, model, pretrained):
        matrices = {
            name[: -len(".weight")]: parameter
            for name, parameter in model.named_parameters()
            if name.endswith(".weight") and parameter.ndim == 2 and "embeddings" not in name
        }
        targets = self.targets if isinstance(self.targets, list) else [[ENCODER, self.targets]]
        if not isinstance(self.targets, list) and not any("encoder." in name for name in matrices):
            targets = [["", self.targets]]  # not a PaddleNLP encoder: every Linear
        key = f"{KEY}.targets"
        original = pretrained()
        for name, policy in rules.match(targets, list(matrices), key).items():
            found = original.get(f"{name}.weight")
            k0 = None if found is None else group_kurtosis(found, self.per_channel)
            target = target_of(policy, name, k0, key)
            if target is not None:
                self.weights[name], self.target[name] = matrices[name], target
        if not self.weights:
            raise UserError(f"{key}: every layer is excluded; leave {KEY} out instead")

    @property
    def per_channel(self) -> bool:
        """Whether each output channel is a group of its own."""
        return self.granularity == "channel"

    def start(self, total_steps, steps_per_epoch):
        self.total_steps = total_steps

    def wrap(self, gradients):
        if self.apply != "loss" or self.lambda_ == 0:
            return gradients

        def with_penalty():
            losses = gradients()
            self.added = 0.0
            if self._due():
                losses["kurtosis"] = self._add_gradients()
            return losses

        return with_penalty

    @paddle.no_grad()
    def _add_gradients(self) -> float:
        """Add the term's gradients to those of the task; returns its value."""
        value, found = self.value_and_gradients()
        strength = 1.0 if self.balance is None else self._balanced(found)
        for weight, add in zip(self.weights.values(), found):
            add = add if strength == 1.0 else add.scale_(strength)
            if weight.grad is None:
                weight.grad = add
            else:
                weight.grad.add_(add)
        self.added = strength
        return value * strength

    def _balanced(self, found: list[paddle.Tensor]) -> float:
        """What to multiply the term's gradients by for their norm to be `balance` times the task's; at most 1."""
        assert self.balance is not None
        own = norm(found)
        wanted = self._ramp() * self.every * self.balance * norm(self._gradients())
        return min(1.0, wanted / own) if own > 0 else 1.0

    def _gradients(self) -> list[paddle.Tensor]:
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    @paddle.no_grad()
    def _norms(self) -> tuple[float, float]:
        """Of the gradients of the term and of the task, asked for before the optimizer's step: only when they are logged."""
        if not self.added:
            return 0.0, norm(self._gradients())
        found = [gradient.scale_(self.added) for gradient in self.value_and_gradients()[1]]
        return norm(found), norm([weight.grad - own for weight, own in zip(self.weights.values(), found)])

    def regularization(self) -> paddle.Tensor:
        """The weighted loss term, a scalar tensor with gradients to the weights; for a training loop of one's own."""
        return _Regularizer.apply(self, *self.weights.values())

    def value_and_gradients(self) -> tuple[float, list[paddle.Tensor]]:
        """lambda * reduce_l rho(K_l, T_l), and its gradient for each weight. A layer's rho is the mean over its groups."""
        found = {name: moments_of(weight, self.per_channel) for name, weight in self.weights.items()}
        rho, slope = {}, {}
        for name, of in found.items():
            target = self._target(name)
            values, slopes = penalty(of.kurtosis, target, self.loss)
            free = of.kurtosis <= self.target[name].ceiling
            rho[name] = float(np.where(free, 0.0, values).mean())
            slope[name] = np.where(free, 0.0, slopes) / len(slopes)
        share = self._shares(rho)
        strength = self.lambda_ * self._ramp() * self.every
        value = strength * sum(share[name] * rho[name] for name in rho)
        return value, [gradient(of, strength * share[name] * slope[name]) for name, of in found.items()]

    def _shares(self, values: dict[str, float]) -> dict[str, float]:
        if self.reduce == "max":
            largest = max(values, key=lambda name: values[name])
            return {name: float(name == largest) for name in values}
        return dict.fromkeys(values, 1.0 / len(values) if self.reduce == "mean" else 1.0)

    def _target(self, name: str) -> np.ndarray:
        target = self.target[name]
        if target.start is target.end:
            return target.end
        steps = self.anneal_steps or self.total_steps
        if steps is None:
            raise UserError(f"{KEY}.anneal_steps: needed for an `anneal` target in a training loop of your own")
        return target.at(min(1.0, self.steps / max(1, steps - 1)))

    def _ramp(self) -> float:
        return min(1.0, (self.steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def _due(self) -> bool:
        return (self.steps + 1) % self.every == 0

    def after_step(self):
        if self.apply == "decoupled":
            self.decoupled_step()
        self.steps += 1

    @paddle.no_grad()
    def decoupled_step(self) -> None:
        """One step of every layer towards its target (the rule in this file's docstring)."""
        if not self._due():
            return
        rate = min(1.0, self.rate * self._ramp() * self.every)
        for name, weight in self.weights.items():
            of = moments_of(weight, self.per_channel)
            goal = np.where(of.kurtosis <= self.target[name].ceiling, np.nan, self._target(name))
            move = step(of, goal, rate)
            if move is not None:
                weight.subtract_(move)

    def report(self) -> dict[str, dict[str, float]]:
        """K and T of every regularized layer now; per channel, the means over its channels."""
        return {
            name: {
                "kurtosis": float(moments_of(weight, self.per_channel).kurtosis.mean()),
                "target": float(self._target(name).mean()),
            }
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
            values["kurtosis_grad_norm"], values["task_grad_norm"] = self._norms()
        return values

    def plan(self):
        how = f"decoupled, rate {self.rate:g}"
        if self.apply == "loss":
            strength = f"lambda {self.lambda_:g}" if self.balance is None else f"balance {self.balance:g}"
            how = f"loss, {self.loss}, {self.reduce}, {strength}"
        if self.every > 1:
            how += f", every {self.every} steps"
        rows = self.report()
        width = max(map(len, rows))
        return [f"kurtosis per {self.granularity} ({how}):"] + [
            f"  {name:{width}}  K {row['kurtosis']:9.3f} -> {'at most ' if self.target[name].ceiling else ''}"
            f"{float(self.target[name].end.mean()):.3f}"
            for name, row in rows.items()
        ]

    def state(self):
        ends = {name: [target.start.tolist(), target.end.tolist()] for name, target in self.target.items()}
        return {"targets": ends, "steps": self.steps}

    def load_state(self, state):
        if set(state["targets"]) != set(self.target):
            raise UserError("the checkpoint's kurtosis targets are of other layers than this config's")
        for name, (start, end) in state["targets"].items():
            before = self.target[name]
            same = before.start is before.end
            ends = np.asarray(end)
            self.target[name] = Target(ends if same else np.asarray(start), ends, before.ceiling)
        self.steps = state["steps"]
