"""Rprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _to_scalar

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["Rprop"]


class RpropUpdate(Update):
    """less and more are the factors on a step size, least and most its limits."""

    less: float
    more: float
    least: float
    most: float

    def update(h, param: Any, grad: Any, prev: Any, step_size: Any) -> Any:
        grad = grad * h.grad_scale
        turn = m.sign(grad * prev)
        factor = m.where(turn > 0.0, h.more, m.where(turn < 0.0, h.less, 1.0))
        step_size = m.minimum(m.maximum(step_size * factor, h.least), h.most)
        grad = m.where(turn < 0.0, 0.0, grad)
        return param - m.sign(grad) * step_size, grad, step_size


class Rprop(PlannedStep, torch.optim.Rprop):
    r"""Rprop: steps by the sign of a gradient, of a size that follows how often the sign turns.

    With gradient g (negated if ``maximize``), per element:

    .. code-block:: text

        s ← s · η₊  if g · g' > 0,   s · η₋  if g · g' < 0,  else  s      (lr at the first step)
        s ← min(max(s, smallest), largest)
        g ← 0  if g · g' < 0
        p ← p - sign(g) · s,   g' ← g

    Args:
        params: parameters, or groups of them as dicts.
        lr: the first step size, a number or a one-element tensor.
        etas: (η₋, η₊).
        step_sizes: (smallest, largest).
        maximize: as above.
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
        >>> optimizer = fastopt.optim.Rprop(model.parameters(), lr=1e-2)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Rprop`; Riedmiller and Braun, 1993
    """

    _operation = "Rprop"
    _record = RpropUpdate
    _takes_tensors = _foreach_takes_tensors = False

    def _hyper(self, group: dict[str, Any], begins: bool) -> RpropUpdate:
        (less, more), (least, most) = group["etas"], group["step_sizes"]
        return RpropUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            less=less,
            more=more,
            least=least,
            most=most,
        )

    def _refuse(self, group: dict[str, Any]) -> str | None:
        less, more = group["etas"]
        return None if 0 < less < 1 < more else f"etas={(less, more)} out of order"

    def _begin(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        if name == "prev":
            return super()._begin(name, param, group)
        like: Any = param.grad
        return torch.full_like(like, _to_scalar(group["lr"]))
