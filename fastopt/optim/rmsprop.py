"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["RMSprop"]


class RMSpropUpdate(Update):
    """alpha_rest is 1 - alpha."""

    lr: float
    alpha: float
    alpha_rest: float
    eps: float
    weight_decay: float
    momentum: float

    def update(
        h, param: Any, grad: Any, square_avg: Any, momentum_buffer: Any, grad_avg: Any
    ) -> Any:
        grad = grad * h.grad_scale
        grad = m.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
        square_avg = h.alpha * square_avg + h.alpha_rest * grad * grad
        average = square_avg
        if grad_avg is not None:
            grad_avg = h.alpha * grad_avg + h.alpha_rest * grad
            average = square_avg - grad_avg * grad_avg
            average = m.where(average < 0.0, 0.0, average)  # a variance is not, but for rounding
        root = m.sqrt(average) + h.eps
        if momentum_buffer is None:
            change = m.divide(h.lr * grad, root)
        else:
            momentum_buffer = h.momentum * momentum_buffer + m.divide(grad, root)
            change = h.lr * momentum_buffer
        return param - change, square_avg, momentum_buffer, grad_avg


class RMSprop(PlannedStep, torch.optim.RMSprop):
    r"""RMSprop, plain or centered, with momentum.

    With gradient g (negated if ``maximize``), per element:

    .. code-block:: text

        g ← g + weight_decay · p
        v ← alpha · v + (1 - alpha) g²
        a ← alpha · a + (1 - alpha) g,  u ← v - a²   if centered, else  u ← v
        d ← g / (√u + eps)
        b ← momentum · b + d                          (d itself without momentum)
        p ← p - lr · b

    A variance u that rounding has made negative counts as 0; torch's root of it is NaN.

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        alpha, eps, weight_decay, momentum, centered, maximize: as above.
        foreach: torch's choice among its own implementations. The compiled step, one launch
            for all tensors, stands for each of them.
        capturable: count steps on the GPU, so that a step can be captured in a CUDA graph.
        differentiable: step within autograd; runs torch's own code.
        max_grad_norm: the norm that a step scales its gradients down to, all alike, or None;
            they stay as they are, and their norm is then in ``grad_norm``.
        state_dtype, rounding, seed: states in bfloat16, and how parameters of 16 bits are stored
            (docs/fewer_bytes.md); None is as torch does.

    Parameters may be float64, float32, bfloat16 or float16, of any dense layout; all others
    are updated by torch's own code. ``explain`` says which.

    Raises:
        ValueError, RuntimeError: as torch does, for invalid hyperparameters and for sparse
            gradients.

    Example:
        >>> optimizer = fastopt.optim.RMSprop(model.parameters(), lr=1e-2, momentum=0.9)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.RMSprop`; Tieleman and Hinton, lecture 6.5 of
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """

    _operation = "RMSprop"
    _record = RMSpropUpdate
    _takes_halves = True
    _rates = ("alpha",)

    def _active(self, group: dict[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return ("square_avg", *momentum, *(("grad_avg",) if group["centered"] else ()))

    def _hyper(self, group: dict[str, Any], begins: bool) -> RMSpropUpdate:
        return RMSpropUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            alpha=group["alpha"],
            alpha_rest=1.0 - group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
        )
