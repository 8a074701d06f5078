"""Squared error where it is small, absolute error elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["SmoothL1Loss", "smooth_l1_loss"]


class SmoothL1(Elementwise):
    beta: float = 1.0
    slopes = 2
    warns_of_sizes = True
    crossover = 1_572_864

    def refuse(h) -> str | None:
        return None if h.beta >= 0 else f"beta={h.beta}"

    def value_and_slopes(h, input: Any, target: Any) -> Any:
        d = input - target
        size = m.abs(d)
        near = size < h.beta
        value = m.where(near, 0.5 * d * d / h.beta, size - 0.5 * h.beta)
        # Of NaN it is NaN, but for a beta of 0, of which torch makes L1.
        curved = m.where(size >= h.beta, m.sign(d), d / h.beta)
        slope = m.where(h.beta > 0.0, curved, m.sign(d))
        return value, slope, -slope


@loss(SmoothL1)
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1 loss, averaged, summed or per element.

    :math:`\frac{(x - y)^2}{2β}` where :math:`|x - y| < β`, else :math:`|x - y| - β / 2`.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        target: of input's shape; other sizes are broadcast, with torch's warning.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.
        beta: β, the distance from which on the loss is linear; with 0 it is the L1 loss.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take unknown reductions and a negative beta.

    Example:
        >>> loss = fastopt.nn.functional.smooth_l1_loss(boxes, y, beta=0.1)

    Reference: :func:`torch.nn.functional.smooth_l1_loss`
    """
    raise NotImplementedError


class SmoothL1Loss(LossModule, torch.nn.SmoothL1Loss, function=smooth_l1_loss):
    r"""Smooth L1 loss as a module: squared below beta, absolute above.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".
        beta: the distance from which on the loss is linear.

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.smooth_l1_loss`.

    Example:
        >>> criterion = fastopt.nn.SmoothL1Loss(beta=0.1)
        >>> criterion(model(x), y).backward()

    Reference: :class:`torch.nn.SmoothL1Loss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, **self._options())
