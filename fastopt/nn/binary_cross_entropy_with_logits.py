"""Binary cross-entropy of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["BCEWithLogitsLoss", "binary_cross_entropy_with_logits"]


class BCEWithLogits(Elementwise):
    slopes = 2
    same_sizes = True
    domains = {"target": "unit", "pos_weight": "positive"}
    crossover = 1_572_864

    def value_and_slopes(h, input: Any, target: Any, weight: Any, pos_weight: Any) -> Any:
        share = (pos_weight - 1.0) * target + 1.0
        soft = m.softplus(-input)
        value = (1.0 - target) * input + share * soft
        slope = (1.0 - target) - share * m.sigmoid(-input)
        other = m.where(input < -700.0, 0.0, soft + input)  # the soft one of +input
        by_target = m.where(pos_weight == 1.0, -input, pos_weight * soft - other)
        return weight * value, weight * slope, weight * by_target


@loss(BCEWithLogits)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, averaged, summed or per element.

    :math:`-w\,(p\,y \log σ(x) + (1 - y) \log(1 - σ(x)))` with :math:`σ(x) = 1 / (1 + e^{-x})`.

    Args:
        input: logits, any shape; float64, float32, bfloat16 or float16.
        target: of input's shape.
        weight: of a shape that broadcasts with input's.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.
        pos_weight: p, the weight of positive examples, often one for each class; broadcast.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.binary_cross_entropy_with_logits(model(x), y)

    Reference: :func:`torch.nn.functional.binary_cross_entropy_with_logits`
    """
    raise NotImplementedError


class BCEWithLogitsLoss(
    LossModule, torch.nn.BCEWithLogitsLoss, function=binary_cross_entropy_with_logits
):
    r"""Binary cross-entropy of logits as a module.

    Args:
        weight: of a shape that broadcasts with the input's.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".
        pos_weight: the weight of positive examples, often one for each class.

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.binary_cross_entropy_with_logits`.

    Example:
        >>> criterion = fastopt.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
        >>> criterion(model(x), y).backward()

    Reference: :class:`torch.nn.BCEWithLogitsLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(input, target, **self._options())
