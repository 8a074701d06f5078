"""Adamax."""

from __future__ import annotations

from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["Adamax"]


class AdamaxUpdate(Update):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    derived = ("step_size", "beta1_rest")

    def at_step(h, step: Any) -> Any:
        return h.lr / (1.0 - m.power(h.beta1, step)), 1.0 - h.beta1

    def update(h: Any, param: Any, grad: Any, exp_avg: Any, exp_inf: Any) -> Any:
        grad = grad * h.grad_scale
        grad = m.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
        exp_avg = h.beta1 * exp_avg + h.beta1_rest * grad
        exp_inf = m.maximum(h.beta2 * exp_inf, m.abs(grad) + h.eps)
        return param - m.divide(h.step_size * exp_avg, exp_inf), exp_avg, exp_inf


class Adamax(PlannedStep, torch.optim.Adamax):
    r"""Adamax: Adam by the largest gradient in place of the mean square.

    With gradient g (negated if ``maximize``) at step t, per element:

    .. code-block:: text

        g ← g + weight_decay · p
        m ← β₁ m + (1 - β₁) g
        n ← max(β₂ n, |g| + eps)
        p ← p - lr / (1 - β₁ᵗ) · m / n

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        betas: (β₁, β₂).
        eps, weight_decay, maximize: as above.
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
        >>> optimizer = fastopt.optim.Adamax(model.parameters(), lr=2e-3)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Adamax`; Kingma and Ba, https://arxiv.org/abs/1412.6980
    """

    _operation = "Adamax"
    _record = AdamaxUpdate
    _takes_tensors = _foreach_takes_tensors = False
    _rates = ("betas",)

    def _hyper(self, group: dict[str, Any], begins: bool) -> AdamaxUpdate:
        beta1, beta2 = group["betas"]
        return AdamaxUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
