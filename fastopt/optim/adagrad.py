"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["Adagrad"]


class AdagradUpdate(Update):
    lr: float
    lr_decay: float
    eps: float
    weight_decay: float
    derived = ("step_size",)

    def at_step(h, step: Any) -> Any:
        return (h.lr / (1.0 + (step - 1.0) * h.lr_decay),)

    def update(h: Any, param: Any, grad: Any, sum: Any) -> Any:
        grad = grad * h.grad_scale
        grad = m.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
        sum = sum + grad * grad
        return param - m.divide(h.step_size * grad, m.sqrt(sum) + h.eps), sum


class Adagrad(PlannedStep, torch.optim.Adagrad):
    r"""Adagrad, with a learning rate that may decay.

    With gradient g (negated if ``maximize``) at step t, per element:

    .. code-block:: text

        g ← g + weight_decay · p
        s ← s + g²                                  (initial_accumulator_value at first)
        p ← p - lr / (1 + (t - 1) · lr_decay) · g / (√s + eps)

    As in torch, states are made in the constructor: a parameter that is added later needs one.

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as above.
        foreach, fused: torch's choices among its own implementations. The compiled step, one launch
            for all tensors, stands for each of them.
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
        >>> optimizer = fastopt.optim.Adagrad(model.parameters(), lr=1e-2)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Adagrad`; Duchi, Hazan and Singer,
        https://jmlr.org/papers/v12/duchi11a.html
    """

    _operation = "Adagrad"
    _record = AdagradUpdate
    _takes_tensors = False
    _made_early = True
