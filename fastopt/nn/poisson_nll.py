"""Negative log-likelihood of counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["PoissonNLLLoss", "poisson_nll_loss"]


class PoissonNLL(Elementwise):
    eps: float = 1e-8
    log_input: bool = True
    full: bool = False
    slopes = 2
    integers = ("target",)
    domains = {"target": "positive"}
    crossover = 131_072

    def value_and_slopes(h, input: Any, target: Any) -> Any:
        if h.log_input:
            rate = m.exp(input)
            value, slope, by_target = rate - target * input, rate - target, -input
        else:
            log_rate = m.log(input + h.eps)
            value, by_target = input - target * log_rate, -log_rate
            slope = 1.0 - target / (input + h.eps)
        if h.full:
            log_target = m.log(target)
            stirling = (
                target * log_target - target + 0.5 * (log_target + 1.8378770664093453)
            )  # log 2 pi
            value = value + m.where(target <= 1.0, 0.0, stirling)
            slope_of_it = log_target + 0.5 / target + 0.0 * target  # NaN of infinity, as torch's
            by_target = by_target + m.where(target <= 1.0, 0.0, slope_of_it)
        return value, slope, by_target


@loss(PoissonNLL)
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of counts y that are Poisson distributed.

    :math:`e^x - y x`, or :math:`x - y \log(x + \mathrm{eps})` without ``log_input``; with ``full``
    where :math:`y > 1` also Stirling's :math:`y \log y - y + \tfrac12 \log(2 π y)`.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        target: of a shape that broadcasts with input's.
        log_input: whether input is the logarithm of the rate.
        full: whether to add the term that does not depend on the input.
        size_average, reduce: deprecated, as in torch.
        eps: keeps the logarithm of a rate of 0 finite.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.poisson_nll_loss(model(x), counts)

    Reference: :func:`torch.nn.functional.poisson_nll_loss`
    """
    raise NotImplementedError


class PoissonNLLLoss(LossModule, torch.nn.PoissonNLLLoss, function=poisson_nll_loss):
    r"""Negative log-likelihood of counts that are Poisson distributed, as a module.

    Args:
        log_input: whether inputs are logarithms of the rate.
        full: whether to add the term that does not depend on the input.
        size_average, reduce: deprecated, as in torch.
        eps: keeps the logarithm of a rate of 0 finite.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.poisson_nll_loss`.

    Example:
        >>> criterion = fastopt.nn.PoissonNLLLoss()
        >>> criterion(model(x), counts).backward()

    Reference: :class:`torch.nn.PoissonNLLLoss`
    """

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return poisson_nll_loss(log_input, target, **self._options())
