"""Huber's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["HuberLoss", "huber_loss"]


class Huber(Elementwise):
    delta: float = 1.0
    slopes = 2
    same_dtypes = True
    warns_of_sizes = True
    weighted_as_input = True
    crossover = 1_048_576

    def refuse(h) -> str | None:
        return None if h.delta > 0 else f"delta={h.delta}"

    def value_and_slopes(h, input: Any, target: Any, weight: Any) -> Any:
        d = input - target
        clipped = m.minimum(m.maximum(d, -h.delta), h.delta)
        slope = weight * clipped
        return slope * (d - 0.5 * clipped), slope, -slope


@loss(Huber)
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Huber's loss, averaged, summed or per element.

    :math:`\tfrac12 (x - y)^2` where :math:`|x - y| \le δ`, else :math:`δ\,(|x - y| - δ / 2)`.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        target: of input's shape; other sizes are broadcast, with torch's warning.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.
        delta: δ > 0, the distance from which on the loss is linear.
        weight: elementwise weights of input's shape; the mean stays that over all elements.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take unknown reductions and a delta that isn't positive.

    Example:
        >>> loss = fastopt.nn.functional.huber_loss(model(x), y, delta=0.5)

    Reference: :func:`torch.nn.functional.huber_loss`
    """
    raise NotImplementedError


class HuberLoss(LossModule, torch.nn.HuberLoss, function=huber_loss):
    r"""Huber's loss as a module: squared up to delta, linear above.

    Args:
        reduction: "none", "mean" (default) or "sum".
        delta: the distance from which on the loss is linear.

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.huber_loss`.

    Example:
        >>> criterion = fastopt.nn.HuberLoss(delta=0.5)
        >>> criterion(model(x), y).backward()

    Reference: :class:`torch.nn.HuberLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return huber_loss(input, target, **self._options())
