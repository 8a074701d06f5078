"""Hinge loss of distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Elementwise

__all__ = ["HingeEmbeddingLoss", "hinge_embedding_loss"]


class HingeEmbedding(Elementwise):
    margin: float = 1.0
    integers = ("target",)
    constants = ("target",)
    domains = {"target": "sign"}
    crossover = 8_192

    def value_and_slopes(h, input: Any, target: Any) -> Any:
        rest = h.margin - input
        far = m.where(target == 1.0, 0.0, m.maximum(rest, 0.0))
        near = m.where(target == -1.0, 0.0, input)
        far_slope = m.where((target != 1.0) & (rest >= 0.0), -1.0, 0.0)
        near_slope = m.where(target != -1.0, 1.0, 0.0)
        return far + near, far_slope + near_slope


@loss(HingeEmbedding)
def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge loss of distances, averaged, summed or per element.

    :math:`x` where :math:`y = 1`, :math:`\max(0, m - x)` where :math:`y = -1` (where y is neither,
    as in torch, the sum of both).

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        target: 1 or -1; of a shape that broadcasts with input's.
        margin: m.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the elements' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.hinge_embedding_loss(distances, similar)

    Reference: :func:`torch.nn.functional.hinge_embedding_loss`
    """
    raise NotImplementedError


class HingeEmbeddingLoss(LossModule, torch.nn.HingeEmbeddingLoss, function=hinge_embedding_loss):
    r"""Hinge loss of distances as a module: similar pairs (1) are to be near, others (-1) far.

    Args:
        margin: the distance from which on a pair counts as far.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.hinge_embedding_loss`.

    Example:
        >>> criterion = fastopt.nn.HingeEmbeddingLoss(margin=2.0)
        >>> criterion(distances, similar).backward()

    Reference: :class:`torch.nn.HingeEmbeddingLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return hinge_embedding_loss(input, target, **self._options())
