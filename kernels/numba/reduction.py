"""The second stage of a reduction."""

from __future__ import annotations

from typing import Any

from .compiler import summing_kernel
from .pointer import load


@summing_kernel
def sum_all(numbers: Any, count: int) -> float:
    """Sum of float64 numbers. Its order depends on their count alone, not on any threads."""
    total = 0.0
    for i in range(count):
        total += load(numbers, i)
    return total
