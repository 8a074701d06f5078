"""Loss of the angle between pairs of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import formula as m
from ..front.call import LossModule, loss
from ..kernels.operation import Rowwise

__all__ = ["CosineEmbeddingLoss", "cosine_embedding_loss"]


class CosineEmbedding(Rowwise):
    margin: float = 0.0
    columns = ("input1", "input2")
    by_row = ("target",)
    sums = 3
    most_dims = 2
    integers = ("target",)
    constants = ("target",)
    domains = {"target": "sign"}
    crossover = 16_384

    def fold(h, input1: Any, input2: Any, target: Any) -> Any:
        return input1 * input2, input1 * input1, input2 * input2

    def finish(h, classes: Any, product: Any, square1: Any, square2: Any, target: Any) -> Any:
        square1 = square1 + 9.999999960041972e-13  # torch's: 1e-12 as it is in float32
        square2 = square2 + 9.999999960041972e-13
        size = m.sqrt(square1 * square2)
        cosine = product / size
        rest = cosine - h.margin
        near, far = target == 1.0, target == -1.0
        value = m.where(near, 1.0 - cosine, m.where(far, m.maximum(rest, 0.0), 0.0))
        # at 0, too, as torch's derivative of clamp
        slope = m.where(near, -1.0, m.where(far & (rest >= 0.0), 1.0, 0.0))
        across = slope * cosine
        return value, slope / size, -across / square1, -across / square2

    def slopes(
        h, across: Any, along1: Any, along2: Any, input1: Any, input2: Any, target: Any
    ) -> Any:
        return across * input2 + along1 * input1, across * input1 + along2 * input2


@loss(CosineEmbedding)
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Loss of the angle between pairs of vectors, averaged, summed or per pair.

    :math:`1 - \cos(x_1, x_2)` where :math:`y = 1`, :math:`\max(0, \cos(x_1, x_2) - m)` where
    :math:`y = -1` (where y is neither, as in torch, 0).

    Args:
        input1, input2: vectors, (D,) or (N, D), of one size (others are left to torch); float64,
            float32, bfloat16 or float16.
        target: 1 or -1, () or (N,).
        margin: m.
        size_average, reduce: deprecated, as in torch.
        reduction: "none" gives the pairs' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the inputs' common dtype (float32 under autocast).

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.cosine_embedding_loss(model(x), model(y), similar)

    Reference: :func:`torch.nn.functional.cosine_embedding_loss`
    """
    raise NotImplementedError


class CosineEmbeddingLoss(LossModule, torch.nn.CosineEmbeddingLoss, function=cosine_embedding_loss):
    r"""Loss of the angle between vectors as a module: similar pairs (1) are to have the same
    direction, others (-1) not.

    Args:
        margin: the cosine up to which others count as different enough.
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" (default) or "sum".

    Shapes, dtypes and errors: see :func:`fastopt.nn.functional.cosine_embedding_loss`.

    Example:
        >>> criterion = fastopt.nn.CosineEmbeddingLoss(margin=0.3)
        >>> criterion(model(x), model(y), similar).backward()

    Reference: :class:`torch.nn.CosineEmbeddingLoss`
    """

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return cosine_embedding_loss(input1, input2, target, **self._options())
