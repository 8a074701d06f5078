"""Torch itself: any device, any dtype, any order of derivative. The semantics.

The other backends fall back to it, take second derivatives from it, and are tested
against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from ..operation import Loss, Options

__all__ = ["loss", "out_of_bounds"]


def loss(options: Options, tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """The loss by torch's own function, differentiable to any order.

    Args:
        options: the call without its tensors; its dtype is that of the result.
        tensors: the operands, None for one that wasn't given.
    """
    record: Any = options.record
    given = {
        name: t.to(options.dtype) if t.is_floating_point() else t
        for name, t in zip(record.operands, tensors, strict=True)
        if t is not None
    }
    device = next(iter(given.values())).device
    warned = isinstance(record, Loss) and record.warning(options.reduction, *tensors)
    with torch.autocast(device.type, enabled=False), _silence() if warned else nullcontext():
        result: torch.Tensor = record.__class__.twin(
            **given, **asdict(record), reduction=options.reduction
        )
    return result


@contextmanager
def _silence() -> Iterator[None]:
    """The call itself has warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def out_of_bounds(target: torch.Tensor, classes: int, ignore_index: int | None) -> IndexError:
    """Torch's error for a class index out of range, and where it is and what would be right.

    ignore_index is None where none is.
    """
    bad = (target < 0) | (target >= classes)
    if ignore_index is not None:
        bad &= target != ignore_index
    found = bad.nonzero()
    if not len(found):  # another thread has put it right since
        return IndexError("A target was out of bounds, and is no longer")
    index = tuple(found[0].tolist())
    return IndexError(
        f"Target {target[index].item()} is out of bounds. It is target{list(index)}; allowed are "
        f"0 to {classes - 1} ({classes} classes)"
        + ("" if ignore_index is None else f" and ignore_index={ignore_index}")
    )
