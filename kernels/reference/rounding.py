"""Numbers stored in 16 bits, in torch's operations: what the compiled backends do, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rounding

__all__ = ["compensated", "element_bits", "places_in_memory", "stochastic"]

_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}
#: The smallest normal number of float16, and the spacing of those below it.
_NORMAL, _SPACING = 2.0**-14, 2.0**-24


def places_in_memory(tensor: Tensor, dense: bool) -> Tensor:
    """The place of each element of a tensor, int64: in memory, or if it isn't dense in order."""
    places = torch.arange(tensor.numel(), device=tensor.device)
    if not dense:
        return places.view(tensor.shape)
    return places.as_strided(tensor.shape, tensor.stride())


def element_bits(places: Tensor, key: tuple[int, int], half: int) -> Tensor:
    """The 16 random bits of elements, int64, for the slot that has this half of their words."""
    pair, second = divmod(half, rounding.HALVES)
    word: Tensor = rounding.word_of(places & rounding.MASK, *key, pair)
    return word >> 16 if second else word & 0xFFFF


def stochastic(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers rounded up or down at random, by how near they are, so that the mean is unbiased.

    What the dtype has stays as it is, NaN and infinities as well. A number beyond the largest
    finite one is rounded to nearest, so that none becomes infinite that would not be so otherwise.

    Args:
        value: floating point; of float64 it is the nearest float32 that is rounded.
        bits: int64 from 0 to 65,535, of the same shape.
        dtype: bfloat16 or float16. Below float16's normal numbers, the chance is right to 2**-17.

    Returns:
        A tensor of that dtype.

    Example:
        >>> bits = torch.randint(0, 1 << 16, (1_000_000,))
        >>> stochastic(torch.full((1_000_000,), 1.001), bits, torch.bfloat16).double().mean()
    """
    value = value.to(torch.float32)
    image = value.view(torch.int32)
    beyond = (image & 0x7FFFFFFF) > _LARGEST[dtype]  # infinities and NaN, too
    if dtype == torch.bfloat16:
        moved = ((image + bits.to(torch.int32)) & ~0xFFFF).view(torch.float32)
        return torch.where(beyond, value, moved).to(dtype)
    moved = ((image + (bits >> 3).to(torch.int32)) & ~0x1FFF).view(torch.float32)
    units = value.abs() * (1 / _SPACING)
    whole = units.floor()
    whole = whole + (units - whole > (bits.to(torch.float32) + 0.5) * 2.0**-16)
    small = torch.copysign(whole * _SPACING, value)
    moved = torch.where(value.abs() < _NORMAL, small, moved)
    return torch.where(beyond, value, moved).to(dtype)


def compensated(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers rounded to nearest, and what is lost by that, both in the dtype.

    Of what isn't finite nothing is lost.
    """
    stored = value.to(dtype)
    lost = value - stored.to(value.dtype)
    return stored, torch.where(lost.abs() < float("inf"), lost, 0.0).to(dtype)
