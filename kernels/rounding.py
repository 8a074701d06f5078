"""How a number is stored in 16 bits: to nearest, at random without bias, or with what was lost.

Random numbers come from a counter, not from a generator that has a state: the word that belongs to
an element of a parameter in a step is a hash of the seed, the parameter's place, the step and the
element's. So they are the same whatever the number of threads, the backend and the process.

What is here works on Python's integers, on numba's and on torch's int64 tensors alike: a word is
an integer from 0 to 2**32 - 1, and both multipliers are below 2**31, so that no product overflows.
A word has the random bits of two slots, 16 for each.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "COMPENSATION", "FIRST", "HALVES", "KEY", "MASK", "NEAREST", "PAIR", "SECOND", "STOCHASTIC",
    "half_of", "key_of", "mixed", "stream_of", "word_of",
]  # fmt: skip

#: How the elements of a slot are stored. A compensation is what rounding took from the parameter.
NEAREST, STOCHASTIC, COMPENSATION = "nearest", "stochastic", "compensation"

MASK = 0xFFFFFFFF
#: The multipliers of a hash: odd numbers, of which no bits stand out.
FIRST, SECOND = 0x7A3D5F8B, 0x5C9A6E37
#: What steps and pairs of slots are apart in what is hashed.
KEY, PAIR = 0x61C88647, 0x2545F491
#: Slots that share a word.
HALVES = 2


def half_of(slot: int, states: int) -> int:
    """Which of the halves of an element's words belongs to a slot, the parameter's being slot 0.

    The parameter's is behind those of the states, so that two states that are stored at random
    take one word, whether the parameter is so, too, or not.
    """
    return states if slot == 0 else slot - 1


def mixed(x: Any) -> Any:
    """A hash of one word: each bit of it depends on every bit of x."""
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = ((x ^ (x >> 15)) * SECOND) & MASK
    return x ^ (x >> 16)


def stream_of(seed: int, *places: int) -> tuple[int, int]:
    """Two words for a parameter; places: its own, and its shard's if it is cut."""
    first, second = mixed((seed & MASK) + KEY & MASK), mixed((seed >> 32) + PAIR & MASK)
    for place in places:
        first = mixed((first ^ second) + place + KEY & MASK)
        second = mixed((second + PAIR & MASK) ^ first)
    return first, second


def key_of(first: Any, second: Any, step: Any) -> Any:
    """Two words for a step of a parameter, of those of its stream."""
    key = mixed((first + step * KEY) & MASK)
    return key, mixed((second + key) & MASK)


def word_of(index: Any, first: Any, second: Any, pair: int) -> Any:
    """An element's word for a pair of slots, of the key of a step; index: modulo 2**32."""
    x = (index + first + pair * PAIR) & MASK
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = x ^ second
    x = ((x ^ (x >> 15)) * SECOND) & MASK
    return x ^ (x >> 16)
