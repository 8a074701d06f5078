"""Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["KLDivLoss", "kl_div"]


class KLDiv(Elementwise):
    log_target: bool = False
    slopes = 2
    reductions = ("none", "mean", "sum", "batchmean")
    domains = {"input": "log", "target": "unit"}

    def warning(h, reduction: str, *operands: Any) -> str | None:
        if reduction != "mean":
            return None
        return (  # torch's, to the letter
            "reduction: 'mean' divides the total loss by both the batch size and the support "
            "size.'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition.'mean' will be changed to behave the same as 'batchmean' in the next major "
            "release."
        )

    def value_and_slopes(h, input: Any, target: Any) -> Any:
        if h.log_target:
            p = m.exp(target)
            value, slope, by_target = p * (target - input), -p, p * (target - input + 1.0)
        else:
            log_p = m.log(target)
            entropy = m.where(target == 0.0, target, target * log_p)
            # of a target of 0, as torch's derivative of x log x: NaN
            value, slope, by_target = (
                entropy - target * input,
                -target,
                log_p + target / target - input,
            )
        return value, slope, by_target


@loss(KLDiv)
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Pointwise Kullback-Leibler divergence, averaged, summed or per element.

    :math:`y\,(\log y - x)` for log-probabilities x, or :math:`e^y (y - x)` with ``log_target``.

    Args:
        input: log-probabilities, any shape; float64, float32, bfloat16 or float16.
        target: of a shape that broadcasts with input's.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (over all elements, with torch's warning), "sum", or "batchmean",
            the sum over the size of the first dimension.
        log_target: whether target holds logarithms of probabilities.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.kl_div(log_p, q, reduction='batchmean')

    Reference: :func:`torch.nn.functional.kl_div`
    """
    raise NotImplementedError


class KLDivLoss(LossModule, torch.nn.KLDivLoss, function=kl_div):
    r"""Kullback-Leibler divergence as a module.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default), "sum" or "batchmean".
        log_target: whether targets are logarithms of probabilities.

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.kl_div`.

    Example:
        >>> criterion = fastopt.nn.KLDivLoss(reduction='batchmean')
        >>> criterion(torch.log_softmax(model(x), -1), q).backward()

    Reference: :class:`torch.nn.KLDivLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, **self._options())
