"""Logistic loss of scores against signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["SoftMarginLoss", "soft_margin_loss"]


class SoftMargin(Elementwise):
    same_sizes = True
    domains = {"target": "sign"}
    crossover = 131_072

    def value_and_slopes(h, input: Any, target: Any) -> Any:
        x = -target * input
        return m.softplus(x), -target * m.sigmoid(x)


@loss(SoftMargin)
def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Two-class logistic loss, :math:`\log(1 + e^{-y x})`, averaged, summed or per element.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        target: 1 or -1, of input's shape.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.soft_margin_loss(model(x), signs)

    Reference: :func:`torch.nn.functional.soft_margin_loss`. It differs where
    :math:`e^{-y x}` overflows (from y x = -89 on in float32): there torch's loss is infinite and
    its gradient NaN, and here both are what the formula says.
    """
    raise NotImplementedError


class SoftMarginLoss(LossModule, torch.nn.SoftMarginLoss, function=soft_margin_loss):
    r"""Two-class logistic loss as a module: :math:`\log(1 + e^{-y x})` of scores x and signs y.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.soft_margin_loss`.

    Example:
        >>> criterion = fastopt.nn.SoftMarginLoss()
        >>> criterion(model(x), signs).backward()

    Reference: :class:`torch.nn.SoftMarginLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return soft_margin_loss(input, target, **self._options())
