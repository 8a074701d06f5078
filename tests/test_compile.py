"""torch.compile: a loss is part of the graph, an optimizer's step works compiled or not."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE
from race import NAMES
from torch import Tensor

import fastopt

COMPILERS = ["aot_eager", "inductor"]

pytestmark = [
    # torch's own, while it traces or compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Profiler record function"),
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("insisted", [False, True])
@pytest.mark.parametrize("name", ["mse_loss", "cross_entropy"])
def test_exported(name: str, insisted: bool, strict: bool) -> None:
    """One operator, of any batch, that gives what torch's own loss gives."""

    class Loss(torch.nn.Module):
        def __init__(self, library: Any) -> None:
            super().__init__()
            self.function = getattr(library.nn.functional, name)

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.function(input, target)

    x = torch.randn(1024, 600)
    given = x, torch.randint(600, (1024,)) if name == "cross_entropy" else torch.randn(1024, 600)
    batch = {0: torch.export.Dim("batch", min=2, max=10_000)}
    with fastopt.use_backend(BACKEND) if insisted else nullcontext():
        ours, theirs = (
            torch.export.export(Loss(library), given, strict=strict, dynamic_shapes=(batch, batch))
            for library in (fastopt, torch)
        )
    nodes = [node.target for node in ours.graph.nodes if node.op == "call_function"]
    assert nodes == [getattr(torch.ops.fastopt, name).default]
    fewer = tuple(t[:7] for t in given)
    torch.testing.assert_close(ours.module()(*fewer), theirs.module()(*fewer))


@pytest.fixture(params=COMPILERS)
def compiler(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "inductor" and DEVICE == "cpu" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler (g++) for the CPU")
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def losses() -> dict[str, tuple[torch.nn.Module, torch.nn.Module, Tensor]]:
    labels = torch.randint(0, 300, (64,))
    options = {"label_smoothing": 0.1, "weight": torch.rand(300) + 0.1, "ignore_index": 3}
    chosen = {
        "MSELoss": ({}, torch.randn(64, 300)),
        "L1Loss": ({"reduction": "sum"}, torch.randn(64, 300)),
        "CrossEntropyLoss": (options, labels),
    }
    return {
        name: (getattr(fastopt.nn, name)(**options), getattr(torch.nn, name)(**options), target)
        for name, (options, target) in chosen.items()
    }


@pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "CrossEntropyLoss"])
def test_losses_without_a_graph_break(name: str, compiler: str) -> None:
    mine, torchs, target = losses()[name]
    x = torch.randn(64, 300, requires_grad=True)
    compiled = torch.compile(lambda x, t: mine(x * 2, t), fullgraph=True, backend=compiler)
    outcomes = []
    for function in (compiled, lambda x, t: torchs(x * 2, t)):
        loss = function(x, target)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for m, t in zip(*outcomes, strict=True):
        torch.testing.assert_close(m, t)


def test_compiled_model_and_a_step_that_is_not(compiler: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend=compiler)
    mine = fastopt.optim.AdamW(net.parameters(), lr=0.01)
    torchs = torch.optim.AdamW(twin.parameters(), lr=0.01)
    criterion = fastopt.nn.CrossEntropyLoss()
    for _ in range(4):
        x, t = torch.randn(16, 20), torch.randint(0, 5, (16,))
        mine.zero_grad()
        torchs.zero_grad()
        criterion(compiled(x), t).backward()
        torch.nn.functional.cross_entropy(twin(x), t).backward()
        mine.step()
        torchs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_step(name: str, compiler: str) -> None:
    """A step inside torch.compile and an eager one can take turns."""
    net = torch.nn.Linear(7, 3)
    twin = copy.deepcopy(net)
    mine, torchs = (
        getattr(module, name)(m.parameters(), lr=0.1)
        for module, m in ((fastopt.optim, net), (torch.optim, twin))
    )
    compiled = torch.compile(lambda: mine.step(), backend=compiler)
    for step in (compiled, compiled, mine.step, compiled, mine.step):
        x = torch.randn(5, 7)
        for m in (net, twin):
            m.zero_grad()
            m(x).square().mean().backward()
        step()
        torchs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
