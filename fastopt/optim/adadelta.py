"""Adadelta."""

from __future__ import annotations

from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["Adadelta"]


class AdadeltaUpdate(Update):
    """rho_rest is 1 - rho."""

    lr: float
    rho: float
    rho_rest: float
    eps: float
    weight_decay: float

    def update(h, param: Any, grad: Any, square_avg: Any, acc_delta: Any) -> Any:
        grad = grad * h.grad_scale
        grad = m.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
        square_avg = h.rho * square_avg + h.rho_rest * grad * grad
        delta = m.divide(m.sqrt(acc_delta + h.eps), m.sqrt(square_avg + h.eps)) * grad
        acc_delta = h.rho * acc_delta + h.rho_rest * delta * delta
        return param - h.lr * delta, square_avg, acc_delta


class Adadelta(PlannedStep, torch.optim.Adadelta):
    r"""Adadelta.

    With gradient g (negated if ``maximize``), per element:

    .. code-block:: text

        g ← g + weight_decay · p
        v ← rho · v + (1 - rho) g²
        d ← √(u + eps) / √(v + eps) · g
        u ← rho · u + (1 - rho) d²
        p ← p - lr · d

    Args:
        params: parameters, or groups of them as dicts.
        lr: factor on the steps, a number or a one-element tensor.
        rho, eps, weight_decay, maximize: as above.
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
        >>> optimizer = fastopt.optim.Adadelta(model.parameters(), lr=1.0)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Adadelta`; Zeiler, https://arxiv.org/abs/1212.5701
    """

    _operation = "Adadelta"
    _record = AdadeltaUpdate
    _takes_tensors = _foreach_takes_tensors = False

    def _hyper(self, group: dict[str, Any], begins: bool) -> AdadeltaUpdate:
        return AdadeltaUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            rho=group["rho"],
            rho_rest=1 - group["rho"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
