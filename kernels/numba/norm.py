"""The norm of all gradients together, and their scaling or clamping, in one parallel region each.

The elements count as one flat range, as in an optimizer's step. The norm adds up blocks of it, in
float64: neither small numbers' squares nor large ones' are lost, and as a block is the same for
any number of threads, so is the sum. Bytes per element are 4 in float32 for the norm, and 8 more
if there is anything to scale.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numba.core import types

from ..gradients import Gradients
from .compiler import dtype_name, kernel, pointer, region, summing_kernel
from .memory import scratch
from .pointer import at, load, store
from .reduction import sum_all
from .team import on_threads
from .threads import Launcher, parts_for
from .vector_math import cast

__all__ = ["clamp_all", "scale_all", "total_norm"]

# Elements that are added up by one thread; so many that to find their tensors costs nothing.
BLOCK = 4096
# Elements per thread below which a second thread does not pay: some 100 µs of work, as in
# multi_tensor.py, for a read or two at 0.3 ns each from memory.
GRAIN = 262_144


@kernel
def tensor_at(offsets: Any, tensors: int, place: int) -> int:
    """Which tensor has an element of the flat range."""
    t, high = 0, tensors  # offsets[t] <= place < offsets[high]
    while high - t > 1:
        middle = (t + high) // 2
        if load(offsets, middle) <= place:
            t = middle
        else:
            high = middle
    return t


@summing_kernel
def sum_of_squares(grads: Any, begin: int, end: int) -> float:
    total = 0.0
    for i in range(begin, end):
        total += load(grads, i) * load(grads, i)
    return total


@summing_kernel
def sum_of_sizes(grads: Any, begin: int, end: int) -> float:
    total = 0.0
    for i in range(begin, end):
        total += abs(load(grads, i))
    return total


@kernel
def larger(a: float, b: float) -> float:
    """The larger one, or NaN if one is, as torch has it."""
    return a if a > b or a != a else b


@kernel
def largest_size(grads: Any, begin: int, end: int) -> float:
    most = 0.0
    for i in range(begin, end):
        most = larger(most, abs(load(grads, i)))
    return most


@kernel
def fold_part(
    part: int, parts: int, order: float, offsets: Any, table: Any, tensors: int, grads: Any,
    sums: Any,
) -> None:  # fmt: skip
    total = load(offsets, tensors)
    blocks = (total + BLOCK - 1) // BLOCK
    first, last = part * blocks // parts, (part + 1) * blocks // parts
    t = tensor_at(offsets, tensors, first * BLOCK)
    for block in range(first, last):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, total)
        found = 0.0
        while begin < end:
            start, stop = load(offsets, t), min(load(offsets, t + 1), end)
            if stop > begin:
                here = at(grads, load(table, t))
                if order == 2.0:
                    found += sum_of_squares(here, begin - start, stop - start)
                elif order == 1.0:
                    found += sum_of_sizes(here, begin - start, stop - start)
                else:
                    found = larger(found, largest_size(here, begin - start, stop - start))
                begin = stop
            if load(offsets, t + 1) <= begin:
                t += 1
        store(sums, block, found)


@region
def norm_of_all(
    parts: int, order: float, offsets: Any, table: Any, tensors: int, grads: Any, sums: Any,
) -> Any:  # fmt: skip
    """The norm. sums is scratch memory, a number a block."""
    on_threads(fold_part, parts, (order, offsets, table, tensors, grads, sums))
    blocks = (load(offsets, tensors) + BLOCK - 1) // BLOCK
    if order == 2.0:
        return np.sqrt(sum_all(sums, blocks))
    if order == 1.0:
        return sum_all(sums, blocks)
    return largest_size(sums, 0, blocks)


@kernel
def scale_span(grads: Any, begin: int, end: int, factor: float) -> None:
    for i in range(begin, end):
        value = load(grads, i)
        store(grads, i, value * cast(factor, value))


@kernel
def clamp_span(grads: Any, begin: int, end: int, most: float) -> None:
    for i in range(begin, end):
        value = load(grads, i)
        high = cast(most, value)
        value = -high if value < -high else value  # this way round NaN stays
        store(grads, i, high if value > high else value)


@kernel
def change_part(
    part: int, parts: int, number: float, clamps: bool, offsets: Any, table: Any, tensors: int,
    grads: Any,
) -> None:  # fmt: skip
    total = load(offsets, tensors)
    begin, end = part * total // parts, (part + 1) * total // parts
    t = tensor_at(offsets, tensors, begin)
    while begin < end:
        start, stop = load(offsets, t), min(load(offsets, t + 1), end)
        if stop > begin:
            here = at(grads, load(table, t))
            if clamps:
                clamp_span(here, begin - start, stop - start, number)
            else:
                scale_span(here, begin - start, stop - start, number)
            begin = stop
        t += 1


@region
def change_all(
    parts: int, number: float, clamps: bool, offsets: Any, table: Any, tensors: int, grads: Any,
) -> None:  # fmt: skip
    on_threads(change_part, parts, (number, clamps, offsets, table, tensors, grads))


_index = pointer("int64", 1)


@functools.cache
def _norm(dtype: torch.dtype) -> Launcher:
    grads = pointer(dtype_name(dtype), 0, "float64")
    sums = pointer("float64", 2, "float64")
    return Launcher(norm_of_all, types.float64, _index, _index, types.intp, grads, sums)


@functools.cache
def _change(dtype: torch.dtype) -> Launcher:
    compute = "float64" if dtype == torch.float64 else "float32"
    grads = pointer(dtype_name(dtype), 0, compute)
    return Launcher(change_all, types.float64, types.boolean, _index, _index, types.intp, grads)


def _tables(grads: Gradients) -> tuple[int, int, int, int]:
    offsets, addresses = grads.offsets.ctypes.data, grads.addresses.ctypes.data
    return offsets, addresses, len(grads.addresses), 0  # a pointer that `at` gives its addresses


def total_norm(grads: Gradients, order: float) -> torch.Tensor:
    """The norm of all, a 0-d float64 tensor. order: one of gradients.ORDERS."""
    size = grads.size
    sums, kept = scratch(8 * (-(-size // BLOCK)))
    found = _norm(grads.dtype)(parts_for(size, GRAIN), order, *_tables(grads), sums)
    del kept
    return torch.full((), found, dtype=torch.float64, device="cpu")


def scale_all(grads: Gradients, most: float, norm: torch.Tensor) -> None:
    """Multiply by most / (norm + 1e-6), if that is not 1 or more: then nothing is even read."""
    divisor = norm.item() + 1e-6
    factor = most / divisor if divisor else most * math.inf
    if not factor >= 1.0:  # NaN isn't
        _run_change(grads, factor, False)


def clamp_all(grads: Gradients, most: float) -> None:
    """Bring every element into [-most, most]; NaN stays."""
    _run_change(grads, most, True)


def _run_change(grads: Gradients, number: float, clamps: bool) -> None:
    _change(grads.dtype)(parts_for(grads.size, GRAIN), number, clamps, *_tables(grads))
