"""How a flat loop walks over operands of any layout that are broadcast against each other."""

from __future__ import annotations

import math
from operator import is_
from typing import Any, NamedTuple

import torch

from .layout import is_dense, same_layout

__all__ = ["Walk", "walk"]

Tensors = tuple[torch.Tensor | None, ...]


class Walk(NamedTuple):
    """The order in which a loop visits all places of the operands, and where they have them.

    The places are a block of `inner` side by side for each of `first` times `second`, of which the
    last one may be shorter. A result of `shape` is contiguous in that order; where `flat`, it lies
    in memory as the first operand.

    Attributes:
        shape: of the operands broadcast against each other.
        flat: whether all operands lie in memory alike, or are single numbers.
        first, second, inner: the numbers of places.
        steps: of each operand, the elements from one place to the next: of the first kind, of
            the second kind, and side by side (0 or 1).
        places: how many there are.
    """

    shape: tuple[int, ...]
    flat: bool
    first: int
    second: int
    inner: int
    steps: tuple[tuple[int, int, int], ...]
    places: int


# Blocks shorter than half of this are put together, if that takes no more than to repeat numbers
# that all of them have (a weight for each class): loops of few turns fill no vectors.
LONG_BLOCK = 512


#: Walks over operands of these sizes and strides that need no copy: a program has but few.
_known: dict[tuple[Any, ...], Walk] = {}
_MOST_KNOWN = 512


def walk(operands: Tensors) -> tuple[Tensors, Walk]:
    """The walk over some operands, of which some may have to be copied for it."""
    key = tuple([None if t is None else (t.shape, t.stride()) for t in operands])
    place = _known.get(key)
    if place is not None:
        return operands, place
    found, place = _find_walk(operands)
    if all(map(is_, found, operands)):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = place
    return found, place


def _find_walk(operands: Tensors) -> tuple[Tensors, Walk]:
    given = [t for t in operands if t is not None]
    shape = tuple(torch.broadcast_shapes(*[t.shape for t in given]))  # type: ignore[no-untyped-call]
    whole = [t for t in given if tuple(t.shape) == shape]
    if all(t.numel() == 1 or tuple(t.shape) == shape for t in given) and whole:
        like = whole[0] if is_dense(whole[0]) else whole[0].contiguous()
        alike = [
            t if t is None or tuple(t.shape) != shape or same_layout(like, t) else _like(like, t)
            for t in operands
        ]
        count = math.prod(shape)
        steps = tuple(
            (0, 0, int(t is not None and (tuple(t.shape) == shape and count > 1))) for t in alike
        )
        return tuple(alike), Walk(shape, True, 1, 1, count, steps, count)
    for copied in (False, True):
        tensors = tuple(t.contiguous() if copied and t is not None else t for t in operands)
        found = _merged(tensors, shape)
        if found is not None:
            return _repeated(tensors, found)
    full = tuple(t if t is None else t.expand(shape).contiguous() for t in operands)
    return _find_walk(full)


def _like(like: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A copy in the layout of another tensor of the same shape."""
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def _merged(tensors: Tensors, shape: tuple[int, ...]) -> Walk | None:
    """The walk in the order of indices, if three dimensions are enough for it."""
    strides = [None if t is None else t.expand(shape).stride() for t in tensors]
    given = [s for s in strides if s is not None]
    sizes: list[int] = []
    steps: list[list[int]] = []  # for each merged dimension, the step of each given operand
    for d, size in enumerate(shape):
        if size == 1:
            continue
        here = [s[d] for s in given]
        if sizes and all(
            before == size * step for before, step in zip(steps[-1], here, strict=True)
        ):
            sizes[-1] *= size
            steps[-1] = here
        else:
            sizes.append(size)
            steps.append(here)
    if len(sizes) > 3 or any(step not in (0, 1) for step in (steps[-1] if steps else [])):
        return None
    missing = 3 - len(sizes)
    sizes = [1] * missing + sizes
    steps = [[0] * len(given)] * missing + steps
    columns = iter(zip(*steps, strict=True))
    found = tuple(
        (0, 0, 0) if s is None else (lambda c: (c[0], c[1], c[2]))(next(columns)) for s in strides
    )
    first, second, inner = sizes
    return Walk(shape, False, first, second, inner, found, first * second * inner)


def _repeated(tensors: Tensors, place: Walk) -> tuple[Tensors, Walk]:
    """The same with longer blocks, where an operand that all blocks have can be repeated."""
    inner, count = place.inner, LONG_BLOCK // max(place.inner, 1)
    whole, common, single = (0, inner, 1), (0, 0, 1), (0, 0, 0)
    if (
        place.first != 1
        or min(count, place.second) < 2
        or any(step not in (whole, common, single) for step in place.steps)
    ):
        return tensors, place
    repeated = tuple(
        t if t is None or step != common else t.as_strided((count, inner), (0, 1)).reshape(-1)
        for t, step in zip(tensors, place.steps, strict=True)
    )
    longer = count * inner
    steps = tuple((0, longer, 1) if step == whole else step for step in place.steps)
    second = -(-place.second // count)
    return repeated, place._replace(second=second, inner=longer, steps=steps)
