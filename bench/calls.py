"""What calls of losses cost beside their kernels, which are insisted on at any size.

    python bench/calls.py [--only TEXT] [--seconds SECONDS]

How it measures: see ways.py. "the least" computes nothing: an autograd.Function that makes a loss
and a gradient, and gives that back. What fastopt takes beyond it are its kernel and its own Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torchs
from ways import FASTOPT, Row, Way, report

import fastopt
from fastopt.nn import functional as ours

LEAST = "the least"


class Least(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(input, second)
        ctx.grad = torch.empty_like(input)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.grad, None


class Call(Row):
    """A loss of an input and what it is compared with."""

    def __init__(self, function: str, shape: tuple[int, ...]) -> None:
        input = torch.randn(shape)
        labels = function == "cross_entropy"
        second = torch.randint(shape[-1], shape[:1]) if labels else torch.randn(shape)
        ways: dict[str, Way] = {
            FASTOPT: getattr(ours, function),
            "torch": getattr(torchs, function),
            LEAST: Least.apply,
        }
        name = f"{function}, {' x '.join(f'{n:,}' for n in shape)}"
        super().__init__(name, (input, second), ways, constants=(1,))

    def check(self) -> None:
        least = self.ways.pop(LEAST)
        super().check()
        self.ways[LEAST] = least


def rows() -> Iterator[Callable[[], Call]]:
    for function, shapes in {
        "cross_entropy": ((8, 10), (64, 2000), (128, 1000), (512, 1000)),
        "mse_loss": ((1000,), (100_000,), (300_000,)),
        "l1_loss": ((100_000,),),
    }.items():
        yield from (functools.partial(Call, function, shape) for shape in shapes)


if __name__ == "__main__":
    with fastopt.use_backend("numba"):
        report(__doc__.splitlines()[0], rows())
