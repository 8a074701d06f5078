"""Ways to do the same, of which one is fastopt's: checked, then timed by turns, in context.

Before each call come a matrix product and a pass that empties the caches. A call of a loss is
forward and backward. First each way's numbers are compared. The ratios are of medians, of
fastopt's time and the other's; the peak is memory beyond inputs, the gradients included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from run import CPU, machine
from timer import in_context, median, one_by_one
from torch import Tensor
from training import peak_memory

FASTOPT = "fastopt"
#: A loss of some tensors; of the first ones there is a gradient.
Way = Callable[..., Tensor]


class Task:
    """What is to be done, and the ways to do it, of which one is fastopt's.

    Args:
        name: of the task.
        ways: what does it, by their names.
    """

    def __init__(self, name: str, ways: dict[str, Callable[[], Any]]) -> None:
        self.name, self.ways = name, ways

    def check(self) -> None:
        """Raise where a way's numbers are not fastopt's."""
        raise NotImplementedError

    def measure(self, seconds: float) -> tuple[str, dict[str, float]]:
        """Words, and how many times as long as fastopt's each way takes."""
        self.check()
        times = one_by_one({way: in_context(call) for way, call in self.ways.items()}, seconds)
        medians = {way: median(taken) for way, taken in times.items()}
        mine, lines = medians[FASTOPT], [self.name]
        for way, call in self.ways.items():
            took = medians[way]
            peak = peak_memory(CPU, call)
            words = "?" if peak is None else f"{peak / 1e6:.0f}"
            lines.append(f"  {way:40s} {took * 1e3:9.2f} ms {took / mine:7.2f} x {words:>6s} MB")
        return "\n".join(lines), {way: took / mine for way, took in medians.items()}


class Row(Task):
    """A loss.

    Args:
        name: of the task.
        tensors: what a way is given.
        ways: functions of them, by their names.
        constants: the places of tensors of floating point without a gradient.
    """

    def __init__(
        self, name: str, tensors: tuple[Tensor, ...], ways: dict[str, Way],
        constants: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.tensors = tuple(
            t.requires_grad_(t.is_floating_point() and k not in constants)
            for k, t in enumerate(tensors)
        )
        super().__init__(name, {way: self._call(function) for way, function in ways.items()})

    def _call(self, function: Way) -> Callable[[], tuple[Tensor, ...]]:
        wanted = [t for t in self.tensors if t.requires_grad]

        def call() -> tuple[Tensor, ...]:
            loss = function(*self.tensors)
            return loss.detach(), *torch.autograd.grad(loss, wanted)

        return call

    def check(self) -> None:
        """Raise where a way's numbers are not fastopt's, but for the last digits of the dtype."""
        mine = self.ways[FASTOPT]()
        for call in self.ways.values():
            for m, t in zip(mine, call(), strict=True):
                eps, size = torch.finfo(t.dtype).eps, t.abs().max().item()
                torch.testing.assert_close(m, t, rtol=eps**0.5 / 4, atol=64 * eps * size)


class Steps(Task):
    """An optimizer's step.

    Args:
        name: of the task.
        shapes: of the parameters.
        dtype: theirs, of which their gradients are as well.
        ways: what makes an optimizer of parameters with gradients, by their names.
    """

    #: Steps that are compared, and how far apart weights may be of the way that they went: states
    #: of bfloat16 have some 8 bits, and weights of bfloat16 go in steps of a 256th.
    STEPS, APART = 5, {torch.float32: 0.02, torch.bfloat16: 0.1}

    def __init__(
        self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype,
        ways: dict[str, Callable[[list[Tensor]], Any]],
    ) -> None:  # fmt: skip
        begin = [torch.randn(shape).to(dtype) for shape in shapes]
        grads = [torch.randn(shape).to(dtype) for shape in shapes]

        def made(way: str) -> Any:
            params: list[Tensor] = [torch.nn.Parameter(t.clone()) for t in begin]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            return ways[way](params)

        self._begin, self._apart = begin, self.APART[dtype]
        self._optimizers = {way: made(way) for way in ways}
        super().__init__(name, {way: each.step for way, each in self._optimizers.items()})

    def check(self) -> None:
        ends = {}
        for way, optimizer in self._optimizers.items():
            for _ in range(self.STEPS):
                optimizer.step()
            ends[way] = [p.detach() for p in optimizer.param_groups[0]["params"]]
        for way, end in ends.items():
            for mine, its, before in zip(ends[FASTOPT], end, self._begin, strict=True):
                apart, moved = (mine - its).float().norm(), (mine - before).float().norm()
                assert apart <= self._apart * moved, f"{self.name}, {way}: {apart} of {moved} apart"


def report(description: str, rows: Iterable[Callable[[], Task]]) -> dict[str, dict[str, float]]:
    """A command: measure what it was asked for, and print it. Returns the ratios of each row."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    arguments = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    found = {}
    for make in rows:
        torch.manual_seed(0)
        row = make()
        if arguments.only in row.name:
            words, found[row.name] = row.measure(arguments.seconds)
            print(words, flush=True)
        torch.compiler.reset()
    return found
