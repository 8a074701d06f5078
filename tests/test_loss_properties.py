"""What holds of losses whatever the numbers: one way of saying a thing against another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, REDUCTIONS
from test_moduleinfo import Tensors, doubles
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours

# -- properties of cross-entropy ---------------------------------------------------------


def cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensors:
    """Ours with the backend insisted on, and its gradient to the logits."""
    leaf = input.detach().requires_grad_()
    with fastopt.use_backend(BACKEND):
        loss = ours.cross_entropy(leaf, target, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.7))


def classified(*shape: int) -> Tensors:
    """Logits whose classes are last in memory, and classes."""
    logits = torch.randn(shape[0], *shape[2:], shape[1], dtype=torch.float64).movedim(-1, 1)
    return logits, torch.randint(0, shape[1], (shape[0], *shape[2:]))


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """Class probabilities, in the layout of the logits."""
    return torch.zeros_like(like).scatter_(1, target.unsqueeze(1), 1.0)


SHAPES = pytest.mark.parametrize("shape", [(7, 5), (3, 90), (2, 5, 6), (2, 90, 2, 3)], ids=str)
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)


@EACH_REDUCTION
@SHAPES
def test_probability_of_one_is_a_class(shape: tuple[int, ...], reduction: str) -> None:
    input, target = classified(*shape)
    for smoothing in (0.0, 0.3):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        hard = cross_entropy(input, target, **options)
        soft = cross_entropy(input, one_hot(target, input), **options)
        torch.testing.assert_close(soft, hard)


@EACH_REDUCTION
@SHAPES
def test_smoothing_is_another_distribution(shape: tuple[int, ...], reduction: str) -> None:
    input, target = classified(*shape)
    weight = torch.rand(shape[1], dtype=torch.float64) + 0.1
    smooth = one_hot(target, input) * 0.7 + 0.3 / shape[1]
    for weights in {} if reduction == "mean" else {"weight": weight}, {}:
        expected = cross_entropy(input, smooth, reduction=reduction, **weights)
        for given in (target, one_hot(target, input)):
            found = cross_entropy(input, given, reduction=reduction, label_smoothing=0.3, **weights)
            torch.testing.assert_close(found, expected)


@EACH_REDUCTION
@SHAPES
def test_weights_of_one_are_none(shape: tuple[int, ...], reduction: str) -> None:
    input, target = classified(*shape)
    ones = torch.ones(shape[1], dtype=torch.float64)
    for given, smoothing in itertools.product((target, one_hot(target, input)), (0.0, 0.2)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        weighted = cross_entropy(input, given, weight=ones, **options)
        torch.testing.assert_close(weighted, cross_entropy(input, given, **options))


@EACH_REDUCTION
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("classes", [5, 90])
def test_ignored_positions_might_as_well_not_be_there(
    classes: int, ignored: int, reduction: str
) -> None:
    input, target = classified(20, classes)
    target = torch.randint(3, classes, (20,))
    kept = torch.rand(20) < 0.6
    kept[0] = True
    weight = torch.rand(classes, dtype=torch.float64) + 0.1
    for weights, smoothing in itertools.product(({}, {"weight": weight}), (0.0, 0.2)):
        options = {"reduction": reduction, "label_smoothing": smoothing, **weights}
        loss, grad = cross_entropy(
            input, target.where(kept, ignored), ignore_index=ignored, **options
        )
        expected_loss, expected_grad = cross_entropy(input[kept], target[kept], **options)
        assert not grad[~kept].any()
        if reduction == "none":
            assert not loss[~kept].any()
            loss = loss[kept]
        torch.testing.assert_close((loss, grad[kept]), (expected_loss, expected_grad))


def test_weights_that_cancel() -> None:
    """A mean over class weights that add up to 0 is no number; torch's may be infinite."""
    input, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])
    weight = torch.tensor([1.0, -1.0, 2.0])
    assert not theirs.cross_entropy(input, target, weight).isfinite()
    loss, grad = cross_entropy(input, target, weight=weight)
    assert loss.isnan()
    assert not grad.isfinite().any()


# -- properties of all -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "cross_entropy"])
def test_sum_beyond_float16(name: str) -> None:
    """The mean holds, though what it is of adds up to more than float16 has."""
    tensors = torch.full((20_000,), 8.0).half(), torch.zeros(20_000).half()
    if name == "cross_entropy":
        tensors = torch.tensor([0.0, 20.0]).half().repeat(8192, 1), torch.zeros(8192).long()
    for reduction in ("mean", "sum"):
        with fastopt.use_backend(BACKEND):
            found = getattr(ours, name)(*tensors, reduction=reduction)
        exact = getattr(theirs, name)(*doubles(tensors), reduction=reduction)
        torch.testing.assert_close(found, exact.half())
        assert found.isinf() == (reduction == "sum")


@EACH_REDUCTION
@pytest.mark.parametrize("shapes", [((3, 1), (1, 4)), ((4,), (2, 4)), ((), (3,))], ids=str)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
def test_broadcast(name: str, shapes: tuple[tuple[int, ...], ...], reduction: str) -> None:
    input, target = (torch.randn(shape, requires_grad=True) for shape in shapes)
    results, words = [], []
    for function in (getattr(theirs, name), getattr(ours, name)):
        with pytest.warns(UserWarning, match="target size") as caught:
            loss = function(input, target, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss, (input, target), torch.ones_like(loss))))
        words.append([str(warning.message) for warning in caught])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert words[0] == words[1]
