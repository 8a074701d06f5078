"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["SGD"]


class SGDUpdate(Update):
    """grad_share is 1 - dampening, or 1 at the first step of a momentum buffer."""

    lr: float
    momentum: float
    grad_share: float
    weight_decay: float
    nesterov: float
    variants = ({"lr": 0.01}, {"lr": 0.01, "momentum": 0.9})

    def update(h, param: Any, grad: Any, momentum_buffer: Any) -> Any:
        grad = grad * h.grad_scale
        grad = m.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
        if momentum_buffer is not None:
            momentum_buffer = h.momentum * momentum_buffer + h.grad_share * grad
            ahead = grad + h.momentum * momentum_buffer
            grad = m.where(h.nesterov != 0.0, ahead, momentum_buffer)
        return param - h.lr * grad, momentum_buffer


class SGD(PlannedStep, torch.optim.SGD):
    r"""Stochastic gradient descent, with momentum, Nesterov momentum and weight decay.

    With gradient g (negated if ``maximize``), per element:

    .. code-block:: text

        g ← g + weight_decay · p
        b ← momentum · b + (1 - dampening) · g        (b = g at the first step)
        g ← g + momentum · b  if nesterov else  b     (only with momentum)
        p ← p - lr · g

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        momentum, dampening, weight_decay, nesterov, maximize: as above.
        foreach, fused: torch's choices among its own implementations. The compiled step,
            one launch for all tensors, stands for each of them.
        differentiable: step within autograd; runs torch's own code.
        max_grad_norm: the norm that a step scales its gradients down to, all alike, or None;
            they stay as they are, and their norm is then in ``grad_norm``.
        state_dtype, rounding, seed: states in bfloat16, and how parameters of 16 bits are stored
            (docs/fewer_bytes.md); None is as torch does.

    Parameters may be float64, float32, bfloat16 or float16, of any dense layout; all others
    are updated by torch's own code. ``explain`` says which.

    Raises:
        ValueError, RuntimeError: as torch does, for invalid hyperparameters.

    Example:
        >>> optimizer = fastopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.SGD`
    """

    _operation = "SGD"
    _record = SGDUpdate
    _takes_halves = True
    _counts_steps = False

    def _active(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["momentum"] != 0 else ()

    def _hyper(self, group: dict[str, Any], begins: bool) -> SGDUpdate:
        return SGDUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            momentum=group["momentum"],
            grad_share=1.0 if begins else 1.0 - group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=float(bool(group["nesterov"])),
        )
