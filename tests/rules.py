"""Rules as users write them, and each once more as a loop over tensors in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastopt
from fastopt import formula as m

SCALE = 0.5


@fastopt.optimizer(states=("exp_avg",))
def Lion(param, grad, exp_avg, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):  # type: ignore[no-untyped-def]
    """Steps of one size."""
    update = m.sign(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    return param - lr * (update + weight_decay * param), exp_avg


def lion(t, p, g, s, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):  # type: ignore[no-untyped-def]
    update = torch.sign(beta1 * s["exp_avg"] + (1 - beta1) * g)
    s["exp_avg"] = beta2 * s["exp_avg"] + (1 - beta2) * g
    return p - lr * (update + weight_decay * p)


@fastopt.optimizer(states=["buffer"])
def SignSGD(p, g, buffer, *, lr=0.01, momentum=0.9, nesterov=False):  # type: ignore[no-untyped-def]
    buffer *= momentum
    buffer += g
    way = m.where(nesterov, g + momentum * buffer, buffer)
    return p - lr * m.sign(way), buffer


def sign_sgd(t, p, g, s, *, lr=0.01, momentum=0.9, nesterov=False):  # type: ignore[no-untyped-def]
    s["buffer"] = momentum * s["buffer"] + g
    return p - lr * torch.sign(g + momentum * s["buffer"] if nesterov else s["buffer"])


@fastopt.optimizer(states=("exp_avg",))
def Sophia(param, grad, exp_avg, *, lr=1e-3, beta=0.96, rho=0.04, eps=1e-12):  # type: ignore[no-untyped-def]
    """A momentum over a curvature of this step's gradient, at most 1."""
    exp_avg = beta * exp_avg + (1 - beta) * grad
    curvature = m.maximum(m.abs(grad) * rho, eps)
    ratio = m.minimum(m.abs(exp_avg) / curvature, 1.0)
    return param - lr * m.sign(exp_avg) * ratio, exp_avg


def sophia(t, p, g, s, *, lr=1e-3, beta=0.96, rho=0.04, eps=1e-12):  # type: ignore[no-untyped-def]
    s["exp_avg"] = beta * s["exp_avg"] + (1 - beta) * g
    ratio = (s["exp_avg"].abs() / (g.abs() * rho).clamp(min=eps)).clamp(max=1.0)
    return p - lr * torch.sign(s["exp_avg"]) * ratio


@fastopt.optimizer(states=("exp_avg", "exp_avg_sq"))
def Adam(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):  # type: ignore[no-untyped-def]
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    step_size = lr / (1 - beta1**step)
    root = m.sqrt(1 - beta2**step)
    return param - step_size * exp_avg / (m.sqrt(exp_avg_sq) / root + eps), exp_avg, exp_avg_sq


def adam(t, p, g, s, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):  # type: ignore[no-untyped-def]
    s["exp_avg"] = beta1 * s["exp_avg"] + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g
    denominator = s["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**t) + eps
    return p - lr / (1 - beta1**t) * s["exp_avg"] / denominator


@fastopt.optimizer(states={"prev": 0.25, "count": 0.0})
def Mixed(param, grad, prev, count, *, step, lr=0.1, power=3, warmup=2, careful=True):  # type: ignore[no-untyped-def]
    """What is written in many ways: literals, powers, conditions of options and of elements."""
    third = 1 / 3
    rate: float = lr * m.where(step <= warmup, 0.1, 1.0)
    rate = rate * m.exp(-0.5) * m.tanh(step / 10)
    size = m.abs(grad)
    is_large = size > 0.3
    way = m.where(is_large, 0.1, third) * grad**3 + m.log1p(size) ** 0.5 * m.sign(prev)
    way = m.where(careful, m.where(step > 3, way, -way), grad)
    way = m.where(m.isnan(way), 0.0, way) + size**power * 2**-prev / (1.0 + size)
    count = m.where(is_large, count + 1, SCALE * count)
    return param - rate * way - 1e-3 * m.erf(param), m.maximum(prev, grad), count


def mixed(t, p, g, s, *, lr=0.1, power=3, warmup=2, careful=True):  # type: ignore[no-untyped-def]
    rate = lr * (0.1 if t <= warmup else 1.0) * math.exp(-0.5) * math.tanh(t / 10)
    size, prev = g.abs(), s["prev"]
    factors = torch.full_like(g, 1 / 3, dtype=torch.float64)
    factors[size > 0.3] = 0.1
    way = factors * g * g * g + torch.log1p(size).sqrt() * torch.sign(prev)
    way = (way if t > 3 else -way) if careful else g
    way = way.nan_to_num(0.0, torch.inf, -torch.inf) + size**power * 2.0**-prev / (1 + size)
    s["prev"] = torch.maximum(prev, g)
    s["count"] = torch.where(size > 0.3, s["count"] + 1, 0.5 * s["count"])
    return p - rate * way - 1e-3 * torch.erf(p)


#: Each class, the same in Python, and what the states begin as.
LOOPS: dict[Any, tuple[Callable[..., Tensor], dict[str, float]]] = {
    Lion: (lion, {"exp_avg": 0.0}),
    SignSGD: (sign_sgd, {"buffer": 0.0}),
    Sophia: (sophia, {"exp_avg": 0.0}),
    Adam: (adam, {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
    Mixed: (mixed, {"prev": 0.25, "count": 0.0}),
}


class Loop:
    """A training by the loop of a rule, in float64."""

    def __init__(self, kind: Any, params: list[Any], **options: Any) -> None:
        self._rule, beginnings = LOOPS[kind]
        self._sign = -1.0 if options.pop("maximize", False) else 1.0
        self._options = {key: float(value) for key, value in options.items()}
        self.params = [p.detach().double().clone() for p in params]
        self.states = [
            {name: torch.full_like(p, number) for name, number in beginnings.items()}
            for p in self.params
        ]
        self._steps = [0] * len(params)

    def step(self, grads: list[Tensor | None]) -> None:
        for k, grad in enumerate(grads):
            if grad is not None:
                self._steps[k] += 1
                self.params[k] = self._rule(
                    self._steps[k], self.params[k], self._sign * grad.double(), self.states[k],
                    **self._options,
                )  # fmt: skip
