"""Cross-entropy with class probabilities: gradients to them, and classes that lie apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKEND, FLOATS, INTERPRETED, REDUCTIONS, assert_as_accurate
from torch import Tensor
from torch.nn import functional as theirs
from torch.testing import assert_close

import fastopt
import fastopt.nn.functional as ours

insisted = functools.partial(fastopt.use_backend, BACKEND)
#: Rows that fill a vector or don't, rows of several blocks, and few that threads share.
SHAPES = [(7,), (33, 10), (5, 300), (1, 1), (3, 5000), (2, 70_001)][: 5 if INTERPRETED else 6]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(5)


def outcome(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], needs: tuple[bool, bool],
    upstream: Tensor | None, dtype: torch.dtype, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, and the gradients of those that need one."""
    leaves = [t.detach().to(dtype) for t in tensors]
    wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=False) if need]
    loss = function(*leaves, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, wanted, upstream)


def check(
    tensors: tuple[Tensor, ...], needs: tuple[bool, bool], dtype: torch.dtype, **options: Any
) -> None:
    """Compiled, and no further from float64 than torch; for any grad_output and for 1."""
    tensors = tuple(t.to(dtype) for t in tensors)
    shape = theirs.cross_entropy(*tensors, **options).shape
    for upstream in (None, torch.randn(shape)):
        exact = outcome(theirs.cross_entropy, tensors, needs, upstream, torch.float64, **options)
        torchs = outcome(theirs.cross_entropy, tensors, needs, upstream, dtype, **options)
        with insisted():
            found = outcome(ours.cross_entropy, tensors, needs, upstream, dtype, **options)
        for mine, theirs_, true in zip(found, torchs, exact, strict=True):
            assert_as_accurate(mine, theirs_, true)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_probabilities(shape: tuple[int, ...], reduction: str, poison: None) -> None:
    tensors = torch.randn(shape) * 3, torch.rand(shape), torch.rand(shape[-1]) + 0.1
    check(tensors, (True, True), torch.float32, reduction=reduction, label_smoothing=0.3)
    if shape == (33, 10):
        check(tensors[:2], (True, True), torch.float32, reduction=reduction)
        check(tensors, (True, True), torch.float32, reduction=reduction)


@pytest.mark.parametrize("needs", [(False, True), (True, False)], ids=["target", "input"])
def test_a_gradient_of_one_of_both(needs: tuple[bool, bool]) -> None:
    check((torch.randn(33, 10), torch.rand(33, 10)), needs, torch.float32, reduction="sum")


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_gradients_of_other_dtypes(dtype: torch.dtype) -> None:
    check((torch.randn(33, 10) * 3, torch.rand(33, 10)), (True, True), dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda t: t,
    "classes-last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda t: t[:, ::2],
    "permuted": lambda t: t.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("of_target", LAYOUTS)
@pytest.mark.parametrize("of_input", ["planes", "classes-last", "sliced"])
def test_probabilities_whose_classes_lie_apart(of_input: str, of_target: str) -> None:
    for shape in ((3, 6, 5, 4), (4, 2, 3, 1)):  # of which slicing may leave a single class
        makes = LAYOUTS[of_input], LAYOUTS[of_target]
        wide = [
            (shape[0], shape[1] * (1 + (n == "sliced")), *shape[2:]) for n in (of_input, of_target)
        ]
        x, t = (make(torch.randn(s).abs()) for make, s in zip(makes, wide, strict=True))
        check((x, t), (True, True), torch.float32)
        check((x, t), (True, True), torch.float32, reduction="none")


def test_a_single_class_in_planes() -> None:
    check((torch.randn(4, 1, 3), torch.rand(4, 1, 3)), (True, True), torch.float32)


def test_confident_and_impossible_classes() -> None:
    """Of a logit of -inf the slope is infinite, as in torch; nothing else is touched by it."""
    x, t = torch.randn(6, 9) * 40, torch.rand(6, 9)
    check((x, t), (True, True), torch.float32)
    x[2, 3], t[2, 3] = -float("inf"), 0.0
    found = {}
    for module in (theirs, ours):
        a, b = x.clone().requires_grad_(), t.clone().requires_grad_()
        with insisted():
            loss = module.cross_entropy(a, b, reduction="none")
        found[module] = torch.autograd.grad(loss, (a, b), torch.ones(6))
    assert_close(found[ours][1], found[theirs][1], equal_nan=True)
    assert found[ours][1][2, 3] == float("inf")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_of_both(reduction: str) -> None:
    x, t = torch.randn(4, 5).double(), torch.rand(4, 5).double()

    def second(module: Any) -> tuple[Tensor, ...]:
        a, b = x.clone().requires_grad_(), t.clone().requires_grad_()
        loss = module.cross_entropy(a, b, reduction=reduction, label_smoothing=0.1)
        grads = torch.autograd.grad(loss.sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (a, b))

    with insisted():
        found = second(ours)
    assert_close(found, second(theirs))


def test_scales_that_change_and_a_second_backward() -> None:
    x, t = torch.randn(6, 9, requires_grad=True), torch.rand(6, 9, requires_grad=True)
    with insisted():
        loss = ours.cross_entropy(x, t)
    expected = theirs.cross_entropy(x, t)
    for scale in (1.0, 0.5, 0.5, 3.0, 1.0):
        mine, torchs = (
            torch.autograd.grad(one, (x, t), torch.tensor(scale), retain_graph=True)
            for one in (loss, expected)
        )
        assert_close(mine, torchs)
