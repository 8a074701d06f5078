"""Few rows of many classes, which the CPU's threads share: the same results, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours
from fastopt.kernels.numba.softmax_long import SEGMENT
from fastopt.kernels.numba.softmax_schedule import FEW_ROWS

CLASSES = 2 * SEGMENT + 1237
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outcome(function: Any, x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with fastopt.use_backend("numba"):
        loss = function(x, *rest, **options)
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (grad,) = torch.autograd.grad(loss, x, weights if loss.dim() else torch.ones_like(loss))
    return loss.detach(), grad


def compare(x: Tensor, *rest: Any, **options: Any) -> None:
    """With torch in float64, and with itself on other numbers of threads."""
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in rest]
    loss, grad = outcome(theirs.cross_entropy, x.double(), *wide, **options)
    found = [outcome(ours.cross_entropy, x, *rest, **options) for _ in range(2)]
    torch.set_num_threads(1)
    found.append(outcome(ours.cross_entropy, x, *rest, **options))
    eps = torch.finfo(x.dtype).eps
    tiny = torch.finfo(x.dtype).smallest_normal
    torch.testing.assert_close(
        found[0][0].double(), loss, rtol=8 * eps, atol=8 * eps, equal_nan=True
    )
    size = grad.abs().nanmedian()  # of one class among thousands
    digits = 4096 if x.dtype == torch.float64 else 64  # torch's own sum of as many float64
    allowed = digits * eps * (grad.abs() + size) + 4 * tiny
    if not rest[0].is_floating_point():  # where a difference of about 1 and 1 may be left
        place = rest[0].clamp_min(0).unsqueeze(min(1, x.dim() - 1))
        allowed.scatter_add_(min(1, x.dim() - 1), place, torch.full_like(allowed, 16 * eps))
    wrong = ~((found[0][1].double() - grad).abs() <= allowed) & ~grad.isnan()
    assert not wrong.any(), (found[0][1][wrong][:5], grad[wrong][:5])
    assert torch.equal(found[0][1].isnan(), grad.isnan())
    for other in found[1:]:
        for mine, its in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS - 1, FEW_ROWS])
def test_labels(rows: int, dtype: torch.dtype) -> None:
    x, labels = (torch.randn(rows, CLASSES) * 3).to(dtype), torch.randint(0, CLASSES, (rows,))
    compare(x, labels)
    if rows > 1:
        labels[1] = -100
        compare(x, labels, reduction="sum", label_smoothing=0.1)
        compare(x, labels, torch.rand(CLASSES).to(dtype), reduction="none")


@pytest.mark.parametrize("classes", [2 * SEGMENT + d for d in (0, 1, 2049)] + [5 * SEGMENT])
def test_lengths_and_places(classes: int) -> None:
    """Labels at the segments' ends, and a maximum in each of them."""
    places = torch.tensor([0, SEGMENT - 1, SEGMENT, 2 * SEGMENT - 1, classes - 1])
    x = torch.randn(5, classes)
    x[torch.arange(5), places.flip(0)] += 20
    compare(x, places)
    compare(x[2], places[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities(dtype: torch.dtype) -> None:
    x, p = torch.randn(3, CLASSES, dtype=dtype), torch.rand(3, CLASSES, dtype=dtype)
    p /= p.sum(1, keepdim=True)
    compare(x, p)
    compare(x, p, torch.rand(CLASSES, dtype=dtype), label_smoothing=0.2, reduction="none")


def test_positions() -> None:
    """(N, C, d) with the classes last in memory, with gaps."""
    x = torch.randn(2, 3, CLASSES + 5)[..., :CLASSES].movedim(-1, 1)
    compare(x, torch.randint(0, CLASSES, (2, 3)), reduction="none")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("special", [-INF, INF, NAN, 1e30])
def test_special_logits(special: float, smoothing: float) -> None:
    """One of them, a segment of them, a row of them."""
    for segment in range(3):
        x = torch.randn(4, CLASSES)
        x[0, segment * SEGMENT + 7] = special
        x[1, segment * SEGMENT : (segment + 1) * SEGMENT] = special
        x[2] = special
        labels = torch.tensor([3, (segment * SEGMENT + SEGMENT) % CLASSES, 5, 9])
        compare(x, labels, label_smoothing=smoothing, reduction="none")


def test_it_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.kernels.numba import cross_entropy, softmax_schedule

    ran = []
    schedule = cross_entropy.schedule

    def noted(*arguments: Any) -> Any:
        ran.append((found := schedule(*arguments)).loop)
        return found

    monkeypatch.setattr(cross_entropy, "schedule", noted)
    for rows, classes in ((1, CLASSES), (FEW_ROWS, CLASSES), (1, 2 * SEGMENT)):
        outcome(ours.cross_entropy, torch.randn(rows, classes), torch.zeros(rows).long())
    assert ran == [
        softmax_schedule.softmax_long, softmax_schedule.softmax_rows, softmax_schedule.softmax_rows
    ]  # fmt: skip


@pytest.mark.parametrize("classes", [300, 2 * SEGMENT + 1])
def test_infinite_gradient_of_the_loss(classes: int) -> None:
    """Off the label it is infinite, as torch's, and not the NaN of 0 times infinity."""
    x, labels = torch.randn(3, classes, requires_grad=True), torch.tensor([0, 7, classes - 1])
    with fastopt.use_backend("numba"):
        loss = ours.cross_entropy(x, labels)
    expected = torch.autograd.grad(theirs.cross_entropy(x, labels), x, torch.tensor(INF))
    found = torch.autograd.grad(loss, x, torch.tensor(INF))
    off = torch.arange(classes) != labels[:, None]  # at the label torch has inf - inf
    torch.testing.assert_close(found[0][off], expected[0][off])
