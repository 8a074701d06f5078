"""Hinge loss of a class's score against each other class's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Rowwise

__all__ = ["MultiMarginLoss", "multi_margin_loss"]


class MultiMargin(Rowwise):
    p: int = 1
    margin: float = 1.0
    columns = ("input",)
    by_class = ("weight",)
    label = "target"
    sums = 2
    most_dims = 2
    same_dtypes = True
    halves_on_cpu = False
    crossover = 65_536
    compiled_crossover = 262_144

    def refuse(h) -> str | None:
        return None if h.p in (1, 2) else f"p={h.p}"

    def fold(h, input: Any, weight: Any, own: Any, own_weight: Any, is_own: Any) -> Any:
        z = m.where(is_own, 0.0, h.margin - own + input)
        slope = own_weight
        if h.p == 2:
            slope = 2.0 * own_weight * z
        value = own_weight * z
        if h.p == 2:
            value = value * z
        return m.where(z > 0.0, value, 0.0), m.where(z > 0.0, slope, 0.0)

    def finish(h, classes: Any, value: Any, slope: Any, own: Any, own_weight: Any) -> Any:
        return value / classes, 1.0 / classes, -slope / classes

    def slopes(
        h, share: Any, own_slope: Any,
        input: Any, weight: Any, own: Any, own_weight: Any, is_own: Any,
    ) -> Any:  # fmt: skip
        z = h.margin - own + input
        slope = share * own_weight
        if h.p == 2:
            slope = 2.0 * slope * z
        return (m.where(is_own, own_slope, m.where(z > 0.0, slope, 0.0)),)


@loss(MultiMargin)
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge loss of a class's score against each other class's, averaged over the classes.

    :math:`\frac{w_y}{C} \sum_{c \ne y} \max(0, m - x_y + x_c)^p`.

    Args:
        input: scores, (C,) or (N, C); float64 or float32 (halves on a GPU, and under autocast).
        target: class indices, int64, () or (N,).
        p: 1 or 2.
        margin: m.
        weight: a weight for each class, (C,), of input's dtype.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the rows' values, "mean" their mean (NaN of no rows, where torch's
            is whatever was in memory), "sum" their sum.

    Returns:
        A tensor of input's dtype (float32 under autocast).

    Raises:
        RuntimeError: torch's, for a class index out of range. On a GPU it fails a device-side
            assert.
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take, unknown reductions and another p.

    Example:
        >>> loss = fastopt.nn.functional.multi_margin_loss(model(images), labels, p=2)

    Reference: :func:`torch.nn.functional.multi_margin_loss`
    """
    raise NotImplementedError


class MultiMarginLoss(LossModule, torch.nn.MultiMarginLoss, function=multi_margin_loss):
    r"""Hinge loss of a class's score against each other class's, as a module.

    Args:
        p: 1 or 2.
        margin: by how much the score of the right class is to be larger.
        weight: a weight for each class, (C,).
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.multi_margin_loss`.

    Example:
        >>> criterion = fastopt.nn.MultiMarginLoss(margin=0.5)
        >>> criterion(model(images), labels).backward()

    Reference: :class:`torch.nn.MultiMarginLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multi_margin_loss(input, target, **self._options())
