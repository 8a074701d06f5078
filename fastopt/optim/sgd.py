"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import hyper
from ._planned import PlannedStep

__all__ = ["SGD"]


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
    _record = hyper.SGD
    _slots = ("momentum_buffer",)
    _counts_steps = False

    def _active(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["momentum"] != 0 else ()

    def _hyper(self, group: dict[str, Any], begins: bool) -> hyper.SGD:
        return hyper.SGD(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            momentum=group["momentum"],
            grad_share=1.0 if begins else 1.0 - group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=float(bool(group["nesterov"])),
        )
