"""The same of the logits that a linear layer makes, which are never all in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import functional as F

from ..front.circumstances import is_foreign
from ..kernels.layout import is_released, released_error
from ..kernels.linear import OutcomesOfLayer
from ._log_prob_and_entropy import LogProbAndEntropy, backend_of, check, check_range, plain

__all__ = ["linear_log_prob_and_entropy"]

_linear = F.linear


class _Outcomes(torch.autograd.Function):
    """Of the rows of a layer, by a compiled backend. Only their sums are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, backend: Any, x: Tensor, w: Tensor, target: Tensor, b: Tensor | None
    ) -> tuple[Tensor, ...]:
        *found, kept = OutcomesOfLayer(backend, x, w, target, b).forward()
        ctx.backend = backend
        # Who reads saved_tensors finds no None.
        ctx.save_for_backward(x, w, target, kept, *([] if b is None else [b]))
        ctx.mark_non_differentiable(found[-1])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if is_dynamo_compiling():  # compiled autograd reads this function
            from ..front.untraced import backward

            return backward(_Outcomes, ctx, *grad_outputs)
        x, w, target, kept, *bias = ctx.saved_tensors
        b = bias[0] if bias else None
        grads, needs = grad_outputs[:3], ctx.needs_input_grad[1:]
        for t in (x, w, target, *bias):
            if is_released(t):
                raise released_error("a tensor that outcomes have been computed from", t)
        if torch.is_grad_enabled() or is_foreign(grads):  # create_graph and the like
            create = torch.is_grad_enabled()
            with torch.enable_grad():
                again: list[Any] = [t.view_as(t) for t in (x, w, *bias)]
                found = plain(_linear(*again), target)[:3]
            wanted = [t for t, k in zip(again, (0, 1, 3), strict=False) if needs[k]]
            given = iter(torch.autograd.grad(found, wanted, grads, create_graph=create))
            return None, *[next(given) if need else None for need in needs]
        layer = OutcomesOfLayer(ctx.backend, x, w, target, b)
        return None, *layer.backward(kept, torch.stack(grads), needs)


def linear_log_prob_and_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None
) -> LogProbAndEntropy:
    r"""Log-probability of a class, entropy, log-sum-exp and argmax of a linear layer's logits.

    ``log_prob_and_entropy(linear(input, linear_weight, linear_bias), target)``, but the logits are
    computed some rows at a time, and again in the backward pass.

    Args:
        input: samples, (…, in_features); float64, float32, bfloat16 or float16.
        linear_weight: (C, in_features).
        target: class indices, (…), int64.
        linear_bias: (C,).

    Returns:
        See :func:`fastopt.nn.functional.log_prob_and_entropy`.

    Raises:
        IndexError: a class index out of range; names it and its place. On a GPU it fails a
            device-side assert.
        RuntimeError, TypeError: shapes or dtypes that don't go together.

    Example:
        >>> said = fastopt.nn.functional.linear_log_prob_and_entropy(hidden, head.weight, actions)

    Reference: :func:`torch.nn.functional.linear` and :func:`torch.log_softmax`, gathered at the
    target.
    """
    tensors = (input, linear_weight, target, linear_bias)
    if not all(isinstance(t, Tensor) for t in tensors if t is not linear_bias):
        raise TypeError("input, linear_weight and target must be tensors")
    if linear_weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise RuntimeError(
            f"expected input of shape (…, F) and linear_weight of shape (C, F), got "
            f"{tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"expected linear_bias of shape {tuple(linear_weight.shape[:1])}, got "
            f"{tuple(linear_bias.shape)}"
        )
    # One that has the logits' shape, and no memory.
    logits = input.new_empty(()).expand(*input.shape[:-1], len(linear_weight))
    check(logits, target)
    check_range(target, logits)
    backend = None
    autocasts = torch.is_autocast_enabled(input.device.type)
    dtypes = {t.dtype for t in (input, linear_weight, linear_bias) if t is not None}
    if input.shape[-1] and len(dtypes) == 1 and not autocasts and not is_compiling():
        backend = backend_of("linear_log_prob_and_entropy", tensors, logits.numel())
    if backend is None:
        return plain(_linear(input, linear_weight, linear_bias), target)
    rows = input.reshape(target.numel(), input.shape[-1])
    found = _Outcomes.apply(  # type: ignore[no-untyped-call]
        backend, rows, linear_weight, target.reshape(-1).contiguous(), linear_bias
    )
    return LogProbAndEntropy(*[t.view(target.shape) for t in found])
