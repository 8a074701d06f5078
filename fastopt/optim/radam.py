"""RAdam."""

from __future__ import annotations

from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["RAdam"]


class RAdamUpdate(Update):
    """decoupled is 1 if the weight decay is, else 0.

    root is √(1 - beta2**t); rectified is √r, with the r of the class below, where the average is
    long enough for a variance, else 0. decay is the coupled weight decay, kept the factor on the
    parameter of the decoupled one.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float
    derived = ("step_size", "beta1_rest", "beta2_rest", "root", "rectified", "decay", "kept")

    def at_step(h, step: Any) -> Any:
        power = m.power(h.beta2, step)
        longest = 2.0 / (1.0 - h.beta2) - 1.0
        length = longest - 2.0 * step * power / (1.0 - power)
        r = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        return (
            h.lr / (1.0 - m.power(h.beta1, step)),
            1.0 - h.beta1,
            1.0 - h.beta2,
            m.sqrt(1.0 - power),
            m.where(length > 5.0, m.sqrt(m.abs(r)), 0.0),
            m.where(h.decoupled != 0.0, 0.0, h.weight_decay),
            m.where(h.decoupled != 0.0, 1.0 - h.lr * h.weight_decay, 1.0),
        )

    def update(h: Any, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any) -> Any:
        grad = grad * h.grad_scale
        param = param * h.kept
        grad = m.where(h.decay != 0.0, grad + h.decay * param, grad)
        # Torch's lerp, whose two forms differ where the gradient is infinite.
        from_old = exp_avg + h.beta1_rest * (grad - exp_avg)
        from_new = grad - h.beta1 * (grad - exp_avg)
        exp_avg = m.where(h.beta1_rest < 0.5, from_old, from_new)
        exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_rest * grad * grad
        change = h.step_size * exp_avg
        # Factor by factor as torch has them: where one is infinite and one 0, so is the product.
        adaptive = change * m.divide(h.root, m.sqrt(exp_avg_sq) + h.eps) * h.rectified
        return param - m.where(h.rectified != 0.0, adaptive, change), exp_avg, exp_avg_sq


class RAdam(PlannedStep, torch.optim.RAdam):
    r"""RAdam: Adam whose first steps, as long as there is no variance yet, are plain momentum.

    With gradient g (negated if ``maximize``) at step t, per element:

    .. code-block:: text

        g ← g + weight_decay · p         or, decoupled, p ← p · (1 - lr · weight_decay)
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        ρ∞ = 2 / (1 - β₂) - 1,  ρ = ρ∞ - 2 t β₂ᵗ / (1 - β₂ᵗ)
        r = (ρ - 4)(ρ - 2) ρ∞ / ((ρ∞ - 4)(ρ∞ - 2) ρ)
        u ← √r √(1 - β₂ᵗ) / (√v + eps)  if ρ > 5  else  1
        p ← p - lr / (1 - β₁ᵗ) · m · u

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        betas: (β₁, β₂).
        eps, weight_decay, maximize: as above.
        decoupled_weight_decay: the second kind of weight decay, as in AdamW.
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
        >>> optimizer = fastopt.optim.RAdam(model.parameters(), lr=1e-3)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.RAdam`; Liu et al., https://arxiv.org/abs/1908.03265
    """

    _operation = "RAdam"
    _record = RAdamUpdate
    _takes_tensors = _foreach_takes_tensors = False
    _rates = ("betas",)

    def _hyper(self, group: dict[str, Any], begins: bool) -> RAdamUpdate:
        beta1, beta2 = group["betas"]
        return RAdamUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=float(bool(group["decoupled_weight_decay"])),
        )
