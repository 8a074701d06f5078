"""Absolute error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import formula as m
from ..front.call import LossModule, loss, shortest
from ..kernels.operation import Elementwise

__all__ = ["L1Loss", "l1_loss"]


class L1(Elementwise):
    slopes = 2
    averaged_by = "weight"
    warns_of_sizes = True
    weighted_as_input = True
    crossover = 131_072

    def value_and_slopes(h, input: Any, target: Any, weight: Any) -> Any:
        d = input - target
        slope = weight * m.sign(d)
        return weight * m.abs(d), slope, -slope


@loss(L1, native=shortest(F.l1_loss, torch._C._nn.l1_loss))
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute error, :math:`w\,|x - y|`, averaged, summed or per element.

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
        >>> loss = fastopt.nn.functional.l1_loss(model(x), y)

    Reference: :func:`torch.nn.functional.l1_loss`
    """
    raise NotImplementedError


class L1Loss(LossModule, torch.nn.L1Loss, function=l1_loss):
    r"""Mean absolute error as a module: :math:`|x - y|`, averaged, summed or per element.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.l1_loss`.

    Example:
        >>> criterion = fastopt.nn.L1Loss()
        >>> criterion(model(x), y).backward()

    Reference: :class:`torch.nn.L1Loss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, **self._options())
