"""Squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..front.call import LossModule, loss, shortest
from ..kernels.operation import Elementwise

__all__ = ["MSELoss", "mse_loss"]


class MSE(Elementwise):
    slopes = 2
    factor = 2.0
    averaged_by = "weight"
    warns_of_sizes = True
    weighted_as_input = True
    crossover = 1_572_864

    def value_and_slopes(h, input: Any, target: Any, weight: Any) -> Any:
        d = input - target
        slope = weight * d
        return weight * (d * d), slope, -slope


@loss(MSE, native=shortest(F.mse_loss, torch._C._nn.mse_loss))
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error, :math:`w\,(x - y)^2`, averaged, summed or per element.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        target: of input's shape; other sizes are broadcast, with torch's warning.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.
        weight: elementwise weights of input's shape; the mean then divides by their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.mse_loss(model(x), y)

    Reference: :func:`torch.nn.functional.mse_loss`
    """
    raise NotImplementedError


class MSELoss(LossModule, torch.nn.MSELoss, function=mse_loss):
    r"""Mean squared error as a module: :math:`(x - y)^2`, averaged, summed or per element.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.mse_loss`.

    Example:
        >>> criterion = fastopt.nn.MSELoss()
        >>> criterion(model(x), y).backward()

    Reference: :class:`torch.nn.MSELoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, **self._options())
