"""The last stage of every reduction: one program, one order, the same bits every time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl

from .compiler import as_number, compute_dtype, device_function, kernel, launch, number
from .vector_math import quotient

BLOCK = 2048


@device_function
def sum_all(numbers, count, BLOCK: tl.constexpr):
    """Sum of `count` numbers, in an order that depends on their count alone."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], numbers.dtype.element_ty)
    for begin in range(0, count, BLOCK):
        total += tl.load(numbers + begin + lanes, mask=begin + lanes < count, other=0.0)
    return tl.sum(total)


@kernel
def finish(partials, count, masses, mass_count, divisor, loss, BLOCK: tl.constexpr):
    """loss = the sum of the partial sums over the sum of the masses, or over divisor."""
    total = sum_all(partials, count, BLOCK)
    if masses is not None:
        whole = sum_all(masses, mass_count, BLOCK)
        # of nothing the mean is NaN, even where label smoothing has left a loss
        total = tl.where(whole != 0.0, quotient(total, whole), float("nan"))
    elif divisor is not None:
        total = quotient(total, as_number(divisor, total.dtype))
    tl.store(loss, total)


def reduce(
    partials: torch.Tensor,
    dtype: torch.dtype,
    masses: torch.Tensor | None = None,
    divisor: float | None = None,
) -> torch.Tensor:
    """A 0-d tensor: the sum of partials over that of masses, or over divisor, or as it is."""
    loss = torch.empty((), dtype=dtype, device=partials.device)
    mass_count = 0 if masses is None else masses.numel()
    launch(
        finish, (1,), partials.device, 512, partials, partials.numel(), masses, mass_count,
        None if divisor is None else number(divisor, partials.dtype), loss, BLOCK=BLOCK,
    )  # fmt: skip
    return loss


def empty_partials(
    count: int, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Uninitialised room for partial sums over `like`, or over tensors of another dtype there."""
    return like.new_empty(count, dtype=compute_dtype(dtype or like.dtype))


def empty_on(
    tensors: tuple[torch.Tensor | None, ...],
) -> Callable[[tuple[int, ...], torch.dtype], torch.Tensor]:
    """What gives uninitialised memory where some tensors are."""
    device = next(t for t in tensors if t is not None).device
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)
