"""What backward passes are expected to ask for: gradients are right, and computed once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import FLOATS
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from watching import watch_losses

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.autograd import Expected
from fastopt.front.route import RouteCache

each_loss = pytest.mark.parametrize("name", ["cross_entropy", "l1_loss", "mse_loss"])


@pytest.fixture(autouse=True)
def nothing_learned(no_crossovers: None) -> Iterator[None]:
    torch.manual_seed(0)
    RouteCache.forget()
    yield
    RouteCache.forget()


class Counts:
    """How many gradients the passes of a backend compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        backend: Any = fastopt.dispatch.load("numba")
        backward = backend.backward

        def note(options: Any, result: Any) -> None:
            self.forward += result[1] is not None

        def counted_backward(*arguments: Any) -> Any:
            self.backward += 1
            return backward(*arguments)

        watch_losses(monkeypatch, note)
        monkeypatch.setattr(backend, "backward", counted_backward)

    def take(self) -> tuple[int, int]:
        found = self.forward, self.backward
        self.forward = self.backward = 0
        return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def second_argument(name: str, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if name == "cross_entropy":
        return torch.randint(1000, (rows,))
    return torch.randn(rows, 1000).to(dtype)


# -- the rule by itself -------------------------------------------------------------------


def wasted(numbers: list[float]) -> list[int]:
    """For each backward pass of a loop, the gradients computed beyond the one it needs."""
    expected, waste = Expected(), []
    for number in numbers:
        left = expected.number
        waste.append(int(left is not None and left != number))
        expected.note(number)
    return waste


def take(numbers: Iterator[float], count: int = 4000) -> list[float]:
    return list(itertools.islice(numbers, count))


@pytest.mark.parametrize(
    "numbers",
    [
        take(itertools.repeat(1.0)),
        take(itertools.repeat(0.25)),
        take(1000.0 + k for k in itertools.count()),  # the number of tokens in a batch
        take(itertools.cycle([1.0, 0.3])),  # two losses of one kind
        take(itertools.cycle([0.3, 0.3, 1.0])),
        *(take(itertools.cycle([0.25] * k + [0.5])) for k in (2, 3, 4, 8, 16, 32, 50, 63)),
        take(2.0 ** (16 + k // 500) for k in itertools.count()),  # a GradScaler that grows
        take(float(k // 3) + 1 for k in itertools.count()),  # accumulated in threes, then another
        take(float(min(k, 100)) for k in itertools.count()),  # a loss's weight that warms up
        take(iter((torch.rand(4000) < 0.9).double().add(1).tolist())),  # mostly one number
        take(math.nan for _ in itertools.count()),
    ],
)
def test_hardly_a_gradient_in_vain(numbers: list[float]) -> None:
    waste = wasted(numbers)
    assert sum(waste[:10]) <= 4
    assert sum(waste) <= 8 + len(numbers) // 50


def test_what_holds_is_expected_again() -> None:
    """After whatever mistakes, a number that stays is the forward's before long."""
    expected = Expected()
    for number in [1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 4.0] * 50:
        expected.note(number)
    for _ in range(Expected.MOST_NEEDED):
        expected.note(5.0)
    assert expected.number == 5
    for _ in range(Expected.SETTLED):
        expected.note(5.0)
    for _ in range(2):
        expected.note(6.0)
    assert expected.number == 6, "earlier mistakes count no more"


# -- losses by it --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_loss
def test_gradients_left_behind(name: str, dtype: torch.dtype, counts: Counts) -> None:
    """Left by the forward pass or computed in the backward pass: the same to the last bit."""
    second = second_argument(name, 600, dtype)
    given = [1.0, 0.25, 0.25, 0.25, 3.0, 0.25, *[3.0] * 5, -0.0, 1.0, 3.0]
    left = [*[True] * 5, *[False] * 3, *[True] * 4, False, False]
    handed = 0
    for scale, forward in zip(given, left, strict=True):
        x = torch.randn(600, 1000).to(dtype).requires_grad_()
        scaled = torch.tensor(scale, dtype=dtype)
        loss = getattr(ours, name)(x, second)
        (grad,) = torch.autograd.grad(loss, x, scaled, retain_graph=True)
        computed_forward, computed_backward = counts.take()
        assert computed_forward == forward, scale
        assert computed_forward + computed_backward <= 2
        handed += not computed_backward
        (again,) = torch.autograd.grad(loss, x, scaled)
        assert counts.take() == (0, 1), "it has been given away"
        assert torch.equal(grad, again)
        assert grad.data_ptr() != again.data_ptr()
        leaf = x.detach().requires_grad_()
        torchs = getattr(theirs, name)(leaf, second)
        torch.testing.assert_close(grad, torch.autograd.grad(torchs, leaf, scaled)[0])
    assert handed == 6


#: Sizes, and of how many numbers a position's statistics are there.
SOFTMAX: dict[str, tuple[tuple[int, ...], int, int]] = {
    "rows": ((40, 5000), 3, 1),
    "a row": ((5000,), 3, 1),
    "tiles": ((64, 10), 1, 1),
    "planes": ((4, 7, 33), 1, 1),
    "few long rows": ((3, 70_000), 35, 3),
}


@pytest.mark.parametrize(("soft", "weighted", "smoothing", "options"), [
    (False, False, 0.0, {}),
    (False, True, 0.1, {"softcap": 3.0, "z_loss": 0.01}),
    (True, True, 0.1, {}),
    (True, False, 0.0, {"softcap": 3.0}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SOFTMAX)
def test_statistics_left_behind(
    sizes: str, dtype: torch.dtype, soft: bool, weighted: bool, smoothing: float,
    options: dict[str, float], counts: Counts,
) -> None:  # fmt: skip
    """Gradients of them are those that a forward pass leaves, to the bit, and they are few."""
    shape, tops, totals = SOFTMAX[sizes]
    classes, places = shape[min(1, len(shape) - 1)], shape[:1] * (len(shape) > 1) + shape[2:]
    x = torch.randn(shape).mul(5)
    x.view(-1)[:3] = torch.tensor([-math.inf, 80.0, -80.0])
    second = torch.rand(shape).to(dtype) if soft else torch.randint(classes, places)
    if not soft and places:
        second.view(-1)[1] = -100
    found = []
    for hooked in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x.to(dtype), second)[: 1 + soft]]
        saved: list[Tensor] = []

        def pack(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t)
            return t

        with saved_tensors_hooks(pack, lambda t: t) if hooked else nullcontext():
            loss = ours.cross_entropy(
                leaves[0], leaves[1] if soft else second, torch.arange(1.0, classes + 1).to(dtype)
                if weighted else None, label_smoothing=smoothing, **options,
            )  # fmt: skip
        if hooked:
            rows = max(math.prod(places), 1)
            sizes_of = [t.numel() for t in saved[2 + weighted :]]
            assert sizes_of == [tops * rows, totals * rows]
        found.append(torch.autograd.grad(loss, leaves))
        assert counts.take() == ((0, 1) if hooked else (1, 0))
    for left, computed in zip(*found, strict=True):
        assert not torch.equal(left, torch.zeros_like(left))
        torch.testing.assert_close(left, computed, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sizes", SOFTMAX)
def test_statistics_are_used(sizes: str) -> None:
    """A backward pass that finds other sums of exponentials has other gradients."""
    shape, *_ = SOFTMAX[sizes]
    classes, places = shape[min(1, len(shape) - 1)], shape[:1] * (len(shape) > 1) + shape[2:]
    x, target = torch.randn(shape).requires_grad_(), torch.randint(classes, places)

    def unpack(t: Tensor) -> Tensor:
        return t * 2 if t.dtype == torch.float64 else t

    with saved_tensors_hooks(lambda t: t, unpack):
        loss = ours.cross_entropy(x, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    leaf = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(theirs.cross_entropy(leaf, target, reduction="sum"), leaf)
    hard = torch.nn.functional.one_hot(target, classes)
    hard = hard.movedim(-1, min(1, len(shape) - 1))
    torch.testing.assert_close(grad.double(), (right + hard) / 2 - hard, rtol=1e-5, atol=1e-7)


def loops() -> dict[str, tuple[Callable[[int], float], Callable[[int], int]]]:
    """Of each step, the number a loss is multiplied by, and how many rows it has."""
    return {
        "always 1": (lambda k: 1.0, lambda k: 200),
        "always 1/4": (lambda k: 0.25, lambda k: 200),
        "always 1/4 of changing batches": (lambda k: 0.25, lambda k: 200 - k),
        "another number each time": (lambda k: 1 / (1000 + k), lambda k: 200),
        "others of changing batches": (lambda k: 1 / (1000 + k), lambda k: 200 - k),
        "two in turns": (lambda k: (1.0, 0.3)[k % 2], lambda k: 200),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loop", loops())
@each_loss
def test_one_gradient_a_step(name: str, loop: str, reduction: str, counts: Counts) -> None:
    scale, rows = loops()[loop]
    x, second = torch.randn(200, 1000), second_argument(name, 200)
    for k in range(20):
        if k == 10:
            counts.take()
        leaf = x[: rows(k)].detach().requires_grad_()
        loss = getattr(ours, name)(leaf, second[: rows(k)], reduction=reduction)
        (loss * scale(k)).backward()
        other = leaf.detach().requires_grad_()
        loss = getattr(theirs, name)(other, second[: rows(k)], reduction=reduction)
        (loss * scale(k)).backward()
        torch.testing.assert_close(leaf.grad, other.grad)
    forward, backward = counts.take()
    assert forward + backward == 10
    assert not backward or loop.startswith(("another", "others", "two"))


def test_sequences_of_any_length(counts: Counts) -> None:
    """Neither the batch nor what comes after the classes makes another kind of call."""
    for k in range(20):
        if k == 10:
            counts.take()
        x = torch.randn(3 + k % 4, 500, 200 + k, requires_grad=True)
        (ours.cross_entropy(x, torch.randint(500, (len(x), 200 + k))) / 4).backward()
    assert counts.take() == (10, 0)


def test_two_heads(counts: Counts) -> None:
    """Each number of classes has its own habits, and each kind of options."""
    for k in range(12):
        if k == 6:
            counts.take()
        for classes, scale, options in (
            (500, 1.0, {}),
            (700, 0.3, {}),
            (500, 0.1, {"label_smoothing": 0.1}),
        ):
            x = torch.randn(400, classes, requires_grad=True)
            loss = ours.cross_entropy(x, torch.randint(classes, (400,)), **options)
            (loss * scale).backward()
    assert counts.take() == (18, 0)


def test_zero_is_not_expected() -> None:
    """Of its gradients the sign counts."""
    for scale in (0.0, 0.0, 0.0, -0.0, -0.0, -0.0, 0.0):
        x, y = torch.randn(400, 400, requires_grad=True), torch.randn(400, 400)
        (found,) = torch.autograd.grad(ours.mse_loss(x, y), x, torch.tensor(scale))
        (expected,) = torch.autograd.grad(theirs.mse_loss(x, y), x, torch.tensor(scale))
        assert torch.equal(found.signbit(), expected.signbit())


def test_numbers_that_are_none() -> None:
    y = torch.randn(400, 400)
    for scale in (math.nan, math.nan, math.nan, math.inf, math.inf, math.inf, 1.0):
        x = torch.randn(400, 400, requires_grad=True)
        found, expected = (
            torch.autograd.grad(module.mse_loss(x, y), x, torch.tensor(scale))[0]
            for module in (ours, theirs)
        )
        torch.testing.assert_close(found, expected, equal_nan=True)


@each_loss
def test_threads_that_ask_for_different_numbers(name: str) -> None:
    x, second = torch.randn(150, 1000), second_argument(name, 150)
    leaf = x.clone().requires_grad_()
    getattr(theirs, name)(leaf, second).backward()
    expected = leaf.grad
    assert expected is not None

    def work(scale: float) -> bool:
        for k in range(40):
            number = scale * (1 + k // 20)
            leaf = x.clone().requires_grad_()
            (getattr(ours, name)(leaf, second) * number).backward()
            if not torch.allclose(leaf.grad, expected * number, rtol=1e-5, atol=1e-8):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (1.0, 1.0, 0.5, 4.0)))
