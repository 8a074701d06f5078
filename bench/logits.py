"""What is made of one read of the logits, against the ways there are to have the same otherwise.

    python bench/logits.py [--only TEXT] [--seconds SECONDS]

For each row its ways take turns, call by call, in context: before each come a matrix product and
a pass that empties the caches. A call is forward and backward. First each way's numbers are
compared. The ratios are of medians, of fastopt's time and the other's; the peak is memory beyond
inputs, the gradients included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as theirs
from run import CPU, machine
from timer import in_context, median, one_by_one
from torch import Tensor
from training import peak_memory

import fastopt
import fastopt.nn.functional as ours
from fastopt.nn import _distillation_loss, _log_prob_and_entropy, _softmax_options

FASTOPT = "fastopt"
#: A loss of some tensors; of the first ones there is a gradient.
Way = Callable[..., Tensor]


class Row:
    """A task, and the ways to do it, of which one is fastopt's."""

    def __init__(self, name: str, tensors: tuple[Tensor, ...], ways: dict[str, Way]) -> None:
        self.name = name
        self.tensors = tuple(t.requires_grad_(t.is_floating_point()) for t in tensors)
        self.ways = {way: self._call(function) for way, function in ways.items()}

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

    def measure(self, seconds: float) -> str:
        self.check()
        times = one_by_one({way: in_context(call) for way, call in self.ways.items()}, seconds)
        mine, lines = median(times[FASTOPT]), [self.name]
        for way, call in self.ways.items():
            took = median(times[way])
            peak = peak_memory(CPU, call)
            words = "?" if peak is None else f"{peak / 1e6:.0f}"
            lines.append(f"  {way:40s} {took * 1e3:9.2f} ms {took / mine:7.2f} x {words:>6s} MB")
        return "\n".join(lines)


def linear(dtype: torch.dtype, ignored: float) -> Row:
    """The demo's head: 512 positions of 64 features, 32,000 classes."""
    x, w = torch.randn(512, 64).to(dtype), (0.1 * torch.randn(32_000, 64)).to(dtype)
    target = torch.randint(32_000, (512,))
    target[torch.rand(512) < ignored] = -100
    ways: dict[str, Way] = {
        FASTOPT: ours.linear_cross_entropy,
        "linear, fastopt's cross_entropy": lambda x, w, t: ours.cross_entropy(
            theirs.linear(x, w), t
        ),
        "linear, torch's cross_entropy": lambda x, w, t: theirs.cross_entropy(
            theirs.linear(x, w), t
        ),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        ways["torch's linear_cross_entropy, options"] = lambda x, w, t: theirs.linear_cross_entropy(
            x, w, t, options=options
        )
    share = f", {ignored:.0%} ignored" if ignored else ""
    return Row(f"linear cross-entropy 512 x 64 -> 32,000{share}, {dtype}", (x, w, target), ways)


def policy() -> Row:
    def way(function: Callable[..., Any]) -> Way:
        def loss(logits: Tensor, action: Tensor) -> Tensor:
            said = function(logits, action)
            total: Tensor = (said.log_prob + 0.01 * said.entropy).mean()
            return total

        return loss

    ways = {FASTOPT: way(ours.log_prob_and_entropy), "torch": way(_log_prob_and_entropy.plain)}
    given = torch.randn(512, 32_000), torch.randint(32_000, (512,))
    return Row("log_prob_and_entropy 512 x 32,000", given, ways)


def distillation(beta: float) -> Row:
    record = _distillation_loss.record_of(2.0, beta)
    teacher = torch.randn(512, 32_000)

    def mine(student: Tensor) -> Tensor:
        return ours.distillation_loss(student, teacher, temperature=2.0, beta=beta)

    def torchs(student: Tensor) -> Tensor:
        return _distillation_loss.plain(record, student, teacher).mean()

    given = (torch.randn(512, 32_000),)
    return Row(f"distillation 512 x 32,000, beta={beta}", given, {FASTOPT: mine, "torch": torchs})


def options() -> Row:
    """z_loss and softcap, beside cross-entropy without them."""
    given = torch.randn(512, 32_000), torch.randint(32_000, (512,))
    ways: dict[str, Way] = {
        FASTOPT: lambda x, t: ours.cross_entropy(x, t, z_loss=1e-4, softcap=30.0),
        "torch": lambda x, t: _softmax_options.definition(x, t, z_loss=1e-4, softcap=30.0),
    }
    return Row("cross_entropy, z_loss and softcap, 512 x 32,000", given, ways)


def compiled(shape: tuple[int, int], dtype: torch.dtype) -> Row:
    """Cross-entropy inside torch.compile, by fastopt's operator and by Inductor's own code."""

    def of(library: Any) -> Way:
        function: Way = torch.compile(lambda x, t: library.cross_entropy(x, t), fullgraph=True)
        return function

    kernel = of(ours)

    def mine(x: Tensor, t: Tensor) -> Tensor:
        with fastopt.use_backend("numba"):
            return kernel(x, t)

    ways = {FASTOPT: mine, "Inductor": of(theirs), "eager torch": theirs.cross_entropy}
    given = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])
    return Row(f"compiled cross_entropy {shape[0]:,} x {shape[1]:,}, {dtype}", given, ways)


def rows() -> Iterator[Callable[[], Row]]:
    for dtype in (torch.float32, torch.bfloat16):
        yield lambda dtype=dtype: linear(dtype, 0.0)
    yield lambda: linear(torch.float32, 0.75)
    yield policy
    for beta in (0.0, 1.0, 0.5):
        yield lambda beta=beta: distillation(beta)
    yield options
    for shape in ((128, 1000), (512, 1000), (1024, 1000), (512, 32_000), (500_000, 10)):
        yield lambda shape=shape: compiled(shape, torch.float32)
    for shape in ((1024, 1000), (512, 32_000)):
        yield lambda shape=shape: compiled(shape, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    arguments = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for make in rows():
        torch.manual_seed(0)
        row = make()
        if arguments.only in row.name:
            print(row.measure(arguments.seconds), flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
