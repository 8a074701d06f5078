"""LBFGS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._torchs_step import TorchsStep

__all__ = ["LBFGS"]

_Torchs = torch.optim.LBFGS


class LBFGS(TorchsStep, torch.optim.LBFGS):
    r"""L-BFGS: steps along a direction that the last changes of the gradient bend.

    With the gradient g of all parameters as one vector, and of up to ``history_size`` steps before
    what they changed, s of the parameters and y of the gradient, newest first:

    .. code-block:: text

        q ← -g
        aᵢ ← sᵢ · q / yᵢ · sᵢ,     q ← q - aᵢ yᵢ                              for the newest first
        q ← q (s · y) / (y · y)                                                  of the newest
        q ← q + sᵢ (aᵢ - yᵢ · q / yᵢ · sᵢ)                                     for the oldest first
        p ← p + t q,     t = lr, or what the line search finds

    A step repeats this up to ``max_iter`` times, and asks the closure for loss and gradient each
    time. It is torch's own step: dot products and sums of whole vectors, which torch's own
    libraries compute as fast as memory allows, between calls of a closure that cost more.

    Args:
        params: parameters, all of one group.
        lr: the length t of a step, a number or a one-element tensor.
        max_iter, max_eval: how many iterations, and calls of the closure, a step has at most.
        tolerance_grad, tolerance_change: what largest gradient, and what changes, end a step.
        history_size: as above.
        line_search_fn: None or ``"strong_wolfe"``.

    Raises:
        ValueError, RuntimeError: as torch does, for invalid hyperparameters and for more than one
            group.
        BackendUnavailable: in a step, inside ``use_backend`` of another backend than torch.

    Example:
        >>> optimizer = fastopt.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure)

    Reference: :class:`torch.optim.LBFGS`; Nocedal and Wright, Numerical Optimization, algorithm 7.4
    """

    _operation = "LBFGS"
    _reason = (
        "dot products and sums of whole vectors, which torch's own libraries compute, "
        "between calls of a closure that cost more"
    )

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Take a step of up to ``max_iter`` iterations.

        Args:
            closure: computes loss and gradients anew and returns the loss.

        Returns:
            The loss before the step.
        """
        return LBFGS._take_step(self, _Torchs.step, closure)
