"""Divergences of a student's softmax from a teacher's: against the maths in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import BACKEND, INTERPRETED
from torch import Tensor
from torch.testing import assert_close

import fastopt
import fastopt.nn.functional as ours
from fastopt.errors import BackendUnavailable

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: Within a block, a block and some more, several, enough for two threads; and the smallest.
CLASSES = (1, 7, 150, 4099) if INTERPRETED else (1, 7, 150, 2049, 9001)
#: Each beta's own formula, each dtype.
FORMS = ((FLOAT, 0.0), (FLOAT, 0.3), (FLOAT, 1.0), (DOUBLE, 0.3), (BFLOAT, 0.0), (HALF, 1.0))


def served(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    with fastopt.use_backend(BACKEND):
        return ours.distillation_loss(student, teacher, **options)


def maths(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> tuple[Tensor, ...]:
    """In float64: a value for each position, and its derivatives by the student's logits."""
    log_p, log_q = [(x.double() / temperature).log_softmax(-1) for x in (student, teacher)]
    p, q = log_p.exp(), log_q.exp()

    def divergence(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return (a * (log_a - log_b)).where(a != 0, 0.0).sum(-1, keepdim=True)

    if beta == 0:
        value, slope = divergence(q, log_q, log_p), p - q
    else:
        log_m = log_q if beta == 1 else ((1 - beta) * p + beta * q).log()
        value = of_student = divergence(p, log_p, log_m)
        slope = (p * (log_p - log_m - of_student)).where(p != 0, 0.0)
        if beta != 1:
            value = beta * divergence(q, log_q, log_m) + (1 - beta) * of_student
            slope = (1 - beta) * slope
    return value.squeeze(-1), slope / temperature


def check(
    student: Tensor, teacher: Tensor, temperature: float, beta: float, backend: str = BACKEND
) -> None:
    dtype, x = student.dtype, student.detach().requires_grad_()
    with fastopt.use_backend(backend):
        found = ours.distillation_loss(
            x, teacher, temperature=temperature, beta=beta, reduction="none"
        )
    value, slope = maths(student.detach(), teacher, temperature, beta)
    assert found.shape == student.shape[:-1]
    assert found.dtype == torch.promote_types(dtype, FLOAT)
    digits = 1e-12 if dtype == DOUBLE else 4e-6
    assert_close(found.double(), value, rtol=digits, atol=digits)
    upstream = torch.randn(found.shape, dtype=found.dtype)
    (grad,) = torch.autograd.grad(found, x, upstream)
    assert grad.dtype == dtype
    right = slope * upstream.double().unsqueeze(-1)
    once = max(digits, torch.finfo(dtype).eps)  # rounded once, to its dtype
    assert_close(grad.double(), right, rtol=once, atol=2 * digits / temperature)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("dtype", "beta"), FORMS)
def test_values_and_gradients(dtype: torch.dtype, beta: float) -> None:
    for classes, temperature in zip(CLASSES, (1.0, 0.5, 3.0, 1.0, 2.0), strict=False):
        student, teacher = (torch.randn(2, 2, 4, classes, dtype=DOUBLE) * 4).to(dtype)
        check(student, teacher, temperature, beta)


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize(("dtype", "beta"), FORMS[:4])
def test_extremes(dtype: torch.dtype, beta: float, backend: str) -> None:
    """No class of probability 0 contributes, wherever it is."""
    classes = CLASSES[-1]
    x, y = torch.randn(2, 8, classes, dtype=dtype)
    x[0, : classes // 2] = y[0, : classes // 2] = -torch.inf
    x[1, :] = y[1, :] = -torch.inf
    x[1, -2:] = y[1, -1] = 2.0
    x[2, 17], y[2, 17] = 60.0, 24.0
    x[3] = 3.0
    x[4], y[4] = torch.linspace(-500, 500, classes), torch.linspace(200, -200, classes)
    x[5] *= 1e20
    y[5] = x[5] * 0.5
    x[6, 3:5], y[6, 4:6] = -torch.inf, -torch.inf
    x[7] = y[7] + 1000.0
    if beta == 0:
        x[6, 3] = 0.0  # else infinite, see below
    if beta == 1:
        y[6, 5] = y[1, -2] = 0.0
    check(x, y, 1.5, beta, backend)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_infinite_divergences(beta: float) -> None:
    x, y = torch.randn(2, 3, 40)
    (x if beta == 0 else y)[1, 7] = -torch.inf
    found = served(x.requires_grad_(), y, beta=beta, reduction="none")
    value, slope = maths(x.detach(), y, 1.0, beta)
    assert_close(found.double(), value, rtol=4e-6, atol=4e-6)
    assert found.isposinf().tolist() == [False, True, False]
    if beta == 0:  # p - q, whatever the value
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert_close(grad.double(), slope, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_numbers_that_are_none(beta: float) -> None:
    x, y = torch.randn(2, 6, 40)
    x[0, 7] = y[1, 7] = torch.nan
    x[2, 5] = y[3, 5] = torch.inf
    x[4] = -torch.inf
    found = served(x.requires_grad_(), y, beta=beta, reduction="none")
    assert found.isnan().tolist() == [True] * 5 + [False]
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad[:5].isnan().any(-1).all()
    value, slope = maths(x[5].detach(), y[5], 1.0, beta)
    assert_close(found[5].double(), value, rtol=4e-6, atol=4e-6)
    assert_close(grad[5].double(), slope, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_student_that_is_the_teacher(beta: float) -> None:
    """Nothing is left, where a sum of rounded numbers might be below 0."""
    x = (torch.randn(3, 500) * 5).requires_grad_()
    loss = served(x, x.detach(), beta=beta, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0.0
    assert grad.eq(0.0).all()


@pytest.mark.parametrize("beta", [1e-12, 1 - 1e-12])
def test_a_mixture_of_hardly_anything(beta: float) -> None:
    """Of 1 - beta float32 would have no digit, and its logarithm be infinite."""
    x, y = torch.linspace(-90, 90, 300), torch.linspace(90, -90, 300)
    value, _ = maths(x, y, 1.0, beta)
    assert_close(served(x, y, beta=beta, reduction="none").double(), value, rtol=0.1, atol=0)


def test_layouts_and_sizes() -> None:
    draw = lambda *shape: torch.randn(*shape, dtype=DOUBLE)  # noqa: E731
    check(draw(50, 6, 4).permute(2, 1, 0), draw(4, 6, 50), 1.0, 0.3)
    check(draw(40), draw(40), 1.0, 0.3)
    check(draw(8, 100)[::2, 10:60], draw(12, 100)[::3, 7:57], 1.0, 0.3)
    check(draw(5, 100), draw(100).expand(5, 100), 1.0, 0.3)
    check(draw(6, 200)[:, ::2], draw(6, 100), 1.0, 0.3)
    check(draw(0, 40), draw(0, 40), 1.0, 0.3)


def test_reductions() -> None:
    x, y = torch.randn(2, 3, 5, 40)
    value, slope = maths(x, y, 1.0, 0.0)
    x.requires_grad_()
    for options, share in (({"reduction": "sum"}, 1.0), ({}, 1 / 15)):
        loss = served(x, y, **options)
        assert_close(loss.double(), value.sum() * share, rtol=4e-6, atol=0)
        (grad,) = torch.autograd.grad(2.0 * loss, x)
        assert_close(grad.double(), 2.0 * share * slope, rtol=4e-6, atol=4e-6)
    assert served(x[:0], y[:0]).isnan()
    assert served(x[:0], y[:0], reduction="sum") == 0.0


def test_second_derivatives_transforms_and_a_second_backward() -> None:
    x, y = torch.randn(2, 3, 5, dtype=DOUBLE)
    call = lambda x: served(x, y, beta=0.3, temperature=2.0)  # noqa: E731
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, leaf)
    assert torch.autograd.gradgradcheck(call, leaf)
    loss = call(leaf)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)
    free = lambda x: ours.distillation_loss(x, y, beta=0.3, temperature=2.0)  # noqa: E731
    assert_close(torch.func.grad(free)(x), first[0])
    rows = torch.vmap(lambda x, y: ours.distillation_loss(x, y, beta=0.3, temperature=2.0))(x, y)
    assert_close(rows.mean(), loss)
    compiled = torch.compile(ours.distillation_loss, backend="eager")
    for temperature in (2.0, 3.0, 4.0):
        assert_close(
            compiled(x, y, temperature=temperature, beta=0.3),
            served(x, y, temperature=temperature, beta=0.3),
        )


def test_a_teacher_that_learns() -> None:
    x, y = torch.randn(2, 3, 5, dtype=DOUBLE)
    leaves = x.requires_grad_(), y.clone().requires_grad_()
    for beta in (0.0, 0.3, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, y, beta=beta: ours.distillation_loss(x, y, beta=beta), leaves
        )
    with pytest.raises(BackendUnavailable, match="a gradient to the teacher_logits"):
        served(*leaves)


def test_no_gradient_is_computed_that_is_not_wanted() -> None:
    x, y = torch.randn(2, 3, 50)
    x.requires_grad_()
    with torch.no_grad():
        assert not served(x, y).requires_grad
    before = x.detach().clone(), y.clone()
    backend = fastopt.dispatch.load(BACKEND)
    name = "divergence_gradient"
    with mock.patch.object(backend, name, wraps=getattr(backend, name)) as gradient:
        served(x, y).backward()
    assert gradient.call_count == 1
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_bad_input() -> None:
    x = torch.randn(2, 3, 50)
    for call in (served, ours.distillation_loss):
        with pytest.raises(TypeError, match="must be tensors, not Tensor and list"):
            call(x, [1.0])
        with pytest.raises(RuntimeError, match=r"one shape \(…, C\), got \(2, 3, 50\) and \(3, 50"):
            call(x, x[0])
        for empty in (x[..., :0], x[0, 0, 0]):
            with pytest.raises(RuntimeError, match=r"one shape \(…, C\)"):
                call(empty, empty)
        for other in (x.double(), x.bfloat16()):
            with pytest.raises(RuntimeError, match=f"got torch.float32 and {other.dtype}"):
                call(x, other)
        with pytest.raises(RuntimeError, match=r"among torch\.float64, .*got torch\.int64"):
            call(x.long(), x.long())
        for temperature in (0.0, -1.0, float("inf"), float("nan")):
            words = rf"temperature={temperature} \(allowed: positive finite numbers\)"
            with pytest.raises(ValueError, match=words):
                call(x, x, temperature=temperature)
        for beta in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=rf"beta={beta} \(allowed: 0 to 1\)"):
                call(x, x, beta=beta)
        for name, value in (("temperature", "2"), ("beta", torch.tensor(0.5)), ("beta", True)):
            words = f"{name} must be a number, not {type(value).__name__}"
            with pytest.raises(TypeError, match=words):
                call(x, x, **{name: value})
        with pytest.raises(ValueError, match=r"reduction='batchmean' \(allowed: none, mean, sum"):
            call(x, x, reduction="batchmean")


@pytest.mark.skipif(BACKEND != "numba", reason="on a GPU there are no small calls")
def test_which_backend() -> None:
    x, y = torch.randn(2, 2, 50)
    (decision,) = fastopt.explain(ours.distillation_loss, x, y, beta=0.5)
    assert decision.backend == "reference"
    (decision,) = fastopt.explain(ours.distillation_loss, x.repeat(2000, 1), y.repeat(2000, 1))
    assert decision.backend == "numba"
    assert decision.request.operation == "distillation_loss"
    with pytest.raises(ValueError, match="beta=2"):
        fastopt.explain(ours.distillation_loss, x, y, beta=2)
