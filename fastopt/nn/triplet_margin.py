"""Hinge loss of the distances from an anchor to a similar and to another vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Rowwise

__all__ = ["TripletMarginLoss", "triplet_margin_loss"]


class TripletMargin(Rowwise):
    margin: float = 1.0
    p: int = 2
    eps: float = 1e-6
    swap: bool = False
    columns = ("anchor", "positive", "negative")
    sums = 3

    def refuse(h) -> str | None:
        if h.p not in (1, 2):
            return f"p={h.p}"
        return None if h.margin > 0 else f"margin={h.margin}"

    def fold(h, anchor: Any, positive: Any, negative: Any) -> Any:
        near, far, other = _differences(h, anchor, positive, negative)
        if h.p == 1:
            return m.abs(near), m.abs(far), m.abs(other)
        else:
            return near * near, far * far, other * other

    def finish(h, classes: Any, near: Any, far: Any, other: Any) -> Any:
        if h.p == 2:
            near, far, other = m.sqrt(near), m.sqrt(far), m.sqrt(other)
        nearest = far
        if h.swap:
            nearest = m.minimum(far, other)
        value = h.margin + near - nearest
        slope = m.where(value >= 0.0, 1.0, 0.0)  # at 0, too, as torch's derivative of clamp
        by_near, by_far, by_other = slope, -slope, -slope
        if h.swap:  # of equal distances half to each
            by_far = by_far * m.where(far == other, 0.5, m.where(far > other, 0.0, 1.0))
            by_other = by_other * m.where(far == other, 0.5, m.where(other > far, 0.0, 1.0))
        if h.p == 2:
            by_near = m.where(near == 0.0, 0.0, by_near / near)
            by_far = m.where(far == 0.0, 0.0, by_far / far)
            by_other = m.where(other == 0.0, 0.0, by_other / other)
        return m.maximum(value, 0.0), by_near, by_far, by_other

    def slopes(
        h, by_near: Any, by_far: Any, by_other: Any, anchor: Any, positive: Any, negative: Any
    ) -> Any:
        near, far, other = _differences(h, anchor, positive, negative)
        if h.p == 1:
            near, far, other = m.sign(near), m.sign(far), m.sign(other)
        near, far, other = by_near * near, by_far * far, by_other * other
        if h.swap:
            return near + far, other - near, -far - other
        else:
            return near + far, -near, -far


def _differences(h: TripletMargin, anchor: Any, positive: Any, negative: Any) -> Any:
    return anchor - positive + h.eps, anchor - negative + h.eps, positive - negative + h.eps


@loss(TripletMargin)
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge loss of distances, :math:`\max(0, m + |a - p + ε|_p - |a - n + ε|_p)`.

    With ``swap`` the second distance is the smaller one of this and :math:`|p - n + ε|_p`.

    Args:
        anchor, positive, negative: vectors, (D,) or (..., D), of one size (others are left to
            torch); float64, float32, bfloat16 or float16.
        margin: m > 0.
        p: of the norm; compiled are 1 and 2, others are left to torch.
        eps: ε.
        swap: whether the positive vector may take the anchor's place.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the triplets' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take, unknown reductions and a margin that isn't positive.

    Example:
        >>> loss = fastopt.nn.functional.triplet_margin_loss(model(a), model(p), model(n))

    Reference: :func:`torch.nn.functional.triplet_margin_loss`
    """
    raise NotImplementedError


class TripletMarginLoss(LossModule, torch.nn.TripletMarginLoss, function=triplet_margin_loss):
    r"""Hinge loss of distances as a module: similar vectors are to be nearer than others.

    Args:
        margin: by how much they are to be nearer.
        p: of the norm.
        eps: what is added to the differences.
        swap: whether the positive vector may take the anchor's place.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.triplet_margin_loss`.

    Example:
        >>> criterion = fastopt.nn.TripletMarginLoss(margin=0.5, swap=True)
        >>> criterion(model(a), model(p), model(n)).backward()

    Reference: :class:`torch.nn.TripletMarginLoss`
    """

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_loss(anchor, positive, negative, **self._options())
