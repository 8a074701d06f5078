"""Averages and what goes into them, sorted by kind, and who serves each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import dispatch
from ..dispatch import Decision, Request
from ..errors import BackendUnavailable
from ..kernels.layout import is_dense, is_released, released_error, same_layout
from ._averaging import Rule
from ._memory import Place, find_sharing

__all__ = ["PLAIN", "Kind", "Pairs", "Share", "Turn", "kind_of", "sort"]

PLAIN = frozenset((Tensor, torch.nn.Parameter))
_CPU = torch.device("cpu")


class Pairs(NamedTuple):
    """The averages, and what goes into each of them.

    Attributes:
        averaged: how many of the pairs, the first ones, are averaged; the others are copied.
    """

    averages: list[Tensor]
    values: list[Tensor]
    averaged: int


class Turn(NamedTuple):
    """An update of averages.

    Attributes:
        rule: how to average.
        row: its numbers in this update.
        pairs: what to average.
    """

    rule: Rule
    row: tuple[float | Tensor, ...]
    pairs: Pairs

    def joinable(self) -> dict[int, Tensor]:
        """The averages that an optimizer's launch may take along, by their parameters' ids.

        A launch computes in one precision: that of the parameter has to be the average's own.
        Where some share memory, the order of updates counts, and no launch may take any along.
        """
        averages, values, averaged = self.pairs
        if find_sharing(_placed(averages), _placed(values)):
            return {}
        return {
            id(value): average
            for average, value in zip(averages[:averaged], values, strict=False)
            if not kind_of(average, value, ()).special
            and average.is_floating_point() and value.is_floating_point()
            and (average.dtype == torch.float64) == (value.dtype == torch.float64)
        }  # fmt: skip


class Kind(NamedTuple):
    """What the pairs of one launch have in common: device, dtypes, and why only torch serves it."""

    device: torch.device
    average: torch.dtype
    value: torch.dtype
    special: tuple[str, ...]


class Share(NamedTuple):
    """The places of the pairs of one kind, and who serves them."""

    kind: Kind
    decision: Decision
    places: list[int]


def kind_of(average: Tensor, value: Tensor, special: Sequence[str]) -> Kind:
    if is_lazy(average) or is_lazy(value):
        words = (*special, "a parameter whose size isn't known yet")
        return Kind(_CPU, torch.float32, torch.float32, words)
    words = (*special, *([] if special else _specials(average, value)))
    return Kind(average.device, average.dtype, value.dtype, words)


def _specials(average: Tensor, value: Tensor) -> list[str]:
    """Why only torch can serve a pair."""
    for name, tensor in (("average", average), ("parameter or buffer", value)):
        if type(tensor) not in PLAIN:
            return [f"a {name} of type {type(tensor).__name__}"]
        if tensor.layout is not torch.strided:
            return [f"a {name} of layout {tensor.layout}"]
        if is_released(tensor):
            raise released_error(f"a {name}", tensor)
        if tensor.is_neg() or tensor.is_conj():
            return [f"a lazily negated or conjugated {name}"]
    if value.device != average.device:
        return [f"a parameter or buffer on {value.device} for an average on {average.device}"]
    if average.is_inference():
        return ["an average made in inference mode"]
    if not is_dense(average) or not same_layout(average, value):
        return [
            "parameters of other layouts than their averages', or with gaps: strides "
            f"{tuple(value.stride())} for {tuple(average.stride())}"
        ]
    return []


def _placed(tensors: list[Tensor]) -> list[tuple[Place, Tensor]]:
    return [(Place(k, ""), t) for k, t in enumerate(tensors) if type(t) in PLAIN]


def sort(operation: str, pairs: Pairs, special: Sequence[str]) -> list[Share]:
    """The pairs sorted by kind, and who serves each. special: what is so of all of them.

    Raises:
        BackendUnavailable: the backend insisted on can't serve what is to be averaged.
    """
    if not special and find_sharing(_placed(pairs.averages), _placed(pairs.values)):
        special = ["averages and parameters that share memory"]  # so that their order counts
    places: dict[Kind, list[int]] = {}
    for place, (average, value) in enumerate(zip(pairs.averages, pairs.values, strict=False)):
        places.setdefault(kind_of(average, value, special), []).append(place)
    shares = []
    for kind, members in places.items():
        device, is_cuda = kind.device, kind.device.type == "cuda"
        request = Request(
            operation, device.type, (kind.average, kind.value),
            sum(0 if is_lazy(t) else t.numel() for t in map(pairs.averages.__getitem__, members)),
            kind.special, torch.cuda.get_device_capability(device) if is_cuda else None,
            dispatch.insisted(),
        )  # fmt: skip
        try:
            decision = dispatch.choose(request)
        except BackendUnavailable:
            if members[0] < pairs.averaged:
                raise
            decision = dispatch.choose(request._replace(insisted="reference"))  # only copied
        shares.append(Share(kind, decision, members))
    return shares
