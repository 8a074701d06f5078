"""Adam."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..kernels import hyper
from ._planned import PlannedStep

__all__ = ["Adam"]


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
    _record = hyper.Adam
    _slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _rates = ("betas",)
    _foreach_takes_tensors = False

    def _active(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["amsgrad"] else self._slots[:2]

    def _hyper(self, group: dict[str, Any], begins: bool) -> hyper.Adam:
        return adam_hyper(group, decoupled=False)

    def _rounds(self, group: dict[str, Any]) -> bool:
        return adam_rounds(group)

    def _rounded_hyper(self, group: dict[str, Any], step: float) -> hyper.Adam:
        return rounded(self._hyper(group, False), group, step)


def adam_hyper(group: dict[str, Any], decoupled: bool) -> hyper.Adam:
    """The record of Adam or AdamW; decoupled counts in a torch whose groups don't say it."""
    beta1, beta2 = group["betas"]
    return hyper.Adam(
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


def rounded(record: hyper.Adam, group: dict[str, Any], step: float) -> hyper.Adam:
    """The record of which a kernel derives the numbers that torch has at a step."""
    lr, decay = group["lr"], group["weight_decay"]
    correction = 1 - record.beta1**step
    exact = float(lr / correction) * correction
    if record.decoupled and exact:
        decay = (1 - float(1 - lr * decay)) / exact
    return record._replace(lr=exact, weight_decay=float(decay))
