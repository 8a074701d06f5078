"""Adam."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["Adam"]


class AdamUpdate(Update):
    """decoupled is 1 if the weight decay is, else 0.

    With step_size = lr / (1 - beta1**t) and root = 1 / sqrt(1 - beta2**t) an element costs one
    square root and one division. decay is the coupled weight decay, kept the factor on the
    parameter of the decoupled one.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float
    derived = ("step_size", "beta1_rest", "beta2_rest", "root", "decay", "kept")

    def at_step(h, step: Any) -> Any:
        return (
            h.lr / (1.0 - m.power(h.beta1, step)),
            1.0 - h.beta1,
            1.0 - h.beta2,
            1.0 / m.sqrt(1.0 - m.power(h.beta2, step)),
            m.where(h.decoupled != 0.0, 0.0, h.weight_decay),
            m.where(h.decoupled != 0.0, 1.0 - h.lr * h.weight_decay, 1.0),
        )

    def update(
        h: Any, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any
    ) -> Any:
        grad = grad * h.grad_scale
        param = param * h.kept
        grad = m.where(h.decay != 0.0, grad + h.decay * param, grad)
        exp_avg = h.beta1 * exp_avg + h.beta1_rest * grad
        exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_rest * grad * grad  # grad² may overflow
        second = exp_avg_sq
        if max_exp_avg_sq is not None:
            max_exp_avg_sq = m.maximum(max_exp_avg_sq, exp_avg_sq)
            second = max_exp_avg_sq
        change = m.divide(h.step_size * exp_avg, m.sqrt(second) * h.root + h.eps)
        return param - change, exp_avg, exp_avg_sq, max_exp_avg_sq


class Adam(PlannedStep, torch.optim.Adam):
    r"""Adam, with AMSGrad and both kinds of weight decay.

    With gradient g (negated if ``maximize``) at step t, per element:

    .. code-block:: text

        g ← g + weight_decay · p         or, decoupled, p ← p · (1 - lr · weight_decay)
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        u ← max(u, v)  if amsgrad else  v
        p ← p - lr / (1 - β₁ᵗ) · m / (√u / √(1 - β₂ᵗ) + eps)

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        betas: (β₁, β₂), numbers or one-element tensors.
        eps, weight_decay, amsgrad, maximize: as above.
        decoupled_weight_decay: the second kind of weight decay, as in AdamW.
        foreach, fused: torch's choices among its own implementations. The compiled step,
            one launch for all tensors, stands for each of them.
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
        >>> optimizer = fastopt.optim.Adam(model.parameters(), lr=1e-3)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Adam`; Kingma and Ba, https://arxiv.org/abs/1412.6980
    """

    _operation = "Adam"
    _record = AdamUpdate
    _takes_halves = True
    _rates = ("betas",)
    _foreach_takes_tensors = False

    def _active(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["amsgrad"] else self._slots[:2]

    def _hyper(self, group: dict[str, Any], begins: bool) -> AdamUpdate:
        return adam_hyper(group, decoupled=False)

    def _rounds(self, group: dict[str, Any]) -> bool:
        return adam_rounds(group)

    def _rounded_hyper(self, group: dict[str, Any], step: float) -> AdamUpdate:
        return rounded(self._hyper(group, False), group, step)


def adam_hyper(group: dict[str, Any], decoupled: bool) -> AdamUpdate:
    """The record of Adam or AdamW; decoupled counts in a torch whose groups don't say it."""
    beta1, beta2 = group["betas"]
    return AdamUpdate(
        grad_scale=-1.0 if group["maximize"] else 1.0,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=float(bool(group.get("decoupled_weight_decay", decoupled))),
    )


def adam_rounds(group: dict[str, Any]) -> bool:
    """Whether torch's step size and decay factor are rounded to NumPy's half precision."""
    numbers = group["lr"], group["weight_decay"]
    return any(type(n) is np.float16 for n in numbers) and not group.get("fused")


def rounded(record: AdamUpdate, group: dict[str, Any], step: float) -> AdamUpdate:
    """The record of which a kernel derives the numbers that torch has at a step."""
    lr, decay = group["lr"], group["weight_decay"]
    correction = 1 - record.beta1**step
    exact = float(lr / correction) * correction
    if record.decoupled and exact:
        decay = (1 - float(1 - lr * decay)) / exact
    return replace(record, lr=exact, weight_decay=float(decay))
