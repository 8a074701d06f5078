"""A training step of which torch.compile has a part: model, loss, checkpoints, backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKEND
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fastopt

pytestmark = [
    # torch's own, while it traces or compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Profiler record function"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Model(torch.nn.Module):
    """Which has the loss inside, if it is given a target."""

    def __init__(self, criterion: torch.nn.Module) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.GELU())
        self.head, self.criterion = torch.nn.Linear(16, 9), criterion

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        logits = self.head(self.body(x))
        found: Tensor = logits if target is None else self.criterion(logits, target)
        return found


def twins(options: dict[str, Any]) -> tuple[Model, Model]:
    """One with fastopt's loss and one with torch's."""
    mine = Model(fastopt.nn.CrossEntropyLoss(**options))
    theirs = Model(torch.nn.CrossEntropyLoss(**options))
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


LOSSES = pytest.mark.parametrize("inside", [False, True], ids=["loss-outside", "loss-inside"])


@LOSSES
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_optimizer_outside(inside: bool, tensor_lr: bool) -> None:
    """No break, and no graph but the first ones, whatever learning rate and step."""
    mine, theirs = twins({"label_smoothing": 0.1})
    lr: Any = torch.tensor(0.05) if tensor_lr else 0.05
    optimizer = fastopt.optim.AdamW(mine.parameters(), lr=lr)
    twin = torch.optim.AdamW(theirs.parameters(), lr=0.05)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (optimizer, twin)]
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for k in range(4):
        x, target = torch.randn(8, 12), torch.randint(9, (8,))
        with fastopt.use_backend(BACKEND), torch._dynamo.config.patch(error_on_recompile=k > 0):
            loss = compiled(x, target) if inside else mine.criterion(compiled(x), target)
            loss.backward()
            optimizer.step()
        expected = theirs(x, target)
        expected.backward()
        twin.step()
        torch.testing.assert_close(loss, expected)
        for o, schedule in zip((optimizer, twin), schedules, strict=True):
            schedule.step()
            o.zero_grad()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def grads_of(model: torch.nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    given = x.clone().requires_grad_()
    model.zero_grad()
    loss = call(given)
    loss.backward()
    return [loss.detach(), given.grad, *[p.grad for p in model.parameters()]]  # type: ignore[list-item]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["eager", "inside", "around"])
@pytest.mark.parametrize("operation", ["cross_entropy", "linear_cross_entropy"])
def test_checkpoints(operation: str, way: str, reentrant: bool) -> None:
    """The forward pass runs twice, the loss with it; eagerly, in a graph and around one."""
    mine, theirs = twins({})
    target = torch.randint(9, (8,))

    def part(library: Any, model: Model) -> Callable[[Tensor], Tensor]:
        function = getattr(library.nn.functional, operation)

        def loss(x: Tensor) -> Tensor:
            if operation == "linear_cross_entropy":
                return function(model.body(x), model.head.weight, target)  # type: ignore[no-any-return]
            return function(model.head(model.body(x)), target)  # type: ignore[no-any-return]

        return loss

    ours = part(fastopt, mine)
    if way == "around":
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def whole(x: Tensor) -> Tensor:
        return 2 * checkpoint(ours, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    call = torch.compile(whole, backend="aot_eager") if way == "inside" else whole
    x = torch.randn(8, 12)
    with fastopt.use_backend(BACKEND):
        found = [grads_of(mine, call, x) for _ in range(2)]
    expected = grads_of(theirs, lambda x: 2 * part(torch, theirs)(x), x)
    for once in found:
        for a, b in zip(once, expected, strict=True):
            torch.testing.assert_close(a, b)


BACKWARD = (
    "cross_entropy", "mse_loss", "linear_cross_entropy", "log_prob_and_entropy",
    "linear_log_prob_and_entropy", "distillation_loss",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", BACKWARD)
def test_compiled_autograd(name: str) -> None:
    """An eager loss whose backward pass torch.compile has a call of, and doesn't look into."""
    x, w = torch.randn(8, 5), torch.randn(9, 5)
    target = torch.randint(9, (8,))

    def backward() -> list[Tensor]:
        function = getattr(fastopt.nn.functional, name)
        a, b = (t.clone().requires_grad_() for t in (x, w))
        second = torch.ones(8, 9) if name in ("mse_loss", "distillation_loss") else target
        if name.startswith("linear"):
            found = function(a, b, target)
        else:
            found = function((a @ b.t()).tanh(), second)
        loss = found if isinstance(found, Tensor) else (found.log_prob + 2 * found.entropy).sum()
        (3 * loss).backward()
        return [loss.detach(), a.grad, b.grad]  # type: ignore[list-item]

    with fastopt.use_backend("reference"):
        expected = backward()
    for _ in range(3):
        with (
            fastopt.use_backend(BACKEND),
            torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")),
        ):
            found = backward()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
