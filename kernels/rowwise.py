"""What a traversal over rows of a loss needs on any device: how its operands lie, and divisors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .elementwise import Empty, Tensors, compute_dtype
from .operation import Options, Rowwise

__all__ = ["Rows", "divisor_of", "empty_grads", "rows_of"]


class Rows(NamedTuple):
    """The operands of a call, by what they have a number for.

    Attributes:
        at_class: the columns, in each of whose rows the classes lie side by side, then the
            weights of classes.
        steps: of each of them, the elements from one row to the next.
        of_row: the numbers of the rows.
        label: the classes of the rows.
        compute: the dtype to compute in.
        shape: of the result without a reduction.
        number: how many rows there are.
        classes: how many classes.
    """

    at_class: Tensors
    steps: tuple[int, ...]
    of_row: Tensors
    label: torch.Tensor | None
    compute: torch.dtype
    shape: torch.Size
    number: int
    classes: int


def rows_of(operation: type[Rowwise], tensors: Tensors) -> Rows:
    """The rows of some operands, of which some may have to be copied for it."""
    named = dict(zip(operation.operands, tensors, strict=True))
    first = tensors[0]
    assert first is not None
    shape, classes = first.shape[:-1], first.shape[-1]
    count, compute = math.prod(shape), compute_dtype(tensors)

    def numbers(names: tuple[str, ...]) -> Tensors:
        """The operands of these names, integers among them as numbers to compute with."""
        found = [named[name] for name in names]
        return tuple(t if t is None or t.is_floating_point() else t.to(compute) for t in found)

    columns = [t.reshape(count, classes) for t in numbers(operation.columns) if t is not None]
    columns = [t if t.stride(1) == 1 or classes == 1 else t.contiguous() for t in columns]
    weights = [t if t is None else t.contiguous() for t in numbers(operation.by_class)]
    of_row = [t if t is None else t.contiguous() for t in numbers(operation.by_row)]
    label = named[operation.label] if operation.label else None
    return Rows(
        (*columns, *weights),
        (*[t.stride(0) for t in columns], *[0] * len(weights)),
        tuple(of_row),
        label if label is None else label.contiguous(),
        compute,
        shape,
        count,
        classes,
    )


def divisor_of(options: Options, rows: Rows) -> float:
    """What the sum of the rows' values is divided by: of nothing NaN, as in torch."""
    return (float(rows.number) or math.nan) if options.reduction == "mean" else 1.0


def empty_grads(
    operation: type[Rowwise], tensors: Tensors, needs: tuple[bool, ...], empty: Empty
) -> Tensors:
    """Uninitialised contiguous gradients of the columns that need one, and None for all else."""
    return tuple(
        empty(tuple(t.shape), t.dtype) if t is not None and need and is_column else None
        for t, need, is_column in zip(
            tensors, needs, (name in operation.columns for name in operation.operands), strict=True
        )
    )
