"""What a policy's logits say of an action: log-probability, entropy and more, from one read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from .. import dispatch
from ..dispatch import Decision
from ..front.analysis import Call, expected_size, prepare
from ..front.call import backend_for
from ..front.circumstances import is_foreign
from ..front.opaque import GraphBackend, define, define_composed
from ..kernels.layout import as_rows, is_released, released_error
from ..kernels.operation import Operation
from ..kernels.reference import out_of_bounds

__all__ = ["LogProbAndEntropy", "log_prob_and_entropy"]


class LogProbAndEntropy(NamedTuple):
    """What :func:`log_prob_and_entropy` gives, each of the target's shape."""

    log_prob: Tensor
    entropy: Tensor
    log_sum_exp: Tensor
    argmax: Tensor


class RowOutcomes(Operation):
    """The record of a call, which has no options."""

    operands = ("input", "target")
    crossover = 131_072
    compiled_crossover = 4_194_304


def plain(logits: Tensor, target: Tensor) -> LogProbAndEntropy:
    """The definition, in torch's operations."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sum_exp = x.logsumexp(-1)
    log_p = x - log_sum_exp.unsqueeze(-1)
    log_prob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)  # as its probability is 0
    entropy = -(log_p.exp() * finite).sum(-1)
    return LogProbAndEntropy(log_prob, entropy, log_sum_exp, logits.argmax(-1))


def check(logits: Tensor, target: Tensor) -> None:
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        raise TypeError(
            f"logits and target must be tensors, not {type(logits).__name__} and "
            f"{type(target).__name__}"
        )
    if not logits.is_floating_point():
        raise RuntimeError(f"expected logits of a floating dtype, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise RuntimeError(f"expected a target of dtype torch.int64, got {target.dtype}")
    if logits.dim() < 1 or logits.shape[-1] == 0 or target.shape != logits.shape[:-1]:
        raise RuntimeError(
            f"expected logits of shape (…, C) and a target of shape (…), got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}"
        )


def check_range(target: Tensor, logits: Tensor) -> None:
    """Raise IndexError for a class index out of range, where the host may look at it."""
    if target.is_cpu and not is_compiling() and not is_foreign((logits, target)):
        classes = logits.shape[-1]
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise out_of_bounds(target, classes, None)


def _analyse(function: str, tensors: tuple[Tensor | None, ...], numel: int) -> Call:
    """Of a call whose target is the last tensor of two, or the third; with so many logits."""
    dtype = next(t.dtype for t in tensors if t is not None)
    call = prepare(
        function,
        RowOutcomes(),
        ("none",),
        "none",
        dtype,
        tensors,
        [],
        label=min(len(tensors) - 1, 2),
    )
    return call._replace(request=call.request._replace(numel=numel))


def _run_outcomes(x: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    return tuple(dispatch.load(backend).outcomes(x, target))


def _fake_outcomes(x: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    numbers = [x.new_empty(x.shape[:1], dtype=wide) for _ in range(3)]
    kept = x.new_empty((3, x.shape[0]), dtype=torch.float64 if backend == "numba" else wide)
    return *numbers, torch.empty_like(target), kept


def _run_gradient(x: Tensor, target: Tensor, kept: Tensor, grads: Tensor, backend: str) -> Tensor:
    found: Tensor = dispatch.load(backend).gradient(x, target, kept, grads)
    return found


_outcomes = define(
    "row_outcomes",
    "(Tensor x, Tensor target, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_outcomes,
    _fake_outcomes,
)
_gradient = define(
    "row_outcomes_gradient",
    "(Tensor x, Tensor target, Tensor kept, Tensor grads, str backend) -> Tensor",
    _run_gradient,
    lambda x, *rest: x.new_empty(x.shape),
)


class _OutcomesInGraph(GraphBackend):
    def outcomes(self, x: Tensor, target: Tensor) -> Any:
        return _outcomes(x, target, self.name)

    def gradient(self, x: Tensor, target: Tensor, kept: Tensor, grads: Tensor) -> Any:
        return _gradient(x, target, kept, grads, self.name)


class _Outcomes(torch.autograd.Function):
    """Of rows, by a compiled backend."""

    @staticmethod
    def forward(ctx: Any, backend: Any, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        *found, kept = backend.outcomes(x, target)
        ctx.backend = backend
        ctx.save_for_backward(x, target, kept)
        ctx.mark_non_differentiable(found[-1])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if is_dynamo_compiling():  # compiled autograd reads this function
            from ..front.untraced import backward

            return backward(_Outcomes, ctx, *grad_outputs)
        x, target, kept = ctx.saved_tensors
        grads, in_graph = grad_outputs[:3], isinstance(ctx.backend, GraphBackend)
        foreign = not in_graph and is_foreign(grads)
        if torch.is_grad_enabled() or foreign:  # create_graph and the like
            with torch.enable_grad():
                again = x.view_as(x)
                found = plain(again, target)[:3]
            create = torch.is_grad_enabled()
            return None, *torch.autograd.grad(found, again, grads, create_graph=create), None
        for t in (x, target):
            if not in_graph and is_released(t):
                raise released_error("a tensor that outcomes have been computed from", t)
        return None, ctx.backend.gradient(x, target, kept, torch.stack(grads)), None


def backend_of(function: str, tensors: tuple[Tensor | None, ...], numel: int) -> Any:
    """The backend that serves a call, None for torch; `numel` is that of the logits."""
    return backend_for(function, tensors, lambda: _analyse(function, tensors, numel))


def log_prob_and_entropy(logits: Tensor, target: Tensor) -> LogProbAndEntropy:
    r"""Log-probability of a class, entropy, log-sum-exp and argmax of each row of logits.

    With p = softmax(x) of a row x and its class index y these are :math:`\log p_y`,
    :math:`-\sum_c p_c \log p_c`, :math:`\log \sum_c e^{x_c}` and the first of the largest logits.
    One read of the logits gives all of them, and one read and one write the gradient of the first
    three; no softmax is stored.

    Args:
        logits: (…, C), the classes last; float64, float32, bfloat16 or float16.
        target: class indices, (…), int64.

    Returns:
        A named tuple (log_prob, entropy, log_sum_exp, argmax) of tensors of target's shape. The
        first three are float64 for float64, else float32: half precision would lose their digits.

    Raises:
        IndexError: a class index out of range; names it and its place. On a GPU it fails a
            device-side assert.
        RuntimeError, TypeError: shapes or dtypes that don't go together.

    Example:
        >>> said = fastopt.nn.functional.log_prob_and_entropy(policy(tokens), actions)
        >>> loss = -(advantage * said.log_prob + 0.01 * said.entropy).mean()

    Reference: :func:`torch.log_softmax`, gathered at the target, and
    :class:`torch.distributions.Categorical`, whose entropy it is.
    """
    check(logits, target)
    if is_dynamo_compiling():
        return LogProbAndEntropy(*_in_graph(logits, target))
    backend = backend_of("log_prob_and_entropy", (logits, target), logits.numel())
    if backend is None:
        check_range(target, logits)
        return plain(logits, target)
    return _by(backend, logits, target)


def _by(backend: Any, logits: Tensor, target: Tensor) -> LogProbAndEntropy:
    rows, labels = as_rows(logits), target.reshape(-1).contiguous()
    found = _Outcomes.apply(backend, rows, labels)  # type: ignore[no-untyped-call]
    return LogProbAndEntropy(*[t.view(target.shape) for t in found])


def _decide(logits: Tensor, target: Tensor) -> Decision:
    check(logits, target)
    return dispatch.choose(_analyse_call(logits, target).request)


def _analyse_call(logits: Tensor, target: Tensor) -> Call:
    size = expected_size(logits.numel())
    return _analyse("log_prob_and_entropy", (logits, target), size)


def _traced(backend: str, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    if backend == "reference":
        return tuple(plain(logits, target))
    return tuple(_by(_OutcomesInGraph(backend), logits, target))


_in_graph = define_composed(
    "log_prob_and_entropy", "Tensor logits, Tensor target", "(Tensor, Tensor, Tensor, Tensor)",
    log_prob_and_entropy, _analyse_call, _traced,
)  # fmt: skip


log_prob_and_entropy.decide = _decide  # type: ignore[attr-defined]
