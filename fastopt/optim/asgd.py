"""ASGD."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import _to_scalar

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["ASGD"]


class ASGDUpdate(Update):
    """rate is this step's η, share the average's μ, kept the factor on the parameter.

    rounds is 1 if a new η is rounded to the counter's dtype, whatever its own is.
    """

    lr: float
    lambd: float
    alpha: float
    t0: float
    weight_decay: float
    rounds: float
    scalars = ("eta", "mu")
    derived = ("rate", "share", "kept")

    def next_numbers(h, step: Any, eta: Any, mu: Any) -> Any:
        rate = h.lr / m.power(1.0 + h.lambd * h.lr * step, h.alpha)
        share = 1.0 / m.maximum(step - h.t0, 1.0)
        return m.where(h.rounds != 0.0, m.rounded(rate, step), rate), m.rounded(share, step)

    def at_step(h, step: Any, eta: Any, mu: Any, next_eta: Any, next_mu: Any) -> Any:
        return eta, mu, 1.0 - h.lambd * eta

    def update(h: Any, param: Any, grad: Any, ax: Any) -> Any:
        grad = grad * h.grad_scale
        grad = m.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
        param = param * h.kept - h.rate * grad
        return param, m.where(h.share != 1.0, ax + (param - ax) * h.share, param)


class ASGD(PlannedStep, torch.optim.ASGD):
    r"""ASGD: stochastic gradient descent that keeps the average of its parameters.

    With gradient g (negated if ``maximize``) at step t, per element:

    .. code-block:: text

        g ← g + weight_decay · p
        p ← p · (1 - lambd · η) - η · g
        a ← a + μ (p - a)
        η ← lr / (1 + lambd · lr · t)^alpha                                   (lr at first)
        μ ← 1 / max(1, t - t0)                                                (1 at first)

    η and μ are those of the step before: a learning rate that a scheduler changes counts one step
    late, as in torch. The averages a are the states ``"ax"``.

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        lambd, alpha, t0, weight_decay, maximize: as above.
        foreach: torch's choice among its own implementations. The compiled step, one launch
            for all tensors, stands for each of them.
        capturable: a step can be captured in a CUDA graph.
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
        >>> optimizer = fastopt.optim.ASGD(model.parameters(), lr=1e-2)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.ASGD`; Polyak and Juditsky,
        https://dl.acm.org/citation.cfm?id=131098
    """

    _operation = "ASGD"
    _record = ASGDUpdate
    _counts_there = True
    _takes_tensors = _foreach_takes_tensors = False

    def _refuse(self, group: dict[str, Any]) -> str | None:
        lambd: Any = group["lambd"]
        return None if lambd >= 0 else f"lambd={lambd} below 0"

    def _hyper(self, group: dict[str, Any], begins: bool) -> ASGDUpdate:
        lr = group["lr"]
        wide = isinstance(lr, torch.Tensor) and lr.dtype == torch.float64
        return ASGDUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=lr,
            lambd=group["lambd"],
            alpha=group["alpha"],
            t0=group["t0"],
            weight_decay=group["weight_decay"],
            rounds=float(not wide),
        )

    def _first_number(self, name: str, group: dict[str, Any]) -> float:
        return float(_to_scalar(group["lr"])) if name == "eta" else 1.0
