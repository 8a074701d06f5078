"""Log-probability, entropy, log-sum-exp and argmax of rows: against torch in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, FLOATS, INTERPRETED
from torch import Tensor
from torch.testing import assert_close

import fastopt
import fastopt.nn.functional as ours
from fastopt.nn._log_prob_and_entropy import plain

#: Within a block, a block and some more, several; and the smallest.
CLASSES = (1, 7, 150, 4099) if INTERPRETED else (1, 7, 150, 2049, 9001)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(13)


def served(logits: Tensor, target: Tensor) -> Any:
    with fastopt.use_backend(BACKEND):
        return ours.log_prob_and_entropy(logits, target)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Computed in float32 at least, and of the gradients rounded once to their dtype."""
    digits = 1e-12 if dtype == torch.float64 else 4e-6
    once = digits if found.dtype != dtype else max(digits, torch.finfo(dtype).eps)
    assert_close(found.double(), exact, rtol=once, atol=digits, equal_nan=True)


def check(logits: Tensor, target: Tensor) -> None:
    """Values, and the gradient by each of the three and by all together."""
    dtype, x = logits.dtype, logits.detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    found, exact = served(x, target), plain(wide, target)
    assert torch.equal(found.argmax, exact.argmax)
    assert not found.argmax.requires_grad
    for mine, e in zip(found[:3], exact[:3], strict=True):
        assert mine.shape == target.shape
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        close(mine, e, dtype)
    for chosen in ((0,), (1,), (2,), (0, 1, 2)):
        upstream = [torch.randn(target.shape, dtype=torch.float64) for _ in chosen]
        (grad,) = torch.autograd.grad(
            [found[k] for k in chosen], x,
            [u.to(found[0].dtype) for u in upstream], retain_graph=True,
        )  # fmt: skip
        rounded = [u.to(found[0].dtype).double() for u in upstream]
        (right,) = torch.autograd.grad([exact[k] for k in chosen], wide, rounded, retain_graph=True)
        assert grad.dtype == dtype
        close(grad, right, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_values_and_gradients(classes: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 3, classes, dtype=torch.float64) * 4).to(dtype)
    check(logits, torch.randint(classes, (2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    """Leading and lonely infinities, a confident row, huge and equal logits, rising blocks."""
    classes = CLASSES[-1]
    x = torch.randn(7, classes, dtype=dtype)
    x[0, : classes // 2] = -torch.inf
    x[1, 17] = 60.0
    x[2] = 3.0
    x[3] = torch.linspace(-500, 500, classes)
    x[4] *= 1e30
    x[5] = -torch.inf
    x[5, -1] = 2.0
    target = torch.tensor([classes - 1, 17, 5, classes - 1, int(x[4].argmax()), classes - 1, 0])
    check(x, target)
    x[1, 17] = 24.0
    (grad,) = torch.autograd.grad(
        served(leaf := x[1:2].clone().requires_grad_(), target[1:2]).log_prob, leaf
    )
    p = torch.softmax(x[1].double(), 0)
    others = p[:17].sum() + p[18:].sum()
    assert others < 1e-5  # of 1 - p float32 has hardly a digit, which the GPU's kernels compute
    last = 2e-7 if BACKEND == "triton" and dtype == torch.float32 else 0
    assert_close(grad[0, 17].double(), others, rtol=1e-5, atol=last)


def test_numbers_that_are_none() -> None:
    x = torch.randn(3, 40)
    x[0, 7], x[1, 5] = torch.nan, torch.inf
    found = served(x, torch.tensor([1, 2, 3]))
    assert found.log_prob[:2].isnan()[0]
    assert found.entropy[0].isnan()
    assert found.log_sum_exp[0].isnan()
    assert_close(found.log_prob[2], torch.log_softmax(x[2], 0)[3])
    if BACKEND == "numba":
        assert found.argmax.tolist() == x.argmax(-1).tolist()


def test_layouts_and_sizes() -> None:
    x, target = torch.randn(50, 6, 4).double(), torch.randint(50, (4, 6))
    check(x.permute(2, 1, 0), target)
    check(torch.randn(40).double(), torch.tensor(3))
    wide = torch.randn(8, 100).double()
    check(wide[::2, 10:60], torch.randint(50, (4,)))
    check(torch.randn(0, 40).double(), torch.empty(0, dtype=torch.int64))
    check(torch.randn(300, 40).double()[::3], torch.randint(40, (600,))[::6])


def test_second_derivatives_transforms_and_a_second_backward() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2])
    call = lambda x: served(x, target)[:3]  # noqa: E731
    assert torch.autograd.gradgradcheck(call, x)
    value = lambda f, x: sum(t.sum() for t in f(x, target)[:3])  # noqa: E731
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        found = transform(lambda x: value(ours.log_prob_and_entropy, x))(x.detach())
        assert_close(found, transform(lambda x: value(plain, x))(x.detach()))
    total = value(served, x)
    first, second = (torch.autograd.grad(total, x, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)
    compiled = torch.compile(ours.log_prob_and_entropy, backend="eager")
    assert_close(compiled(x, target), plain(x, target))


def test_no_gradient_is_computed_that_is_not_wanted() -> None:
    x, target = torch.randn(3, 50, requires_grad=True), torch.tensor([0, 4, 2])
    with torch.no_grad():
        found = served(x, target)
    assert not any(t.requires_grad for t in found)
    before = x.detach().clone()
    backend = fastopt.dispatch.load(BACKEND)
    with mock.patch.object(backend, "gradient", wraps=backend.gradient) as gradient:
        served(x, target).log_prob.sum().backward()
    assert gradient.call_count == 1
    assert torch.equal(x, before)


def test_bad_input() -> None:
    x = torch.randn(2, 3, 50)
    for call in (served, ours.log_prob_and_entropy):
        for bad in (50, -1):
            target = torch.zeros(2, 3, dtype=torch.int64)
            target[1, 2] = bad
            words = rf"Target {bad} is out of bounds.*allowed are 0 to 49 \(50 classes\)$"
            with pytest.raises(IndexError, match=words):
                call(x, target)
        with pytest.raises(RuntimeError, match="expected logits of shape"):
            call(x, torch.zeros(2, dtype=torch.int64))
        with pytest.raises(RuntimeError, match=r"target of dtype torch\.int64, got torch\.int32"):
            call(x, torch.zeros(2, 3, dtype=torch.int32))
        with pytest.raises(RuntimeError, match="floating dtype"):
            call(x.long(), torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="must be tensors, not list"):
            call([1.0], torch.zeros(1))


@pytest.mark.skipif(BACKEND != "numba", reason="on a GPU there are no small calls")
def test_which_backend() -> None:
    x, target = torch.randn(2, 50), torch.tensor([1, 2])
    (decision,) = fastopt.explain(ours.log_prob_and_entropy, x, target)
    assert decision.backend == "reference"
    (decision,) = fastopt.explain(ours.log_prob_and_entropy, x, target, compiled=True)
    assert decision.backend == "reference"
    assert "fewer than the 4194304" in str(decision)
    (decision,) = fastopt.explain(ours.log_prob_and_entropy, x.repeat(2000, 1), target.repeat(2000))
    assert decision.backend == "numba"
    assert decision.request.operation == "log_prob_and_entropy"
    assert_close(ours.log_prob_and_entropy(x, target), plain(x, target), rtol=0, atol=0)


# -- of a linear layer ------------------------------------------------------------------


def of_layer(*tensors: Any) -> Any:
    x, w, target, b = tensors
    with fastopt.use_backend(BACKEND):
        return ours.linear_log_prob_and_entropy(x, w, target, linear_bias=b)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = fastopt.dispatch.load(BACKEND).Pieces
    monkeypatch.setattr(kind, "BYTES", 1)
    monkeypatch.setattr(kind, "ROWS", 4)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_of_a_layer(bias: bool, dtype: torch.dtype) -> None:
    """As near to float64 as the layer by torch and then the rows, from pieces of four rows."""
    x, w, b = (torch.randn(s, dtype=torch.float64).to(dtype) for s in ((3, 5, 8), (130, 8), (130,)))
    target = torch.randint(130, (3, 5))
    upstream = torch.randn(3, 3, 5, dtype=torch.float64)

    def outcome(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, *([b] if bias else []))]
        found = function(*leaves[:2], target, leaves[2] if bias else None)
        given = [u.to(f.dtype) for u, f in zip(upstream, found, strict=False)]
        first = torch.autograd.grad(found[:3], leaves, given, retain_graph=True)
        second = torch.autograd.grad(found[:3], leaves, given)
        assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
        assert [f.dtype for f in first] == [dtype] * len(leaves)
        return [*(f.detach() for f in found[:3]), *first]

    def composed(x: Tensor, w: Tensor, target: Tensor, b: Any) -> Any:
        return plain(torch.nn.functional.linear(x, w, b), target)

    exact = outcome(composed, torch.float64)
    for mine, its, e in zip(outcome(of_layer, dtype), outcome(composed, dtype), exact, strict=True):
        assert mine.shape == e.shape
        few = torch.finfo(dtype).eps * (256 if dtype == torch.float64 else 8)
        wrong, torchs = (torch.linalg.vector_norm(t.double() - e) for t in (mine, its))
        assert wrong <= 1.25 * torchs + few * torch.linalg.vector_norm(e)


@pytest.mark.usefixtures("pieces")
def test_of_a_layer_in_other_ways() -> None:
    x, w = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    target = torch.randint(5, (6,))
    x.requires_grad_()
    call = lambda x: of_layer(x, w, target, None)[:3]  # noqa: E731
    assert torch.autograd.gradgradcheck(call, x)
    expected = plain(x @ w.t(), target)
    assert torch.equal(of_layer(x, w, target, None).argmax, expected.argmax)
    compiled = torch.compile(ours.linear_log_prob_and_entropy, backend="eager")
    assert_close(compiled(x, w, target), expected)
    assert of_layer(x[:0], w, target[:0], None).entropy.shape == (0,)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.linear_log_prob_and_entropy(x.float(), w.float(), target)
    assert_close(found.entropy, expected.entropy.float(), rtol=0.05, atol=0.05)
    target[5] = 7
    for call in (of_layer, lambda *a: ours.linear_log_prob_and_entropy(*a[:3])):
        with pytest.raises(IndexError, match=r"Target 7 .* target\[5\]; allowed are 0 to 4"):
            call(x, w, target, None)
        with pytest.raises(RuntimeError, match="expected input of shape"):
            call(x, w[:, :2], target, None)
        with pytest.raises(RuntimeError, match="expected logits of shape"):
            call(x, w, target[:2], None)
    with pytest.raises(RuntimeError, match=r"linear_bias of shape \(5,\)"):
        of_layer(x, w, target, torch.ones(4))
