"""What is made of one read of the logits, against the ways there are to have the same otherwise.

    python bench/logits.py [--only TEXT] [--seconds SECONDS]

How it measures: see ways.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as theirs
from torch import Tensor
from ways import FASTOPT, Row, Way, report

import fastopt
import fastopt.nn.functional as ours
from fastopt.nn import _distillation_loss, _log_prob_and_entropy, _softmax_options


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


if __name__ == "__main__":
    report(__doc__.splitlines()[0], rows())
