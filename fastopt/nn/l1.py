"""Mean absolute error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import hyper, reference
from . import _pointwise
from ._loss import LossModule, loss_function

__all__ = ["L1Loss", "l1_loss"]


@loss_function(
    _pointwise.analyser("l1_loss", hyper.L1()),
    reference.l1_loss,
    _pointwise.direct(reference.l1_loss),
)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> None:
    r"""Mean absolute error, :math:`|x - y|` per element; its derivative at 0 is 0.

    Args:
        input: predictions, any shape; float64, float32, bfloat16 or float16.
        target: of the same shape and device; differentiable as well. Other shapes are
            broadcast, with torch's warning.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.
        weight: elementwise weights of input's shape; the mean then divides by their sum.

    Returns:
        A tensor of input's and target's common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't broadcast,
            integer inputs and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.l1_loss(model(x), y)

    Reference: :func:`torch.nn.functional.l1_loss`
    """


class L1Loss(LossModule, torch.nn.L1Loss):
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

    _function = staticmethod(l1_loss)

    def _options(self) -> dict[str, Any]:
        return {"reduction": self.reduction}
