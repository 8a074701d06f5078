"""Torch itself: any device, any dtype, any order of derivative. The semantics.

The other backends fall back to it, take second derivatives from it, and are tested
against it. Its functions are bound here, once, and taken from here everywhere: a user may put
fastopt's functions in the place of torch's, and they would then call themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

from .. import hyper

__all__ = ["NATIVE", "cross_entropy", "l1_loss", "loss", "mse_loss", "out_of_bounds"]

#: What torch's functions call in the end, its own code in C++.
NATIVE: dict[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = {
    cross_entropy: _nn.cross_entropy_loss,
    l1_loss: _nn.l1_loss,
    mse_loss: _nn.mse_loss,
}


def loss(options: hyper.Loss, tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """The loss by torch's own functions, differentiable to any order.

    Args:
        options: the call without its tensors; its dtype is that of the result.
        tensors: as the public function takes them.
    """
    compute = tuple(
        t.to(options.dtype) if t is not None and t.is_floating_point() else t for t in tensors
    )
    with torch.autocast(compute[0].device.type, enabled=False):  # type: ignore[union-attr]
        return _LOSSES[type(options.hyper)](options, *compute)


def _cross_entropy(options: hyper.Loss, input: Any, target: Any, weight: Any) -> torch.Tensor:
    assert isinstance(options.hyper, hyper.CrossEntropy)
    return cross_entropy(
        input, target, weight, reduction=options.reduction, **options.hyper._asdict()
    )


_LOSSES: dict[type, Callable[..., torch.Tensor]] = {
    hyper.MSE: lambda options, input, target: mse_loss(input, target, reduction=options.reduction),
    hyper.L1: lambda options, input, target: l1_loss(input, target, reduction=options.reduction),
    hyper.CrossEntropy: _cross_entropy,
}


def out_of_bounds(target: torch.Tensor, classes: int, ignore_index: int) -> IndexError:
    """Torch's error for a class index out of range, and where it is and what would be right."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    found = bad.nonzero()
    if not len(found):  # another thread has put it right since
        return IndexError("A target was out of bounds, and is no longer")
    index = tuple(found[0].tolist())
    return IndexError(
        f"Target {target[index].item()} is out of bounds. It is target{list(index)}; allowed are "
        f"0 to {classes - 1} ({classes} classes) and ignore_index={ignore_index}"
    )
