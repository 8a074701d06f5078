"""The loops that tutorials teach, with only the imports changed, give torch's loss curve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fastopt

Run = tuple[list[float], torch.nn.Module]
# A loop takes the two modules that a user imports: nn, for its losses, and optim.
Loop = Callable[[Any, Any], Run]


def perceptron(*sizes: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def train(
    model: torch.nn.Module, criterion: Any, optimizer: Any, x: Tensor, y: Tensor, epochs: int
) -> Run:
    curve = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve, model


def regression(nn: Any, optim: Any) -> Run:
    model, x, y = perceptron(10, 20, 1), torch.randn(100, 10), torch.randn(100, 1)
    return train(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.01), x, y, 100)


def line_through_four_points(nn: Any, optim: Any) -> Run:
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    model = torch.nn.Linear(1, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    curve, _ = train(model, nn.MSELoss(), optimizer, x, 2 * x, 500)
    assert model(torch.tensor([[5.0]])).item() == pytest.approx(10, abs=0.05)
    return curve, model


def mean_absolute_error(nn: Any, optim: Any) -> Run:
    model, x, y = perceptron(10, 20, 1), torch.randn(100, 10), torch.randn(100, 1)
    criterion = nn.L1Loss()
    by_hand = (model(x) - y).abs().mean()
    torch.testing.assert_close(criterion(model(x), y), by_hand)
    return train(model, criterion, optim.SGD(model.parameters(), lr=0.05, momentum=0.9), x, y, 50)


def root_mean_square_propagation(nn: Any, optim: Any) -> Run:
    model, x = perceptron(4, 16, 1), torch.randn(64, 4)
    optimizer = optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, momentum=0.5)
    return train(model, nn.MSELoss(), optimizer, x, x.sum(1, keepdim=True).sin(), 60)


def image_classifier(nn: Any, optim: Any) -> Run:
    """Batches, dropout, accuracy, validation."""
    labels = torch.randint(0, 10, (320,))
    images = torch.randn(320, 1, 8, 8) + torch.randn(10, 1, 8, 8)[labels]
    training = DataLoader(TensorDataset(images[:256], labels[:256]), 32, shuffle=True)
    validation = DataLoader(TensorDataset(images[256:], labels[256:]), 32)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(128, 10),
    )  # fmt: skip
    criterion, optimizer = nn.CrossEntropyLoss(), optim.Adam(model.parameters(), lr=2e-3)

    def epoch(batches: Iterable[list[Tensor]], update: bool) -> tuple[float, float]:
        model.train(update)
        total, correct, count = 0.0, 0, 0
        for x, y in batches:
            with nullcontext() if update else torch.no_grad():
                logits = model(x)
                loss = criterion(logits, y)
            if update:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item() * len(y)
            correct += int((logits.argmax(1) == y).sum())
            count += len(y)
        return total / count, correct / count

    curve = []
    for _ in range(5):
        curve += [*epoch(training, True), *epoch(validation, False)]
    assert curve[-1] > 0.5, "it learns"
    return curve, model


def imbalanced_tokens(nn: Any, optim: Any) -> Run:
    """A rare class that weighs more, padding that counts for nothing, and classes on axis 1."""
    tokens = torch.where(torch.rand(16, 12) < 0.1, 2, torch.randint(0, 2, (16, 12)))
    padded = torch.where(torch.rand(16, 12) < 0.3, -1, tokens)
    criterion = nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 1.0, 8.0]), ignore_index=-1, label_smoothing=0.05
    )
    model = perceptron(6, 20, 3)
    x = torch.randn(16, 12, 6) + tokens[..., None]
    optimizer = optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
    return train(model, lambda out, y: criterion(out.transpose(1, 2), y), optimizer, x, padded, 40)


class LogCosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(input - target)
        return (input - target).cosh().log().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return grads[0] * difference.tanh() / difference.numel(), None


class LogCoshLoss(torch.nn.Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - target).cosh().log().mean()


def own_loss(criterion: Callable[..., Tensor], nn: Any, optim: Any) -> Run:
    model, x, y = perceptron(5, 16, 1), torch.randn(50, 5), torch.randn(50, 1)
    return train(model, criterion, optim.AdamW(model.parameters(), lr=1e-3), x, y, 40)


class SignDescent(torch.optim.Optimizer):
    """A user's optimizer; moves against the sign of a momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 0.1)
                p.sub_(average / (average.abs() + 1e-3), alpha=group["lr"])


def own_optimizer(nn: Any, optim: Any) -> Run:
    model, x, y = perceptron(5, 16, 3), torch.randn(50, 5), torch.randint(0, 3, (50,))
    return train(model, nn.CrossEntropyLoss(), SignDescent(model.parameters(), 0.01), x, y, 40)


def schedule(make: Callable[[Any], Any], kind: str, nn: Any, optim: Any) -> Run:
    """A scheduler, clipped gradients, and batches accumulated two at a time."""
    model, criterion = perceptron(8, 32, 4), nn.CrossEntropyLoss()
    options = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.1}}[kind]
    optimizer = getattr(optim, kind)(model.parameters(), lr=1e-2, **options)
    scheduler = make(optimizer)
    x, y = torch.randn(40, 4, 8), torch.randint(0, 4, (40, 4))
    curve = []
    for step in range(40):
        loss = criterion(model(x[step]), y[step]) / 2
        loss.backward()
        curve += [loss.item(), scheduler.get_last_lr()[0]]
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return curve, model


def closure(nn: Any, optim: Any) -> Run:
    model, x, y = perceptron(10, 20, 1), torch.randn(30, 10), torch.randn(30, 1)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(evaluate).item() for _ in range(50)], model


SCHEDULES = {
    "step": partial(lr_scheduler.StepLR, step_size=5, gamma=0.5),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=20),
    "one-cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=21),
}
LOOPS: dict[str, Loop] = {
    "regression": regression,
    "line": line_through_four_points,
    "mean-absolute-error": mean_absolute_error,
    "rmsprop": root_mean_square_propagation,
    "image-classifier": image_classifier,
    "imbalanced-tokens": imbalanced_tokens,
    "own-loss-function": partial(own_loss, LogCosh.apply),
    "own-loss-module": partial(own_loss, LogCoshLoss()),
    "own-optimizer": own_optimizer,
    "closure": closure,
    **{
        f"{kind}-{name}": partial(schedule, make, kind)
        for name, make in SCHEDULES.items()
        for kind in ("SGD", "AdamW")
    },
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Beside other processes, threads wait for each other longer than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", [None, "numba"])
@pytest.mark.parametrize("name", LOOPS)
def test_loss_curve(name: str, backend: str | None) -> None:
    """As chosen automatically, and with everything compiled that small sizes would not be."""

    def run(nn: Any, optim: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)  # as tutorials do; in a rare seed rounding decides a sign
        curve, model = LOOPS[name](nn, optim)
        return torch.tensor(curve), [p.detach() for p in model.parameters()]

    expected_curve, expected_params = run(torch.nn, torch.optim)
    with fastopt.use_backend(backend) if backend else nullcontext():
        curve, params = run(fastopt.nn, fastopt.optim)
    torch.testing.assert_close(curve, expected_curve, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(params, expected_params, rtol=1e-4, atol=1e-6)
