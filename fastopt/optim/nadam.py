"""NAdam."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["NAdam"]

LOG = -0.04082199452025517  # of 0.96


class NAdamUpdate(Update):
    """decoupled is 1 if the weight decay is, else 0.

    grad_rate and average_rate are the learning rates of the gradient and of its average; unbias is
    1 / (1 - beta2**t). decay is the coupled weight decay, kept the factor on the parameter of the
    decoupled one. log_shrink is the logarithm of 0.96**momentum_decay.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    log_shrink: float
    decoupled: float
    scalars = ("mu_product",)
    derived = ("grad_rate", "average_rate", "beta1_rest", "beta2_rest", "unbias", "decay", "kept")

    def next_numbers(h, step: Any, mu_product: Any) -> Any:
        mu = h.beta1 * (1.0 - 0.5 * m.exp(step * h.log_shrink))
        return (mu_product * m.rounded(mu, mu_product),)

    def at_step(h, step: Any, before: Any, mu_product: Any) -> Any:
        mu = h.beta1 * (1.0 - 0.5 * m.exp(step * h.log_shrink))
        mu_next = h.beta1 * (1.0 - 0.5 * m.exp((step + 1.0) * h.log_shrink))
        return (
            h.lr * (1.0 - mu) / (1.0 - mu_product),
            h.lr * mu_next / (1.0 - mu_product * mu_next),
            1.0 - h.beta1,
            1.0 - h.beta2,
            1.0 / (1.0 - m.power(h.beta2, step)),
            m.where(h.decoupled != 0.0, 0.0, h.weight_decay),
            m.where(h.decoupled != 0.0, 1.0 - h.lr * h.weight_decay, 1.0),
        )

    def update(h: Any, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any) -> Any:
        grad = grad * h.grad_scale
        param = param * h.kept
        grad = m.where(h.decay != 0.0, grad + h.decay * param, grad)
        exp_avg = h.beta1 * exp_avg + h.beta1_rest * grad
        exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_rest * grad * grad
        change = h.grad_rate * grad + h.average_rate * exp_avg
        return param - m.divide(change, m.sqrt(exp_avg_sq * h.unbias) + h.eps), exp_avg, exp_avg_sq


class NAdam(PlannedStep, torch.optim.NAdam):
    r"""NAdam: Adam with Nesterov's momentum, whose factor grows with the steps.

    With gradient g (negated if ``maximize``) at step t, per element:

    .. code-block:: text

        g ← g + weight_decay · p         or, decoupled, p ← p · (1 - lr · weight_decay)
        μₜ = β₁ (1 - 0.96^(t · momentum_decay) / 2)
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        n = lr (1 - μₜ) / (1 - μ₁…μₜ) · g  +  lr μₜ₊₁ / (1 - μ₁…μₜ₊₁) · m
        p ← p - n / (√(v / (1 - β₂ᵗ)) + eps)

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        betas: (β₁, β₂).
        eps, weight_decay, momentum_decay, maximize: as above.
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
        >>> optimizer = fastopt.optim.NAdam(model.parameters(), lr=2e-3)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.NAdam`; Dozat,
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """

    _operation = "NAdam"
    _record = NAdamUpdate
    _takes_tensors = _foreach_takes_tensors = False
    _rates = ("betas",)

    def _hyper(self, group: dict[str, Any], begins: bool) -> NAdamUpdate:
        beta1, beta2 = group["betas"]
        return NAdamUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            log_shrink=group["momentum_decay"] * math.log(0.96),
            decoupled=float(bool(group["decoupled_weight_decay"])),
        )
