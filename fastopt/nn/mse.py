"""Mean squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import hyper, reference
from . import _pointwise
from ._loss import LossModule, loss_function

__all__ = ["MSELoss", "mse_loss"]


@loss_function(
    _pointwise.analyser("mse_loss", hyper.MSE()),
    reference.mse_loss,
    _pointwise.direct(reference.mse_loss),
)
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> None:
    r"""Mean squared error, :math:`(x - y)^2` per element.

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
        >>> loss = fastopt.nn.functional.mse_loss(model(x), y)

    Reference: :func:`torch.nn.functional.mse_loss`
    """


class MSELoss(LossModule, torch.nn.MSELoss):
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

    _function = staticmethod(mse_loss)

    def _options(self) -> dict[str, Any]:
        return {"reduction": self.reduction}
