"""Distillation from logits: how far a student's softmax is from a teacher's."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import dispatch
from .. import formula as m
from ..dispatch import Decision
from ..front.analysis import Call, prepare
from ..front.call import backend_for
from ..front.circumstances import is_foreign
from ..front.opaque import GraphBackend, define, define_composed
from ..kernels.distillation import KEPT, Divergence
from ..kernels.layout import as_rows, is_released, released_error

__all__ = ["distillation_loss"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")


def divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) of rows, in torch's operations."""
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


class _Distillation(Divergence):
    """The base of the three, which besides have a `definition` in torch's operations."""

    _abstract = True
    crossover = 131_072
    compiled_crossover = 4_194_304

    def definition(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError


class ForwardKL(_Distillation):
    """KL(q‖p)."""

    def definition(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence(log_q, log_p)

    def fold(h, p: Any, q: Any, gap: Any) -> Any:
        return (q * m.where(q == 0.0, 0.0, gap),)

    def finish(h, total: Any) -> Any:
        return total, 0.0

    def slopes(h, known: Any, p: Any, q: Any, gap: Any) -> Any:
        return p - q


class ReverseKL(_Distillation):
    """KL(p‖q)."""

    def definition(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence(log_p, log_q)

    def fold(h, p: Any, q: Any, gap: Any) -> Any:
        return (p * m.where(p == 0.0, 0.0, -gap),)

    def finish(h, total: Any) -> Any:
        return total, total

    def slopes(h, known: Any, p: Any, q: Any, gap: Any) -> Any:
        return p * m.where(p == 0.0, 0.0, -gap - known)


def to_mixture(beta: Any, rest: Any, gap: Any) -> Any:
    """log p - log m and log q - log m, for a gap of log q - log p.

    m is taken relative to the larger of p and q, and near 1 as what it lacks of it, so that of two
    equal ones there is nothing left.
    """
    ratio, rises = m.exp(-m.abs(gap)), gap > 0.0
    larger, smaller = m.where(rises, beta, rest), m.where(rises, rest, beta)
    near, far = 1.0 - smaller * (1.0 - ratio), larger + smaller * ratio
    log_share = m.log(m.where(ratio > 0.5, near, far))
    return -m.where(rises, gap, 0.0) - log_share, m.where(rises, 0.0, gap) - log_share


class GeneralisedJSD(_Distillation):
    """beta KL(q‖m) + rest KL(p‖m) with m = rest p + beta q, where rest is 1 - beta."""

    beta: float = 0.5
    rest: float = 0.5
    sums = 2

    def definition(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither = (log_p == -torch.inf) & (log_q == -torch.inf)  # logaddexp's derivative is NaN
        from_p, from_q = [log.masked_fill(neither, 0.0) for log in (log_p, log_q)]
        log_m = torch.logaddexp(from_p + math.log(self.rest), from_q + math.log(self.beta))
        return self.beta * divergence(log_q, log_m) + self.rest * divergence(log_p, log_m)

    def fold(h, p: Any, q: Any, gap: Any) -> Any:
        of_p, of_q = to_mixture(h.beta, h.rest, gap)
        return q * m.where(q == 0.0, 0.0, of_q), p * m.where(p == 0.0, 0.0, of_p)

    def finish(h, of_teacher: Any, of_student: Any) -> Any:
        return h.beta * of_teacher + h.rest * of_student, of_student

    def slopes(h, known: Any, p: Any, q: Any, gap: Any) -> Any:
        of_p, _ = to_mixture(h.beta, h.rest, gap)
        return h.rest * (p * m.where(p == 0.0, 0.0, of_p - known))


def record_of(temperature: float, beta: float) -> _Distillation:
    if beta == 0:
        return ForwardKL(temperature)
    return ReverseKL(temperature) if beta == 1 else GeneralisedJSD(temperature, beta, 1 - beta)


def beta_of(record: _Distillation) -> float:
    """The other way round."""
    return (
        record.beta if isinstance(record, GeneralisedJSD) else float(isinstance(record, ReverseKL))
    )


def plain(record: _Distillation, student: Tensor, teacher: Tensor) -> Tensor:
    """The definition, a value for each position."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = [(x.to(wide) / record.temperature).log_softmax(-1) for x in (student, teacher)]
    return record.definition(log_p, log_q)


def check(student: Any, teacher: Any, temperature: Any, beta: Any, reduction: Any) -> None:
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
        raise TypeError(
            f"student_logits and teacher_logits must be tensors, not {type(student).__name__} and "
            f"{type(teacher).__name__}"
        )
    if student.dtype not in DTYPES or teacher.dtype != student.dtype:
        allowed = ", ".join(map(str, DTYPES))
        raise RuntimeError(
            f"expected student_logits and teacher_logits of one dtype among {allowed}, got "
            f"{student.dtype} and {teacher.dtype}"
        )
    if student.dim() < 1 or student.shape[-1] == 0 or teacher.shape != student.shape:
        raise RuntimeError(
            f"expected student_logits and teacher_logits of one shape (…, C), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    for name, value in (("temperature", temperature), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} (allowed: positive finite numbers)")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} (allowed: 0 to 1)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} (allowed: {', '.join(REDUCTIONS)})")


def _analyse(student: Tensor, teacher: Tensor) -> Call:
    special = ["a gradient to the teacher_logits"] if teacher.requires_grad else []
    return prepare(
        "distillation_loss", ForwardKL(), REDUCTIONS, "none", student.dtype, (student, teacher),
        special,
    )  # fmt: skip


def _run_divergences(
    x: Tensor, y: Tensor, temperature: float, beta: float, backend: str
) -> tuple[Tensor, Tensor]:
    values, kept = dispatch.load(backend).divergences(record_of(temperature, beta), x, y)
    return values, kept


def _fake_divergences(
    x: Tensor, y: Tensor, temperature: float, beta: float, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = x.new_empty((x.shape[0], KEPT), dtype=torch.float64 if backend == "numba" else wide)
    return x.new_empty(x.shape[:1], dtype=wide), kept


def _run_gradient(
    x: Tensor, y: Tensor, kept: Tensor, grads: Tensor, temperature: float, beta: float, backend: str
) -> Tensor:
    record = record_of(temperature, beta)
    found: Tensor = dispatch.load(backend).divergence_gradient(record, x, y, kept, grads)
    return found


_divergences = define(
    "divergences",
    "(Tensor x, Tensor y, float temperature, float beta, str backend) -> (Tensor, Tensor)",
    _run_divergences,
    _fake_divergences,
)
_gradient = define(
    "divergences_gradient",
    "(Tensor x, Tensor y, Tensor kept, Tensor grads, float temperature, float beta, str backend)"
    " -> Tensor",
    _run_gradient,
    lambda x, *rest: x.new_empty(x.shape),
)


class _DivergencesInGraph(GraphBackend):
    def divergences(self, record: _Distillation, x: Tensor, y: Tensor) -> Any:
        return _divergences(x, y, record.temperature, beta_of(record), self.name)

    def divergence_gradient(
        self, record: _Distillation, x: Tensor, y: Tensor, kept: Tensor, grads: Tensor
    ) -> Any:
        return _gradient(x, y, kept, grads, record.temperature, beta_of(record), self.name)


class _Divergences(torch.autograd.Function):
    """Of rows, by a compiled backend."""

    @staticmethod
    def forward(ctx: Any, backend: Any, record: _Distillation, x: Tensor, y: Tensor) -> Tensor:
        values: Tensor
        values, kept = backend.divergences(record, x, y)
        ctx.backend, ctx.record = backend, record
        ctx.save_for_backward(x, y, kept)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if is_dynamo_compiling():  # compiled autograd reads this function
            from ..front.untraced import backward

            return backward(_Divergences, ctx, *grad_outputs)
        x, y, kept = ctx.saved_tensors
        in_graph = isinstance(ctx.backend, GraphBackend)
        foreign = not in_graph and is_foreign(grad_outputs)
        if torch.is_grad_enabled() or foreign:  # create_graph and the like
            with torch.enable_grad():
                again = x.view_as(x)
                found = plain(ctx.record, again, y)
            create = torch.is_grad_enabled()
            grads = torch.autograd.grad(found, again, grad_outputs, create_graph=create)
            return None, None, *grads, None
        for t in (x, y):
            if not in_graph and is_released(t):
                raise released_error("a tensor that a divergence has been computed from", t)
        upstream = grad_outputs[0].contiguous()
        grad = ctx.backend.divergence_gradient(ctx.record, x, y, kept, upstream)
        return None, None, grad, None


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Divergence of a student's softmax from a teacher's, averaged, summed or per position.

    With :math:`p = \text{softmax}(s / T)` of the student's and :math:`q = \text{softmax}(t / T)`
    of the teacher's logits, and :math:`m = (1 - \beta) p + \beta q`:

    - :math:`\beta = 0`: :math:`\text{KL}(q \| p) = \sum_c q_c \log (q_c / p_c)`, forward KL;
    - :math:`\beta = 1`: :math:`\text{KL}(p \| q)`, reverse KL;
    - between: :math:`\beta \, \text{KL}(q \| m) + (1 - \beta) \, \text{KL}(p \| m)`, the
      generalised Jensen-Shannon divergence.

    A class of probability 0 contributes nothing. Neither softmax is stored. There is no factor of
    :math:`T^2`, with which gradients would be about as large at any temperature: multiply by it,
    ``temperature**2 * distillation_loss(...)``.

    Args:
        student_logits: (…, C), the classes last; float64, float32, bfloat16 or float16.
        teacher_logits: of the same shape and dtype. Where they require a gradient they get one,
            from the definition in torch's operations; detach them to have the kernel.
        temperature: T, positive and finite.
        beta: from 0 to 1.
        reduction: "none" gives the positions' values, "mean" their mean (NaN if there are none),
            "sum" their sum.

    Returns:
        A tensor of shape (…) for "none", else (); float64 for float64, else float32: half
        precision would lose a value's digits.

    Raises:
        RuntimeError, TypeError: shapes or dtypes that don't go together, arguments of a wrong type.
        ValueError: a temperature, beta or reduction that is not allowed.

    Example:
        >>> with torch.no_grad():
        ...     taught = teacher(tokens)
        >>> loss = fastopt.nn.functional.distillation_loss(student(tokens), taught, beta=0.5)

    Reference: Agarwal et al., On-Policy Distillation of Language Models (2024), arXiv 2306.13649;
    KL divergence of two :func:`torch.log_softmax`.
    """
    check(student_logits, teacher_logits, temperature, beta, reduction)
    by = _in_graph if is_dynamo_compiling() else _values
    values: Tensor = by(student_logits, teacher_logits, float(temperature), float(beta))
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def _values(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """Of each position."""
    record, tensors = record_of(temperature, beta), (student, teacher)
    backend = backend_for("distillation_loss", tensors, lambda: _analyse(*tensors))
    return plain(record, *tensors) if backend is None else _by(backend, record, *tensors)


def _by(backend: Any, record: _Distillation, student: Tensor, teacher: Tensor) -> Tensor:
    found: Tensor = _Divergences.apply(backend, record, as_rows(student), as_rows(teacher))  # type: ignore[no-untyped-call]
    return found.view(student.shape[:-1])


def _traced(
    backend: str, student: Tensor, teacher: Tensor, temperature: float, beta: float
) -> Tensor:
    record = record_of(temperature, beta)
    if backend == "reference":
        return plain(record, student, teacher)
    return _by(_DivergencesInGraph(backend), record, student, teacher)


_in_graph = define_composed(
    "distillation_loss", "Tensor student, Tensor teacher, float temperature, float beta", "Tensor",
    _values, lambda student, teacher, *options: _analyse(student, teacher), _traced,
)  # fmt: skip


def _decide(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    reduction: str = "mean",
) -> Decision:
    check(student_logits, teacher_logits, temperature, beta, reduction)
    return dispatch.choose(_analyse(student_logits, teacher_logits).request)


distillation_loss.decide = _decide  # type: ignore[attr-defined]
