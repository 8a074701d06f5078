"""Numbers stored in 16 bits inside of kernels, as kernels/reference/rounding.py has it."""

from __future__ import annotations

import triton.language as tl

from .. import rounding
from .compiler import device_function

# What a slot's elements are stored by, in place of the half of a word that is theirs.
NEAREST, COMPENSATION = -1, -2

_FIRST, _SECOND = tl.constexpr(rounding.FIRST), tl.constexpr(rounding.SECOND)
_KEY, _PAIR = tl.constexpr(rounding.KEY), tl.constexpr(rounding.PAIR)


def codes(stored: tuple[str, ...], used: list[bool]) -> tuple[int, ...]:
    """How the used slots are stored, as numbers that a kernel is compiled for."""
    states = len(stored) - 1 - (rounding.COMPENSATION in stored)
    found = []
    for slot, how in enumerate(stored):
        half = rounding.half_of(slot, states) if how == rounding.STOCHASTIC else NEAREST
        found.append(COMPENSATION if how == rounding.COMPENSATION else half)
    return tuple(code for code, there in zip(found, used, strict=True) if there)


@device_function
def mixed(x):
    x = (x ^ (x >> 16)) * tl.full([], _FIRST, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], _SECOND, tl.uint32)
    return x ^ (x >> 16)


@device_function
def key_of(first, second, step):
    """Two words for a step of a parameter, of those of its stream."""
    key = mixed(first + step * tl.full([], _KEY, tl.uint32))
    return key, mixed(second + key)


@device_function
def word_of(index, first, second, PAIR: tl.constexpr):
    """An element's word for a pair of slots, of the key of a step."""
    x = index.to(tl.uint32) + first + tl.full([], PAIR * _PAIR & 0xFFFFFFFF, tl.uint32)
    x = (x ^ (x >> 16)) * tl.full([], _FIRST, tl.uint32)
    x = x ^ second
    x = (x ^ (x >> 15)) * tl.full([], _SECOND, tl.uint32)
    return x ^ (x >> 16)


@device_function
def stochastic(value, word, SECOND: tl.constexpr, dtype: tl.constexpr):
    """A float32 that dtype has, the one above or below, by the second half of a word or the first.

    value: of float64 the nearest float32 is taken.
    """
    value = value.to(tl.float32)
    bits = word >> 16 if SECOND else word & 0xFFFF
    image = value.to(tl.uint32, bitcast=True)
    size = image & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        beyond = size > 0x7F7F0000
        moved = ((image + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        beyond = size > 0x477FE000
        moved = ((image + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        units = size.to(tl.float32, bitcast=True) * 16777216.0
        whole = tl.floor(units)
        up = units - whole > (bits.to(tl.float32) + 0.5) * 0.0000152587890625
        small = (whole + up.to(tl.float32)) * 0.000000059604644775390625
        small = (small.to(tl.uint32, bitcast=True) | (image & 0x80000000)).to(
            tl.float32, bitcast=True
        )
        moved = tl.where(size < 0x38800000, small, moved)
    return tl.where(beyond, value, moved)
