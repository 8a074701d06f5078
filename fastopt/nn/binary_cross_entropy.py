"""Binary cross-entropy of probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["BCELoss", "binary_cross_entropy"]


class BCE(Elementwise):
    slopes = 2
    same_sizes = True
    same_dtypes = True
    checked = True
    domains = {"input": "unit", "target": "unit"}
    crossover = 16_384

    def value_and_slopes(h, input: Any, target: Any, weight: Any) -> Any:
        rest = 1.0 - input
        a, b = m.log(input), m.log1p(-input)
        value = (target - 1.0) * m.maximum(b, -100.0) - target * m.maximum(a, -100.0)
        tiny = 9.999999960041972e-13  # 1e-12 in float32, as in torch
        slope = (input - target) / m.maximum(rest * input, tiny)
        return weight * value, weight * slope, weight * (b - a)


@loss(BCE)
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy of probabilities, averaged, summed or per element.

    :math:`-w\,(y \log x + (1 - y) \log(1 - x))`, with each logarithm at least -100, and the
    denominator of the gradient, :math:`x (1 - x)`, at least 1e-12.

    Args:
        input: probabilities, any shape; float64, float32, bfloat16 or float16.
        target: of input's shape and dtype.
        weight: of a shape that broadcasts with input's.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.
        RuntimeError: an input outside [0, 1] (on a GPU it fails a device-side assert in torch,
            and here the loss is NaN).

    Example:
        >>> loss = fastopt.nn.functional.binary_cross_entropy(torch.sigmoid(x), y)

    Reference: :func:`torch.nn.functional.binary_cross_entropy`
    """
    raise NotImplementedError


class BCELoss(LossModule, torch.nn.BCELoss, function=binary_cross_entropy):
    r"""Binary cross-entropy of probabilities as a module.

    Args:
        weight: of a shape that broadcasts with the input's.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.binary_cross_entropy`.

    Example:
        >>> criterion = fastopt.nn.BCELoss()
        >>> criterion(torch.sigmoid(model(x)), y).backward()

    Reference: :class:`torch.nn.BCELoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, **self._options())
