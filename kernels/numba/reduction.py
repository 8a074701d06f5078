"""The second stage of a reduction."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiler import kernel, summing_kernel
from .pointer import load

# So many blocks of numbers are added with their rounding errors kept; it takes half a
# microsecond. Within a block the errors of the additions are small beside the sum of all.
BLOCKS = 64


@summing_kernel
def block_sum(numbers: Any, begin: int, end: int) -> float:
    total = 0.0
    for i in range(begin, end):
        total += load(numbers, i)
    return total


@kernel
def sum_all(numbers: Any, count: int) -> float:
    """Sum of float64 numbers. Its order depends on their count alone, not on any threads."""
    total, lost = 0.0, 0.0
    size = (count + BLOCKS - 1) // BLOCKS
    for begin in range(0, count, max(size, 1)):
        x = block_sum(numbers, begin, min(begin + size, count))
        sum_ = total + x
        added = sum_ - total
        lost += (total - (sum_ - added)) + (x - added)  # what rounding took away, exactly
        total = sum_
    return total + lost if np.isfinite(total) else total
