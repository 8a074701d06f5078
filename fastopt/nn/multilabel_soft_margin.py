"""Cross-entropy of many labels at once, each there or not, averaged over the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Rowwise

__all__ = ["MultiLabelSoftMarginLoss", "multilabel_soft_margin_loss"]


class MultiLabelSoftMargin(Rowwise):
    columns = ("input", "target")
    by_class = ("weight",)
    integers = ("target",)
    autocast = False
    crossover = 65_536

    def fold(h, input: Any, target: Any, weight: Any) -> Any:
        rest = m.softplus(-m.abs(input))
        there, missing = m.minimum(input, 0.0) - rest, m.minimum(-input, 0.0) - rest
        return (-weight * (target * there + (1.0 - target) * missing),)

    def finish(h, classes: Any, total: Any) -> Any:
        return total / classes, 1.0 / classes

    def slopes(h, share: Any, input: Any, target: Any, weight: Any) -> Any:
        share = share * weight
        slope = (1.0 - target) * m.sigmoid(input) - target * m.sigmoid(-input)
        return share * slope, -share * input


@loss(MultiLabelSoftMargin)
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of each class's logit with whether its label is there, averaged over classes.

    :math:`-\frac1C \sum_c w_c \left(y_c \log σ(x_c) + (1 - y_c) \log σ(-x_c)\right)`.

    Args:
        input: logits, (C,) or (..., C); float64, float32, bfloat16 or float16.
        target: 1 or 0, or probabilities, of input's shape (other sizes are left to torch).
        weight: a weight for each class, (C,).
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the rows' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype; for "none" of input's shape without C.

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.multilabel_soft_margin_loss(model(images), tags)

    Reference: :func:`torch.nn.functional.multilabel_soft_margin_loss`
    """
    raise NotImplementedError


class MultiLabelSoftMarginLoss(
    LossModule, torch.nn.MultiLabelSoftMarginLoss, function=multilabel_soft_margin_loss
):
    r"""Cross-entropy of many labels at once as a module.

    Args:
        weight: a weight for each class, (C,).
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.multilabel_soft_margin_loss`.

    Example:
        >>> criterion = fastopt.nn.MultiLabelSoftMarginLoss()
        >>> criterion(model(images), tags).backward()

    Reference: :class:`torch.nn.MultiLabelSoftMarginLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_soft_margin_loss(input, target, **self._options())
