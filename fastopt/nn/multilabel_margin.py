"""Multi-label margin, by torch's own code."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..front.call import LossModule, loss
from ..front.torch_only import TorchOnly, analyse

__all__ = ["MultiLabelMarginLoss", "multilabel_margin_loss"]


class MultiLabelMargin(TorchOnly):
    operands = ("input", "target")
    reason = (
        "pairs of each target class, up to a first -1, and each other class: no kernel has them"
    )


@loss(MultiLabelMargin, analysis=functools.partial(analyse, MultiLabelMargin))
def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-label margin, by torch's own code.

    :math:`\sum_{j, i} \max(0, 1 - (x_{y_j} - x_i)) / C` over the target classes :math:`y_j`
    before the first -1 and the classes i that are none of them.

    Args:
        input: scores, (C,) or (N, C); float64 or float32.
        target: target classes followed by -1, int64, of input's shape.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives a value per row, "mean" (default) averages, "sum" adds up.

    Returns:
        A tensor of input's dtype.

    Raises:
        RuntimeError, ValueError, TypeError: as torch does, for shapes, classes and dtypes that
            don't go together and unknown reductions.
        BackendUnavailable: inside ``use_backend`` of a compiled backend.

    Example:
        >>> classes = torch.tensor([[3, 0, -1, 1]])                  # 3 and 0
        >>> loss = fastopt.nn.functional.multilabel_margin_loss(scores, classes)

    Reference: :func:`torch.nn.functional.multilabel_margin_loss`
    """
    raise NotImplementedError


class MultiLabelMarginLoss(
    LossModule, torch.nn.MultiLabelMarginLoss, function=multilabel_margin_loss
):
    r"""Multi-label margin as a module, by torch's own code.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Formula, shapes, dtypes and errors: see
    :func:`fastopt.nn.functional.multilabel_margin_loss`.

    Example:
        >>> criterion = fastopt.nn.MultiLabelMarginLoss()
        >>> criterion(model(x), classes).backward()

    Reference: :class:`torch.nn.MultiLabelMarginLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_margin_loss(input, target, **self._options())
