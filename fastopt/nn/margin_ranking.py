"""Hinge loss of differences of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["MarginRankingLoss", "margin_ranking_loss"]


class MarginRanking(Elementwise):
    margin: float = 0.0
    slopes = 3
    domains = {"target": "sign"}

    integers = ("target",)

    def arrange(h, *operands: Any) -> tuple[Any, ...] | None:
        tensors = all(isinstance(t, Tensor) for t in operands)
        return operands if tensors and len({t.dim() for t in operands}) == 1 else None

    def value_and_slopes(h, input1: Any, input2: Any, target: Any) -> Any:
        value = h.margin - target * (input1 - input2)
        passes = m.where(value >= 0.0, 1.0, 0.0)  # at 0, too, as torch's derivative of clamp
        slope = -target * passes
        return m.maximum(value, 0.0), slope, -slope, (input2 - input1) * passes


@loss(MarginRanking)
def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Ranking loss, :math:`\max(0, m - y\,(x_1 - x_2))`, averaged, summed or per element.

    Args:
        input1, input2: scores, any shapes of as many dimensions that broadcast; float64, float32,
            bfloat16 or float16.
        target: 1 where input1 should rank higher, -1 where input2 should.
        margin: m.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.margin_ranking_loss(better, worse, signs)

    Reference: :func:`torch.nn.functional.margin_ranking_loss`
    """
    raise NotImplementedError


class MarginRankingLoss(LossModule, torch.nn.MarginRankingLoss, function=margin_ranking_loss):
    r"""Ranking loss as a module: :math:`\max(0, m - y\,(x_1 - x_2))`.

    Args:
        margin: the difference of scores from which on a pair counts as ranked.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.margin_ranking_loss`.

    Example:
        >>> criterion = fastopt.nn.MarginRankingLoss(margin=0.5)
        >>> criterion(better, worse, signs).backward()

    Reference: :class:`torch.nn.MarginRankingLoss`
    """

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return margin_ranking_loss(input1, input2, target, **self._options())
