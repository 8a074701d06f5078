"""Triplet margin loss of any distance; of the usual one it is that of triplet_margin.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..front.analysis import Call, analyse
from ..front.call import LossModule, loss
from ..front.circumstances import autocasts
from .triplet_margin import TripletMargin

__all__ = ["TripletMarginWithDistanceLoss", "triplet_margin_with_distance_loss"]

Distance = Callable[[Tensor, Tensor], Tensor]


def _is_default(distance: Any) -> bool:
    """Whether it is torch's pairwise distance with the arguments that it has by default."""
    if distance is None or distance is F.pairwise_distance:
        return True
    usual = vars(torch.nn.PairwiseDistance())
    return type(distance) is torch.nn.PairwiseDistance and all(
        name == "training" or usual.get(name, distance) == value
        for name, value in vars(distance).items()
    )


def _analyse(function: str, arguments: dict[str, Any]) -> Call | None:
    distance = arguments["distance_function"]
    call = analyse(TripletMargin, function, {**arguments, "p": 2, "eps": 1e-6})
    special = []
    if not _is_default(distance):
        special.append(f"distance_function={distance!r}")
    if call is not None and autocasts(call.tensors[0].device):  # type: ignore[union-attr]
        special.append("autocast, which leaves the parts of this loss alone")
    if call is None or not special:
        return call
    request = call.request._replace(special=(*call.request.special, *special))
    return call._replace(request=request)


@loss(TripletMargin, analysis=_analyse)
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Distance | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge loss of distances, :math:`\max(0, m + d(a, p) - d(a, n))`.

    With ``swap`` the second distance is the smaller one of this and :math:`d(p, n)`.

    Args:
        anchor, positive, negative: vectors, (D,) or (..., D), of one size (others are left to
            torch); float64, float32, bfloat16 or float16.
        distance_function: d; compiled is :func:`torch.nn.functional.pairwise_distance` with its
            default arguments, also as None or ``torch.nn.PairwiseDistance()``. Any other one is
            left to torch.
        margin: m > 0.
        swap: whether the positive vector may take the anchor's place.
        reduction: "none" gives the triplets' values, "mean" their mean, "sum" their sum.

    Returns:
        A tensor of the tensors' common dtype.

    Raises:
        RuntimeError, TypeError, ValueError: as torch does, for shapes that don't go together,
            dtypes it doesn't take, unknown reductions and a margin that isn't positive.

    Example:
        >>> loss = fastopt.nn.functional.triplet_margin_with_distance_loss(a, p, n, swap=True)

    Reference: :func:`torch.nn.functional.triplet_margin_with_distance_loss`
    """
    raise NotImplementedError


class TripletMarginWithDistanceLoss(
    LossModule,
    torch.nn.TripletMarginWithDistanceLoss,
    function=triplet_margin_with_distance_loss,
):
    r"""Hinge loss of distances as a module: similar vectors are to be nearer than others.

    Args:
        distance_function: of two tensors; without one torch.nn.PairwiseDistance().
        margin: by how much they are to be nearer.
        swap: whether the positive vector may take the anchor's place.
        reduction: "none", "mean" (default) or "sum".

    Shapes and errors: see :func:`fastopt.nn.functional.triplet_margin_with_distance_loss`.

    Example:
        >>> criterion = fastopt.nn.TripletMarginWithDistanceLoss(margin=0.5)
        >>> criterion(model(a), model(p), model(n)).backward()

    Reference: :class:`torch.nn.TripletMarginWithDistanceLoss`
    """

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        if _is_default(options["distance_function"]):  # None is a call that can be remembered
            options["distance_function"] = None
        return options

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_with_distance_loss(anchor, positive, negative, **self._options())
