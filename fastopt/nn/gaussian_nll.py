"""Negative log-likelihood of normally distributed numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["GaussianNLLLoss", "gaussian_nll_loss"]


class GaussianNLL(Elementwise):
    eps: float = 1e-6
    full: bool = False
    slopes = 3
    integers = ("target",)
    checked = True
    domains = {"var": "positive"}
    crossover = 16_384

    def refuse(h) -> str | None:
        return None if h.eps > 0 else f"eps={h.eps}"

    def arrange(h, *operands: Any) -> tuple[Any, ...] | None:
        input, target, var = operands
        if not isinstance(input, Tensor) or not isinstance(target, Tensor):
            return None
        if isinstance(var, float):
            return input, target, input.new_full((), var)
        if not isinstance(var, Tensor):
            return None
        if var.shape == input.shape[:-1] and var.shape != input.shape:
            var = var.unsqueeze(-1)
        if var.shape != input.shape:
            apart = [b for a, b in zip(input.shape, var.shape, strict=False) if a != b]
            if input.dim() != var.dim() or apart != [1]:
                return None
        return input, target, var

    def value_and_slopes(h, input: Any, target: Any, var: Any) -> Any:
        d = input - target
        v = m.where(var < 0.0, var, m.maximum(var, h.eps))  # the logarithm of a negative one is NaN
        ratio = d / v
        value = 0.5 * (m.log(v) + d * ratio)
        if h.full:
            value = value + 0.9189385332046727  # log(2 pi) / 2
        return value, ratio, -ratio, 0.5 * (1.0 - d * ratio) / v


@loss(GaussianNLL)
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of normally distributed numbers.

    :math:`\tfrac12 \left(\log v + (x - y)^2 / v\right)` with v = max(var, eps), whose gradient
    passes to var all the same; with ``full`` also :math:`\tfrac12 \log 2π`.

    Args:
        input: means, any shape; float64, float32, bfloat16 or float16.
        target: of a shape that broadcasts with input's.
        var: variances: of input's shape, or one that has 1 in one dimension, or lacks the last
            one; or a number.
        full: whether to add the constant term.
        eps: the least variance.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.
        ValueError: a negative variance (on a GPU the loss is NaN, as looking would make the host
            wait), or an eps that isn't positive.

    Example:
        >>> loss = fastopt.nn.functional.gaussian_nll_loss(mean, y, variance)

    Reference: :func:`torch.nn.functional.gaussian_nll_loss`
    """
    raise NotImplementedError


class GaussianNLLLoss(LossModule, torch.nn.GaussianNLLLoss, function=gaussian_nll_loss):
    r"""Negative log-likelihood of normally distributed numbers, as a module.

    Args:
        full: whether to add the constant term.
        eps: the least variance.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.gaussian_nll_loss`.

    Example:
        >>> criterion = fastopt.nn.GaussianNLLLoss()
        >>> criterion(mean, y, variance).backward()

    Reference: :class:`torch.nn.GaussianNLLLoss`
    """

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return gaussian_nll_loss(input, target, var, **self._options())
