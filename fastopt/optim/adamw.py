"""AdamW."""

from __future__ import annotations

from typing import Any

import torch

from ._planned import PlannedStep
from .adam import Adam, AdamUpdate, adam_hyper, adam_rounds, rounded

__all__ = ["AdamW"]


class AdamW(PlannedStep, torch.optim.AdamW):
    r"""Adam with decoupled weight decay, p ← p · (1 - lr · weight_decay) before the update.

    Args:
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused,
            max_grad_norm, state_dtype, rounding, seed: as in :class:`fastopt.optim.Adam`, whose
            rule it shares.
        weight_decay: as above (default: 1e-2).

    Raises:
        ValueError, RuntimeError: as torch does, for invalid hyperparameters and for sparse
            gradients.

    Example:
        >>> optimizer = fastopt.optim.AdamW(model.parameters(), lr=3e-4)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.AdamW`; Loshchilov and Hutter, https://arxiv.org/abs/1711.05101
    """

    _operation = "AdamW"
    _record = AdamUpdate
    _takes_halves = True
    _rates = Adam._rates
    _foreach_takes_tensors = False

    def _active(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["amsgrad"] else self._slots[:2]

    def _hyper(self, group: dict[str, Any], begins: bool) -> AdamUpdate:
        return adam_hyper(group, decoupled=True)

    def _rounds(self, group: dict[str, Any]) -> bool:
        return adam_rounds(group)

    def _rounded_hyper(self, group: dict[str, Any], step: float) -> AdamUpdate:
        return rounded(self._hyper(group, False), group, step)
