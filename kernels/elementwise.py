"""What a flat traversal of a loss needs on any device: divisors, and memory for its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .broadcast import Walk
from .operation import Options

__all__ = ["divisor_of", "empty_grads", "empty_like_walk", "mass_of", "numbers_of", "to_operands"]

Tensors = tuple[torch.Tensor | None, ...]
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def compute_dtype(operands: Tensors) -> torch.dtype:
    """The dtype to compute in: float64 where an operand has it, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in operands)
    return torch.float64 if double else torch.float32


def numbers_of(tensors: Tensors) -> Tensors:
    """The operands, integers among them as numbers of the dtype to compute in."""
    for t in tensors:
        if t is not None and not t.is_floating_point():
            dtype = compute_dtype(tensors)
            return tuple(
                [t if t is None or t.is_floating_point() else t.to(dtype) for t in tensors]
            )
    return tensors


def divisor_of(options: Options, tensors: Tensors, place: Walk) -> float | None:
    """What the sum is divided by: of nothing NaN, as in torch; None where `mass_of` says it."""
    if options.reduction == "batchmean":
        first = tensors[0]
        assert first is not None
        return float(first.shape[0] if first.dim() else 1) or math.nan
    if options.reduction == "mean":
        return None if mass_of(options, tensors) is not None else float(place.places) or math.nan
    return 1.0


def mass_of(options: Options, tensors: Tensors) -> torch.Tensor | None:
    """The operand by whose sum a mean is divided, if it is a weighted one."""
    record: Any = options.record
    if options.reduction != "mean" or record.averaged_by is None:
        return None
    mass: torch.Tensor | None = tensors[record.operands.index(record.averaged_by)]
    return mass


def empty_like_walk(
    operands: Tensors, dtype: torch.dtype, place: Walk, empty: Empty
) -> torch.Tensor:
    """Uninitialised memory for a result of the walk's shape, in the walk's order."""
    if not place.flat:
        return empty(place.shape, dtype)
    like = next(t for t in operands if t is not None and t.shape == place.shape)
    if like.is_contiguous():
        return empty(place.shape, dtype)
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    flat = empty(tuple(like.shape[d] for d in order), dtype)
    return flat.permute([order.index(d) for d in range(like.dim())])


def empty_grads(
    record: Any, operands: Tensors, needs: tuple[bool, ...], place: Walk, empty: Empty
) -> Tensors:
    """Uninitialised gradients of the operands that have one; whole where one is broadcast, too."""
    grads: list[torch.Tensor | None] = []
    for t, need in zip(operands[: record.slopes], needs, strict=False):
        if t is None or not need:
            grads.append(None)
            continue
        # one that is broadcast has its gradient summed up afterwards
        dtype = t.dtype if t.shape == place.shape else compute_dtype(operands)
        grads.append(empty_like_walk(operands, dtype, place, empty))
    return tuple(grads)


def to_operands(grads: Tensors, tensors: Tensors) -> Tensors:
    """A gradient for each tensor, summed up where that was broadcast."""
    found = [
        g if g is None or t is None or g.shape == t.shape else g.sum_to_size(t.shape).to(t.dtype)
        for g, t in zip(grads, tensors, strict=False)
    ]
    return (*found, *[None] * (len(tensors) - len(found)))
