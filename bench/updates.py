"""Optimizers with fewer bytes, and rules that users write, against torch's fastest and loops.

    python bench/updates.py [--only TEXT] [--seconds SECONDS]

How it measures: see ways.py. A call is a step with gradients that are there. Before, each way's
first steps are compared with the others', as far as what it stores is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from ways import FASTOPT, Steps, report

import fastopt
from fastopt import formula as m

LARGE, SMALL = [(4000, 4096)], [(16,)] * 300
BFLOAT16 = torch.bfloat16
Optimizer = Callable[[list[Tensor]], Any]


@fastopt.optimizer(states=("exp_avg",))
def Lion(
    param: Any, grad: Any, exp_avg: Any, *, lr: float = 1e-4, beta1: float = 0.9,
    beta2: float = 0.99, weight_decay: float = 0.0,
) -> Any:  # fmt: skip
    update = m.sign(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    return param - lr * (update + weight_decay * param), exp_avg


class LionOfTensors(torch.optim.Optimizer):
    """As one writes it in torch: a loop over tensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["beta1"], group["beta2"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                exp_avg = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = exp_avg.mul(beta1).add_(p.grad, alpha=1 - beta1).sign_()
                p.add_(update, alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def adam(library: Any, **options: Any) -> Optimizer:
    return lambda params: library.optim.Adam(params, lr=0.05, **options)


def states_of_16_bits() -> Steps:
    ways = {
        FASTOPT: adam(fastopt, state_dtype=BFLOAT16),
        "fastopt, states of float32": adam(fastopt),
        "torch fused": adam(torch, fused=True),
        "torch foreach": adam(torch, foreach=True),
    }
    return Steps("Adam, float32, states of bfloat16, 16.4 M", LARGE, torch.float32, ways)


def all_of_16_bits(rounding: str) -> Steps:
    ways = {
        FASTOPT: adam(fastopt, state_dtype=BFLOAT16, rounding=rounding),
        "fastopt, rounded to nearest": adam(fastopt),
        "torch fused": adam(torch, fused=True),
        "torch foreach": adam(torch, foreach=True),
        "fastopt, float32": lambda params: adam(fastopt)([_in_float32(p) for p in params]),
        "torch fused, float32": lambda params: adam(torch, fused=True)(
            [_in_float32(p) for p in params]
        ),
    }
    return Steps(f"Adam, bfloat16, {rounding}, 16.4 M", LARGE, BFLOAT16, ways)


def _in_float32(p: Tensor) -> Tensor:
    wide = torch.nn.Parameter(p.detach().float())
    assert p.grad is not None
    wide.grad = p.grad.float()
    return wide


def rule(shapes: list[tuple[int, ...]], words: str) -> Steps:
    ways: dict[str, Optimizer] = {
        FASTOPT: Lion,
        "fastopt.optim.Lion": fastopt.optim.Lion,
        "a loop over tensors": LionOfTensors,
    }
    return Steps(f"a rule, Lion, {words}", shapes, torch.float32, ways)


def rows() -> Iterator[Callable[[], Steps]]:
    yield states_of_16_bits
    for rounding in ("stochastic", "kahan"):
        yield partial(all_of_16_bits, rounding)
    yield partial(rule, SMALL, "300 tensors of 16")
    yield partial(rule, LARGE, "16.4 M")


if __name__ == "__main__":
    report(__doc__.splitlines()[0], rows())
